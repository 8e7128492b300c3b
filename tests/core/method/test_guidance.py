"""Guidance by a pool of whatever proportions; the transductive controls: what they must find, what must not matter."""

import math

import pytest
import torch
from torch import Tensor

from metadiff_cli.core.evaluation.controls import label_propagation, soft_kmeans
from metadiff_cli.core.method.adapt import MetaDiff, Sampling, Tuning, adapt_tasks
from metadiff_cli.core.method.calibration import Calibration
from metadiff_cli.core.method.denoisers import AnalyticDenoiser
from metadiff_cli.core.method.task_space import TaskSpace


def clusters(seed: int, noise: float) -> tuple[Tensor, Tensor, Tensor]:
    """Support (1, 3, 1, D), query (1, 60, D) and its labels: three directions with noise."""
    g = torch.Generator().manual_seed(seed)
    means = 4 * torch.randn(3, 1, 16, generator=g)
    points = means + noise * torch.randn(3, 21, 16, generator=g)
    return points[None, :, :1], points[:, 1:].reshape(1, 60, 16), torch.arange(3).repeat_interleave(20)


def test_clear_clusters_are_found_by_both() -> None:
    support, query, labels = clusters(0, noise=0.5)
    for probabilities in (soft_kmeans(support, query, 20.0), label_propagation(support, query)):
        assert torch.allclose(probabilities.sum(dim=-1), torch.ones(1, 60), atol=1e-5)
        assert torch.equal(probabilities[0].argmax(dim=-1), labels)


def test_the_pool_corrects_a_support_image_far_off_its_class() -> None:
    right = {"none": 0, "kmeans": 0, "propagation": 0}
    for seed in range(30):
        support, query, labels = clusters(seed, noise=3.0)
        found = {
            "none": soft_kmeans(support, query, 20.0, steps=0),
            "kmeans": soft_kmeans(support, query, 20.0, steps=3),
            "propagation": label_propagation(support, query),
        }
        for name, p in found.items():
            right[name] += int((p[0].argmax(dim=-1) == labels).sum())
    assert right["kmeans"] > right["none"] + 18 and right["propagation"] > right["none"] + 18  # one point of 1,800


def test_permuting_the_queries_permutes_the_answers() -> None:
    support, query, _ = clusters(1, noise=2.0)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    for method in (lambda q: soft_kmeans(support, q, 10.0), lambda q: label_propagation(support, q)):
        assert torch.allclose(method(query[:, order]), method(query)[:, order], atol=1e-5)


def test_one_query_is_enough() -> None:
    support, query, _ = clusters(2, noise=1.0)
    assert torch.isfinite(label_propagation(support, query[:, :1])).all()
    assert torch.isfinite(soft_kmeans(support, query[:, :1], 10.0)).all()


@pytest.mark.parametrize("counts", [(57, 3, 0, 0, 0), (76, 1, 1, 1, 1), (285, 15, 0, 0, 0), (12, 12, 12, 12, 12)])
def test_a_pool_helps_whatever_its_proportions(counts: tuple[int, ...]) -> None:
    """Tasks of the model's own world: classes N(0, I), images around them with a known noise."""
    g, size, tasks = torch.Generator().manual_seed(sum(counts)), 32, 60
    noise = 1.6 + torch.rand(size, generator=g)
    eye = torch.eye(size)
    space = TaskSpace(torch.zeros(size), eye, eye, noise**-2)
    metadiff = MetaDiff(
        space, AnalyticDenoiser(), False, Tuning(Calibration(log_scales=((math.log(8.0),),)), shared=0.0)
    )
    means = torch.randn(tasks, 5, size, generator=g)
    support = means.unsqueeze(2) + noise * torch.randn(tasks, 5, 1, size, generator=g)
    labels = torch.arange(5).repeat_interleave(torch.tensor(counts))
    query = means[:, labels] + noise * torch.randn(tasks, len(labels), size, generator=g)

    def accuracy(pool: Tensor | None) -> Tensor:
        ranks, seeds = torch.arange(5).expand(tasks, 5), list(range(tasks))
        found = adapt_tasks(metadiff, support, Sampling(guidance=1.0), ranks=ranks, seeds=seeds, pool=pool)
        return (found.probabilities(query).argmax(dim=-1) == labels).double().mean(dim=1)

    gain = accuracy(query) - accuracy(None)
    assert gain.mean() > 0 and gain.mean() > 1.96 * gain.std() / tasks**0.5
