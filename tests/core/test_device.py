"""Which device `--device` is, and what becomes of default random generators."""

import pytest
import torch

from metadiff_cli.core.device import CPU, default_noise, pick_device, seeded_noise
from metadiff_cli.core.distributed import Group
from metadiff_cli.errors import ConfigError


@pytest.mark.parametrize(
    "name",
    ["auto:1", "cpu:1", "mps:0", "cuda:", "cuda:x", "cuda:-1", "cuda:123456", "gpu", "", "cuda:0:1", "CPU"],
)
def test_what_is_no_device_is_a_config_error(name: str) -> None:
    with pytest.raises(ConfigError, match="unknown device"):
        pick_device(name)


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:7", "mps"])
def test_a_device_that_is_not_there_is_a_config_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="can be used here"):
        pick_device(name)
    assert pick_device("auto") == pick_device("cpu") == CPU


def test_gpus_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: None)
    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda")
    assert pick_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ConfigError, match="cuda:0 to cuda:1"):
        pick_device("cuda:2")
    second = Group(1, 2, 1, 2)
    assert pick_device("auto", second) == torch.device("cuda", 1) and pick_device("cpu", second) == CPU
    with pytest.raises(ConfigError, match="cannot share the GPU"):
        pick_device("cuda:0", second)


def test_noise_goes_on_where_it_was_and_leaves_the_others_alone() -> None:
    noise, before = seeded_noise(3, CPU), torch.get_rng_state()
    with default_noise(noise, CPU):
        first = torch.rand(2)
    with default_noise(noise, CPU):
        second = torch.rand(2)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        assert torch.equal(torch.rand(2), first) and torch.equal(torch.rand(2), second)
