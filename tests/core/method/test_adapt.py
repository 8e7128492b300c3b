"""Adaptation as a whole: what must not matter does not, what must does."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from metadiff_cli.core.method.adapt import (
    MetaDiff,
    Sampling,
    TaskClassifier,
    Tuning,
    adapt_tasks,
    seeds_of,
)
from metadiff_cli.core.method.denoisers import AnalyticDenoiser, UNetDenoiser, randomise
from metadiff_cli.core.method.guidance import PoolGuidance
from metadiff_cli.core.method.metric import cosine_logits
from metadiff_cli.core.method.support import TaskSupport
from metadiff_cli.core.method.task_space import fit_task_space
from tests.worlds import SIZE, classifier_of, world


@pytest.fixture(scope="module")
def metadiff() -> MetaDiff:
    space = fit_task_space(list(world(40, 30, seed=0)))
    return MetaDiff(space, AnalyticDenoiser(), False, Tuning())


@pytest.fixture(params=["analytic", "unet"])
def any_learner(request: pytest.FixtureRequest, metadiff: MetaDiff) -> MetaDiff:
    if request.param == "analytic":
        return metadiff
    return replace(metadiff, denoiser=randomise(UNetDenoiser(SIZE, width=32), seed=0), learned=True)


def adapt(metadiff: MetaDiff, z: Tensor, sampling: Sampling | None = None, **more: object) -> Tensor:
    return classifier_of(metadiff, z, sampling, **more).weights


def hits(probabilities: Tensor, labels: Tensor) -> int:
    return int((probabilities[0].argmax(dim=-1) == labels).sum())


DRAWS = Sampling(samples=2, temperature=1.0)


@pytest.mark.parametrize("sampling", [Sampling(), DRAWS, replace(DRAWS, method="ddpm")])
def test_permuting_classes_permutes_the_weights(any_learner: MetaDiff, sampling: Sampling) -> None:
    z = world(5, 3, seed=1).unsqueeze(0)
    order = torch.tensor([3, 1, 4, 0, 2])
    straight = adapt(any_learner, z, sampling)
    turned = adapt(any_learner, z[:, order], sampling, ranks=order.unsqueeze(0))
    assert torch.allclose(turned, straight[:, :, order], atol=1e-4)


@pytest.mark.parametrize("sampling", [Sampling(), DRAWS])
def test_a_batch_of_tasks_equals_single_tasks(any_learner: MetaDiff, sampling: Sampling) -> None:
    z = torch.stack([world(5, 3, seed=s) for s in (1, 2, 3)])
    together = adapt(any_learner, z, sampling)
    for b in range(3):
        alone = adapt(any_learner, z[b : b + 1], sampling, seeds=seeds_of(0, b, 1))
        assert torch.allclose(together[:, b : b + 1], alone, atol=1e-4)


def test_the_order_of_support_images_does_not_matter(any_learner: MetaDiff) -> None:
    z = world(5, 4, seed=1).unsqueeze(0)
    assert torch.allclose(adapt(any_learner, z), adapt(any_learner, z[:, :, [2, 0, 3, 1]]), atol=1e-4)


def test_images_side_by_side_are_those_of_even_classes(any_learner: MetaDiff) -> None:
    z = world(5, 4, seed=1)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    support = TaskSupport.of(z.flatten(0, 1)[order].unsqueeze(0), torch.arange(5).repeat_interleave(4)[order])
    ranks, seeds = torch.arange(5).unsqueeze(0), seeds_of(0, 0, 1)
    shuffled = adapt_tasks(any_learner, support, Sampling(), ranks=ranks, seeds=seeds).weights
    assert torch.allclose(shuffled, adapt(any_learner, z.unsqueeze(0)), atol=1e-4)


def test_an_image_more_changes_the_weight_of_its_class_alone(metadiff: MetaDiff) -> None:
    """But for what the classes share, which moves all of them a little."""
    metadiff = metadiff.tuned(replace(metadiff.tuning, shared=0.0))
    z, labels = world(3, 3, seed=1).flatten(0, 1)[:7].unsqueeze(0), torch.tensor([0, 0, 0, 1, 1, 1, 2])
    ranks, seeds, fixed = torch.arange(3).unsqueeze(0), seeds_of(0, 0, 1), Sampling(guidance=4.0)
    few, more = (
        adapt_tasks(metadiff, TaskSupport.of(z[:, rows], labels[rows]), fixed, ranks=ranks, seeds=seeds).weights[0, 0]
        for rows in ([0, 3, 4, 5, 6], list(range(7)))
    )
    assert torch.allclose(few[1:], more[1:], atol=1e-5) and not torch.allclose(few[0], more[0], atol=1e-2)


def test_it_is_better_than_the_prototype_in_its_own_world(metadiff: MetaDiff) -> None:
    right = {"ours": 0, "prototype": 0}
    for seed in range(100, 160):
        classes = world(5, 21, seed=seed)
        z, query = classes[:, :1].unsqueeze(0), classes[:, 1:].reshape(1, -1, SIZE)
        labels = torch.arange(5).repeat_interleave(20)
        right["ours"] += hits(classifier_of(metadiff, z).probabilities(query), labels)
        right["prototype"] += hits(cosine_logits(query, z.squeeze(2)), labels)
    assert right["ours"] > right["prototype"] + 60  # one percentage point of 6,000 queries


def test_a_huge_guidance_scale_is_the_prototype(metadiff: MetaDiff) -> None:
    z = world(5, 3, seed=1).unsqueeze(0)
    weights = adapt(metadiff, z, Sampling(guidance=1e9))
    assert torch.allclose(weights[0], z.mean(dim=2), atol=1e-3)


@pytest.mark.parametrize(("ways", "shots", "size"), [(2, 1, 16), (200, 1, 16), (3, 200, 16), (5, 2, 512)])
def test_sizes(ways: int, shots: int, size: int) -> None:
    g = torch.Generator().manual_seed(0)
    base = [torch.randn(8, size, generator=g) + 2 * torch.randn(1, size, generator=g) for _ in range(10)]
    metadiff = MetaDiff(fit_task_space(base), AnalyticDenoiser(), False, Tuning())
    weights = adapt(metadiff, torch.randn(1, ways, shots, size, generator=g))
    assert weights.shape == (1, 1, ways, size) and torch.isfinite(weights).all()


def test_unlabelled_images_help_and_are_symmetric(metadiff: MetaDiff) -> None:
    gain = 0
    for seed in range(200, 240):
        classes = world(5, 31, seed=seed)
        z, pool = classes[:, :1].unsqueeze(0), classes[:, 1:].reshape(1, -1, SIZE)
        labels = torch.arange(5).repeat_interleave(30)
        plain, guided = classifier_of(metadiff, z), classifier_of(metadiff, z, pool=pool)
        gain += hits(guided.probabilities(pool), labels) - hits(plain.probabilities(pool), labels)
        shuffled = adapt(metadiff, z, pool=pool[:, torch.randperm(150)])
        assert torch.allclose(shuffled, guided.weights, atol=1e-3)
    assert gain > 0


def test_an_empty_weight_of_the_pool_changes_nothing(metadiff: MetaDiff) -> None:
    z, pool = world(5, 2, seed=1).unsqueeze(0), world(5, 4, seed=2).reshape(1, -1, SIZE)
    same = adapt(metadiff, z, pool=pool, pool_guidance=PoolGuidance(weight=0.0))
    assert torch.allclose(same, adapt(metadiff, z), atol=1e-5)


def test_probabilities_are_averaged_over_samples(metadiff: MetaDiff) -> None:
    z, w = torch.randn(2, 7, SIZE), torch.randn(3, 2, 4, SIZE)
    together = TaskClassifier(metadiff.space, w, 4.0, 5.0).probabilities(z)
    assert together.shape == (2, 7, 4) and torch.allclose(together.sum(dim=-1), torch.ones(2, 7), atol=1e-5)
    single = [TaskClassifier(metadiff.space, w[m : m + 1], 4.0, 5.0).probabilities(z) for m in range(3)]
    assert torch.allclose(together, torch.stack(single).mean(dim=0), atol=1e-6)
