"""The way of weights from noise to their targets."""

import pytest
import torch

from metadiff_cli.core.evaluation.diagnostics import DRAWS, principal_plane, trace_weights
from metadiff_cli.core.evaluation.evaluate import Protocol
from metadiff_cli.core.method.adapt import MetaDiff, Sampling, Tuning, seeds_of, trace_tasks
from metadiff_cli.core.method.denoisers import AnalyticDenoiser
from metadiff_cli.core.method.support import TaskSupport
from metadiff_cli.core.method.task_space import fit_task_space
from tests.worlds import CPU, SIZE, bank_of, classifier_of, world


@pytest.fixture(scope="module")
def metadiff() -> MetaDiff:
    return MetaDiff(fit_task_space(list(world(40, 30, seed=0))), AnalyticDenoiser(), False, Tuning())


@pytest.mark.parametrize("method", ["ddim", "ddpm"])
def test_a_path_begins_with_noise_and_ends_where_adaptation_ends(metadiff: MetaDiff, method: str) -> None:
    z = world(6, 4, seed=1).unflatten(0, (2, 3))
    sampling = Sampling(steps=7, temperature=1.0, method=method)
    path = trace_tasks(
        metadiff, TaskSupport.even(z), sampling, ranks=torch.arange(3).expand(2, -1), seeds=seeds_of(0, 0, 2)
    )
    assert path.shape == (8, 2, 3, SIZE)
    classifier = classifier_of(metadiff, z, sampling)
    assert 0.7 < float(classifier.space.to_task(path[0]).std()) < 1.3
    torch.testing.assert_close(path[-1], classifier.weights[0], atol=1e-4, rtol=1e-4)


def test_the_plane_shows_targets_and_draws_that_come_nearer(metadiff: MetaDiff) -> None:
    bank = bank_of(12, seed=3)
    found = trace_weights(metadiff, bank, Protocol(way=8, shot=10, query=5), Sampling(steps=20), CPU)
    assert len(found.classes) == 5 and found.targets.shape == (5, 2)  # more would hide one another
    assert found.weights.shape == (21, DRAWS, 5, 2)
    assert 1 >= sum(found.shares) > 0 and found.shares[0] >= found.shares[1]
    distance = (found.weights - found.targets).norm(dim=-1).mean(dim=(1, 2))
    assert float(distance[-1]) < 0.5 * float(distance[0])
    assert trace_weights(metadiff, bank, Protocol(way=2, shot=1, query=5), Sampling(), CPU).targets.shape == (2, 2)


def test_the_principal_plane_is_orthonormal_and_follows_the_spread() -> None:
    points = torch.randn(9, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.1, 5, 0.1, 2, 0.1, 0.1])
    plane, shares = principal_plane(points)
    torch.testing.assert_close(plane.T @ plane, torch.eye(2), atol=1e-5, rtol=0)
    assert float(plane[1, 0]) > 0.9 and float(plane[3, 1]) > 0.9 and sum(shares) > 0.95
