"""Methods on episodes, their summary, and the quick measurement of an encoder between epochs."""

from functools import partial

import numpy as np
import pytest
import torch

from metadiff_cli.core.evaluation.evaluate import (
    Protocol,
    Scores,
    evaluate,
    expanded,
    method_of,
    quick_accuracy,
    run_through,
    summarise,
)
from metadiff_cli.core.method.adapt import MetaDiff, Sampling
from metadiff_cli.core.method.metric import Metric
from metadiff_cli.core.method.task_space import class_statistics
from tests.worlds import CPU, SIZE, bank_of, small_encoder, world


def test_the_quick_measurement_of_an_encoder_takes_the_classes_that_it_can() -> None:
    images = np.random.default_rng(0).integers(0, 256, (31, 16, 16, 3), dtype=np.uint8)
    measure = partial(quick_accuracy, small_encoder(views=1), batch=8, seed=0, episodes=5)
    for classes in (2, 3, 6):
        assert 0 <= measure(images[: 4 * classes], np.repeat(np.arange(classes), 4)) <= 100
    with_single = measure(images[:9], np.array([0, 0, 0, 0, 1, 1, 1, 1, 2]))
    assert with_single == measure(images[:8], np.array([0, 0, 0, 0, 1, 1, 1, 1]))
    assert measure(images[:5], np.array([0, 0, 0, 0, 1])) is None


@pytest.fixture(scope="module")
def metadiff() -> MetaDiff:
    return MetaDiff(Metric((SIZE,), class_statistics(list(world(40, 30, seed=0))).task_space()))


def probabilities(metadiff: MetaDiff, protocol: Protocol, steps: int, shared: bool = False) -> Scores:
    bank = bank_of(12, seed=3)
    x = expanded(metadiff.metric, bank, CPU) if shared else None
    method = method_of(metadiff, bank, Sampling(steps=steps), protocol, CPU, x)
    return run_through(evaluate(bank, {"metadiff": method}, protocol, CPU))["metadiff"]


@pytest.mark.parametrize("steps", [1, 10])
def test_the_queries_guide_from_the_first_step_on(metadiff: MetaDiff, steps: int) -> None:
    alone, together = (
        torch.cat(probabilities(metadiff, Protocol(episodes=6, transductive=pool), steps).confidence)
        for pool in (False, True)
    )
    assert not torch.allclose(alone, together, atol=1e-3)


def test_methods_may_share_the_expanded_features(metadiff: MetaDiff) -> None:
    own, shared = (probabilities(metadiff, Protocol(episodes=5), 2, shared) for shared in (False, True))
    assert torch.equal(torch.cat(own.confidence), torch.cat(shared.confidence))


def test_no_calibration_error_without_a_fitted_temperature() -> None:
    scores = {name: Scores() for name in ("prototype", "other")}
    for each in scores.values():
        each.add(torch.tensor([[[0.9, 0.1], [0.4, 0.6]]]), torch.tensor([[0, 0]]))
    found = summarise(scores, calibrated=("prototype",))
    assert found["other"]["ece"] is None and found["prototype"]["ece"] is not None
    assert found["prototype"]["ece"] == pytest.approx(35.0, abs=1e-4)  # 0.1 and 0.6 off, a bin each
    assert found["other"]["paired_to_prototype"] == {"difference": 0.0, "ci95": 0.0}
