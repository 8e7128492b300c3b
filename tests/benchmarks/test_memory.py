"""Memory of training and adaptation against their inner steps."""

import numpy as np
import pytest
import torch

from tests.benchmarks.memory import LiveTensors, adaptation_memory, training_memory
from tests.tasks import METRICS, bank_of, features, support_of, tuned
from tests.worlds import small_encoder


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


def test_the_memory_of_training_stays_and_that_of_maml_grows() -> None:
    bank = bank_of(features(8, 12, 0))
    before = torch.random.get_rng_state()
    found = {name: dict(points) for name, points in training_memory(small_encoder(32), bank).items()}
    assert torch.equal(before, torch.random.get_rng_state())
    assert max(found["MetaDiff"].values()) == pytest.approx(min(found["MetaDiff"].values()), rel=0.01)
    steps = sorted(found["MAML"])
    slopes = np.diff([found["MAML"][s] for s in steps]) / np.diff(steps)
    assert found["MAML"][steps[-1]] > 2 * found["MAML"][steps[0]]
    assert slopes == pytest.approx(slopes[0], rel=0.05)


@pytest.mark.parametrize("name", ["two groups", "without base classes"])
def test_the_memory_of_adaptation_stays(name: str) -> None:
    metric = METRICS[name]()
    support = support_of(metric, (5, 3, 1), tasks=4)
    few, many = (adaptation_memory(tuned(metric), support, steps) for steps in (10, 200))
    assert many == pytest.approx(few, rel=0.01) and few > 0.01
