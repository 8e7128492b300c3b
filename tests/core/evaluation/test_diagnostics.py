"""Generated weights: copies or not, their way, and what each step of the descent gives."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from metadiff_cli.core.encoders.bank import FeatureBank
from metadiff_cli.core.evaluation import diagnostics
from metadiff_cli.core.evaluation.diagnostics import (
    DRAWS,
    measure_novelty,
    measure_path,
    placed,
    principal_plane,
    trace_weights,
)
from metadiff_cli.core.evaluation.evaluate import Protocol, evaluate, method_of, run_through
from metadiff_cli.core.method.adapt import MetaDiff, Sampling, seeds_of, trace_tasks
from metadiff_cli.core.method.metric import Metric
from metadiff_cli.core.method.support import TaskSupport
from metadiff_cli.core.method.task_space import class_statistics
from tests.worlds import CPU, SIZE, bank_of, classifier_of, world

BASE = world(40, 30, seed=0)
PROTOCOL = Protocol(way=4, shot=3, query=5, episodes=30)


@pytest.fixture(scope="module")
def metadiff() -> MetaDiff:
    statistics = class_statistics(list(BASE))
    return MetaDiff(Metric((SIZE,), statistics.task_space()), targets=statistics.means.float())


@pytest.fixture(scope="module")
def spaceless() -> MetaDiff:
    return MetaDiff(Metric((SIZE,)))


@pytest.mark.parametrize("method", ["ddim", "ddpm"])
def test_a_path_ends_where_adaptation_ends(metadiff: MetaDiff, method: str) -> None:
    z = world(6, 4, seed=1).unflatten(0, (2, 3))
    sampling = Sampling(steps=7, temperature=1.0, method=method)
    support = TaskSupport.even(metadiff.metric.expand(z))
    steps = trace_tasks(metadiff, support, sampling, ranks=torch.arange(3).expand(2, -1), seeds=seeds_of(0, 0, 2))
    path = [step.weights for _, step in steps]
    assert len(path) == 7 and path[0].shape == (2, 3, 2 * SIZE)
    torch.testing.assert_close(path[-1], classifier_of(metadiff, z, sampling).weights[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["metadiff", "spaceless"])
def test_the_plane_shows_targets_and_a_weight_after_each_step(kind: str, request: pytest.FixtureRequest) -> None:
    bank, metadiff = bank_of(12, seed=3), request.getfixturevalue(kind)
    found = trace_weights(metadiff, bank, Protocol(way=8, shot=10, query=5), Sampling(steps=20), CPU)
    assert len(found.classes) == 5 and found.targets.shape == (5, 2)  # more would hide one another
    assert found.weights.shape == (20, DRAWS, 5, 2)
    assert 1 >= sum(found.shares) > 0 and found.shares[0] >= found.shares[1]
    draws = found.weights[-1] - found.weights[-1, :1]
    assert bool((draws[1:].abs() > 1e-5).any()) == (kind == "metadiff")  # nothing is drawn without a task space
    nearest = torch.cdist(found.weights[-1].flatten(0, 1), found.targets).argmin(dim=1)
    assert nearest.tolist() == list(range(5)) * DRAWS  # a weight lies in the direction of its own class
    assert trace_weights(metadiff, bank, Protocol(way=2, shot=1, query=5), Sampling(), CPU).targets.shape == (2, 2)


def test_weights_are_placed_where_features_of_task_space_are(metadiff: MetaDiff, spaceless: MetaDiff) -> None:
    space, z = metadiff.metric.space, world(3, 1, seed=5)[:, 0]
    assert space is not None
    v = placed(metadiff.metric, metadiff.metric.expand(z) - metadiff.metric.origin)
    torch.testing.assert_close(v, space.to_task(z), atol=1e-4, rtol=1e-4)
    assert placed(spaceless.metric, z) is z


def test_the_principal_plane_is_orthonormal_and_follows_the_spread() -> None:
    points = torch.randn(9, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.1, 5, 0.1, 2, 0.1, 0.1])
    plane, shares = principal_plane(points)
    torch.testing.assert_close(plane.T @ plane, torch.eye(2), atol=1e-5, rtol=0)
    assert float(plane[1, 0]) > 0.9 and float(plane[3, 1]) > 0.9 and sum(shares) > 0.95


@pytest.mark.parametrize("kind", ["metadiff", "spaceless"])
def test_the_loss_falls_along_the_path_and_its_end_is_what_is_measured(
    kind: str, request: pytest.FixtureRequest
) -> None:
    bank, metadiff = bank_of(12, seed=3), request.getfixturevalue(kind)
    path = measure_path(metadiff, bank, PROTOCOL, Sampling(steps=6, samples=2, temperature=1.0), CPU)
    assert len(path.accuracy) == len(path.loss) == 6
    assert all(after <= before + 1e-4 for before, after in zip(path.loss, path.loss[1:], strict=False))
    assert path.loss[-1] < path.loss[0]
    method = method_of(metadiff, bank, Sampling(steps=6), PROTOCOL, CPU)
    (scores,) = run_through(evaluate(bank, {"metadiff": method}, PROTOCOL, CPU)).values()
    assert path.accuracy[-1] == pytest.approx(100 * float(torch.cat(scores.accuracy).mean()), abs=1e-4)


def test_copies_of_training_weights_are_told(metadiff: MetaDiff) -> None:
    base = FeatureBank(BASE.flatten(0, 1).numpy(), np.repeat(np.arange(40), 30), tuple(map(str, range(40))))
    many = Protocol(way=5, shot=25, query=5, episodes=10)
    trusting = metadiff.without_descent(metadiff.tuning.temperature)
    known = measure_novelty(trusting, base, many, Sampling(), CPU)
    new = measure_novelty(trusting, bank_of(12, seed=3), many, Sampling(), CPU)
    assert known is not None and new is not None and known.weights == new.weights == 50
    assert known.generated_to_training < 25 < new.generated_to_training
    assert known.nearer > 90 and new.nearer < 50
    assert known.training_to_training == new.training_to_training


def test_no_copies_are_looked_for_without_task_space_or_training_weights(
    metadiff: MetaDiff, spaceless: MetaDiff
) -> None:
    for without in (spaceless, replace(metadiff, targets=None)):
        assert measure_novelty(without, bank_of(12, seed=3), PROTOCOL, Sampling(), CPU) is None


def test_each_episode_has_noise_of_its_own(metadiff: MetaDiff, monkeypatch: pytest.MonkeyPatch) -> None:
    """So the result does not depend on how many are looked at together."""
    sampling, found = Sampling(steps=3, temperature=1.0), []
    for at_once in (25, 1):
        monkeypatch.setattr(diagnostics, "AT_ONCE", at_once)
        found.append(measure_novelty(metadiff, bank_of(12, seed=3), replace(PROTOCOL, episodes=3), sampling, CPU))
    assert found[0] is not None and found[1] is not None
    assert found[0].generated_to_training == pytest.approx(found[1].generated_to_training, abs=1e-3)
