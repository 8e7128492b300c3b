"""Memory of a training step against its inner steps."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from metadiff_cli.core.encoders.image_encoder import ImageEncoder
from metadiff_cli.core.encoders.networks import build_encoder
from metadiff_cli.core.memory import LiveTensors, training_memory
from metadiff_cli.core.method.task_space import fit_task_space
from tests.worlds import CPU, bank_of


def test_what_is_alive_at_once_is_counted() -> None:
    with LiveTensors() as live:
        first = torch.zeros(1000)  # 4,000 bytes
        view = first.view(10, 100)
        first += 1
        assert live.now == live.peak == 4000
        del first
        assert live.now == 4000  # the view holds on to it
        del view
        assert live.now == 0 and live.peak == 4000
        torch.zeros(100)
    assert live.peak == 4000


def test_what_autograd_keeps_is_alive() -> None:
    w = torch.ones(1000, requires_grad=True)
    with LiveTensors() as live:
        loss = w.exp().exp().sum()  # both results are kept for the way back
        assert live.now == 8004
        loss.backward()
        del loss
        assert live.now == 4000  # the gradient


def test_our_memory_stays_and_that_of_maml_grows() -> None:
    bank = bank_of(8, seed=0)
    space = fit_task_space(list(bank.by_class()))
    images = ImageEncoder(build_encoder("conv4"), "conv4", 32, (0.5,) * 3, (0.25,) * 3, True, CPU)
    before = torch.random.get_rng_state()
    found = {name: dict(points) for name, points in training_memory(images, space, bank).items()}
    assert torch.equal(before, torch.random.get_rng_state())
    assert max(found["MetaDiff"].values()) == pytest.approx(min(found["MetaDiff"].values()), rel=0.01)
    steps = sorted(found["MAML"])
    slopes = np.diff([found["MAML"][s] for s in steps]) / np.diff(steps)
    assert found["MAML"][steps[-1]] > 2 * found["MAML"][steps[0]]
    assert slopes == pytest.approx(slopes[0], rel=0.05)
    assert set(training_memory(replace(images, name="timm:resnet10t"), space, bank)) == {"MetaDiff"}
