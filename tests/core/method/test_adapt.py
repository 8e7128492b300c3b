"""Adaptation as a whole: where it ends, what must not matter, and odd tasks."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from metadiff_cli.core.method import adapt
from metadiff_cli.core.method.adapt import (
    MetaDiff,
    Sampling,
    TaskClassifier,
    fitted_settings,
    ranks_of,
    seeds_of,
    trace_tasks,
)
from metadiff_cli.core.method.calibration import TaskTable
from metadiff_cli.core.method.denoisers import AnalyticDenoiser, UNetDenoiser, randomise
from metadiff_cli.core.method.guidance import FOREIGN, PoolGuidance, Usual
from metadiff_cli.core.method.metric import Metric, cosine_logits
from metadiff_cli.core.method.support import TaskSupport
from metadiff_cli.core.method.task_space import TaskSpace
from tests.tasks import METRICS, ONE, TWO, Slow, adapted, features, metric_of, settings_of, support_of, tuned

DRAWS = Sampling(samples=2, temperature=1.0)
SETTINGS = {"guidance": 4.0, "level": 0.3, "domain": 0.8, "scale": 4.0, "prior": 0.5}


@pytest.fixture
def nothing_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks keep the fitted hyper-parameters, whatever their support tells."""
    monkeypatch.setattr(adapt, "chosen_by", lambda held, fitted, **_: fitted)


def with_unet(metadiff: MetaDiff) -> MetaDiff:
    """With a U-Net of random weights."""
    assert metadiff.metric.space is not None
    return replace(metadiff, denoiser=randomise(UNetDenoiser(len(metadiff.metric.space.mean), 32), 0), learned=True)


KINDS: dict[str, Callable[[], MetaDiff]] = {
    **{name: lambda make=make: tuned(make(), **SETTINGS) for name, make in METRICS.items()},  # type: ignore[misc]
    "with a U-Net": lambda: with_unet(tuned(metric_of(TWO), **SETTINGS)),
}


@pytest.mark.usefixtures("nothing_chosen")
@pytest.mark.parametrize("counts", [(1, 1, 1), (3, 2, 30)])
@pytest.mark.parametrize("name", METRICS)
def test_many_steps_end_at_the_minimum_of_the_inner_loss(name: str, counts: Sequence[int]) -> None:
    metric, settings = METRICS[name](), settings_of(**SETTINGS)
    support = support_of(metric, counts)
    slow = Slow(metric, support, settings)
    best = slow.minimum()
    fall = float(slow.loss(slow.start) - slow.loss(best))
    gaps = []
    for steps in (1, 10, 100, 500):
        found = adapted(tuned(metric, **SETTINGS), support, Sampling(steps))
        gaps.append(float(slow.loss(found.weights[0, 0].double()) - slow.loss(best)) / fall)
    assert gaps[0] > gaps[1] > gaps[2] > gaps[3] >= 0 and gaps[1] < 0.5 and gaps[3] < 2e-3
    torch.testing.assert_close(found.weights[0, 0].double(), best, atol=1e-2, rtol=0)
    query = metric.expand(features(1, 5, 77, metric.groups))
    wanted = settings.temperature * slow.logits(best, query[0])
    temperature = float(found.settings.temperature) / float(settings.temperature)  # the choice for the task is kept
    torch.testing.assert_close(found.logits(query)[0].double(), temperature * wanted, atol=5e-2, rtol=0)


@pytest.mark.usefixtures("nothing_chosen")
@pytest.mark.parametrize("name", METRICS)
def test_one_step_is_one_step_of_descent_from_the_posterior_mean(name: str) -> None:
    """W_0 - (rho I + s^2/2 Phi'Phi)^-1 times the slope of F at W_0: written in W, where the package has the dual."""
    metric, settings = METRICS[name](), settings_of(**SETTINGS)
    support = support_of(metric, (1, 4, 2))
    slow = Slow(metric, support, settings)
    start = slow.start.clone().requires_grad_()
    (slope,) = torch.autograd.grad(slow.loss(start), start)
    bound = 0.5 * torch.eye(len(slow.phi.T)) + 8.0 * slow.phi.T @ slow.phi
    wanted = slow.start - slope @ torch.linalg.inv(bound)
    found = adapted(tuned(metric, **SETTINGS), support, Sampling(1)).weights[0, 0]
    torch.testing.assert_close(found.double(), wanted, atol=2e-3, rtol=0)


@pytest.mark.parametrize("steps", [10, 50])
def test_the_loss_falls_along_the_path(steps: int) -> None:
    """For 200 random tasks of all kinds. Of many steps, noisy weights may pull a late estimate back by a hundredth."""
    for name, counts in [(name, counts) for name in METRICS for counts in ((3, 3, 3, 3), (1, 6, 2))]:
        for scale, prior in ((3.0, 0.1), (8.0, 3.0)):
            metric = METRICS[name]()
            support = support_of(metric, counts, seed=7, tasks=10)
            metadiff = tuned(metric, **{**SETTINGS, "scale": scale, "prior": prior})
            path = [step for _, step in trace(metadiff, support, Sampling(steps))]
            losses = torch.stack([step.loss for step in path])  # (S, B)
            rises = losses.diff(dim=0).clamp_min(0).sum(dim=0)
            share = 0.0 if steps <= 10 else 0.01
            assert bool((rises <= share * (losses[0] - losses[-1]) + 2e-5).all())
            assert [step.index for step in path] == list(range(steps))


def trace(metadiff: MetaDiff, support: TaskSupport, sampling: Sampling) -> list[tuple[TaskClassifier, adapt.PathStep]]:
    ranks = torch.arange(support.ways).expand(len(support.x), -1)
    return list(trace_tasks(metadiff, support, sampling, ranks=ranks, seeds=seeds_of(0, 0, len(support.x))))


@pytest.mark.parametrize("sampling", [Sampling(5), replace(DRAWS, samples=1)])
@pytest.mark.parametrize("name", KINDS)
def test_the_path_ends_at_the_classifier_and_tells_its_loss(name: str, sampling: Sampling) -> None:
    metadiff = KINDS[name]()
    support = support_of(metadiff.metric, (2, 3, 1))
    path = trace(metadiff, support, sampling)
    final = adapted(metadiff, support, sampling)
    torch.testing.assert_close(path[-1][0].weights, final.weights)
    if metadiff.learned or sampling.temperature:
        return  # the start is not that of the closed form
    slow = Slow(metadiff.metric, support, final.settings)
    for classifier, step in path:
        assert torch.equal(classifier.weights[0], step.weights)
        torch.testing.assert_close(step.loss[0].double(), slow.loss(step.weights[0].double()), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("sampling", [Sampling(), DRAWS, replace(DRAWS, method="ddpm")])
@pytest.mark.parametrize("name", KINDS)
def test_permuting_classes_permutes_the_classifier(name: str, sampling: Sampling) -> None:
    metadiff = KINDS[name]()
    support, order = support_of(metadiff.metric, (2, 1, 4, 3)), torch.tensor([3, 1, 0, 2])
    place = torch.argsort(order)
    turned = adapted(metadiff, TaskSupport(support.x, place[support.labels]), sampling, ranks=order.unsqueeze(0))
    straight = adapted(metadiff, support, sampling)
    torch.testing.assert_close(turned.weights, straight.weights[:, :, order], atol=1e-3, rtol=0)
    torch.testing.assert_close(turned.settings.temperature, straight.settings.temperature)


@pytest.mark.parametrize("name", KINDS)
def test_the_order_of_images_does_not_matter(name: str) -> None:
    metadiff = KINDS[name]()
    support = support_of(metadiff.metric, (2, 1, 5, 3))
    turned = adapted(metadiff, support.take(torch.randperm(11, generator=torch.Generator().manual_seed(3))))
    torch.testing.assert_close(turned.weights, adapted(metadiff, support).weights, atol=1e-3, rtol=0)


@pytest.mark.parametrize("sampling", [Sampling(), DRAWS, replace(DRAWS, method="ddpm")])
@pytest.mark.parametrize("name", KINDS)
def test_a_batch_of_tasks_equals_single_tasks(name: str, sampling: Sampling) -> None:
    metadiff = KINDS[name]()
    support = support_of(metadiff.metric, (2, 1, 4, 3), tasks=3)
    pool = metadiff.metric.expand(features(3, 6, 55, metadiff.metric.groups))
    for more in (None, pool):
        together = adapted(metadiff, support, sampling, pool=more)
        for b in range(3):
            one = None if more is None else more[b : b + 1]
            alone = TaskSupport(support.x[b : b + 1], support.labels)
            single = adapted(metadiff, alone, sampling, seeds=seeds_of(0, b, 1), pool=one)
            torch.testing.assert_close(together.weights[:, b], single.weights[:, 0], atol=1e-3, rtol=0)
            torch.testing.assert_close(together.probabilities(pool)[b], single.probabilities(pool[b : b + 1])[0],
                                       atol=1e-3, rtol=0)  # fmt: skip


@pytest.mark.usefixtures("nothing_chosen")
@pytest.mark.parametrize("name", METRICS)
def test_without_descent_it_is_the_posterior_mean(name: str) -> None:
    metric = METRICS[name]()
    support, table = support_of(metric, (1, 4, 2)), TaskTable.constant(7.0)
    control = with_unet(tuned(metric, **SETTINGS)) if metric.space is not None else tuned(metric, **SETTINGS)
    control = control.without_descent(table)
    assert not control.learned and isinstance(control.denoiser, AnalyticDenoiser)
    assert control.tuning.temperature == table
    found = adapted(control, support, Sampling(10)).weights[0, 0].double()
    wanted = Slow(metric, support, settings_of(**SETTINGS)).start
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=0)


def test_a_huge_guidance_scale_starts_from_the_class_means() -> None:
    metric = metric_of(TWO)
    support = support_of(metric, (3, 1, 2))
    control = tuned(metric, **SETTINGS).without_descent(TaskTable.constant(1.0))
    found = adapted(control, support, Sampling(guidance=1e9))
    torch.testing.assert_close(found.weights[0], found.embed(support.means()), atol=1e-3, rtol=0)


@pytest.mark.usefixtures("nothing_chosen")
def test_an_image_more_changes_the_start_of_its_class_alone() -> None:
    """But for the domain, which is that of the base classes here."""
    metric = metric_of(TWO)
    control = tuned(metric, **{**SETTINGS, "domain": 0.0}).without_descent(TaskTable.constant(1.0))
    support, fixed = support_of(metric, (3, 2, 1)), Sampling(guidance=4.0)
    rows = torch.nonzero(support.labels != 0).flatten().tolist()
    first = torch.nonzero(support.labels == 0).flatten()[:2].tolist()
    few = adapted(control, support.take(sorted(rows + first)), fixed)
    more = adapted(control, support, fixed)
    torch.testing.assert_close(few.weights[0, 0, 1:], more.weights[0, 0, 1:], atol=1e-4, rtol=0)
    assert float((few.weights - more.weights)[0, 0, 0].abs().max()) > 1e-2


def test_it_is_better_than_the_prototype_in_its_own_world() -> None:
    """One image per class: the statistics of the base classes make the difference."""
    metric = metric_of(ONE)
    classes = torch.stack([features(5, 21, seed, ONE) for seed in range(100, 160)])
    z, query = classes[:, :, :1], classes[:, :, 1:].flatten(1, 2)
    labels = torch.arange(5).repeat_interleave(20)
    task = adapted(tuned(metric, **{**SETTINGS, "guidance": 1.0}), TaskSupport.even(metric.expand(z)))
    ours, prototype = (
        100 * float((logits.argmax(dim=-1) == labels).float().mean())
        for logits in (task.probabilities(metric.expand(query)), cosine_logits(query, z.squeeze(2)))
    )
    assert ours > prototype + 2


def test_the_descent_learns_what_class_means_leave_out() -> None:
    """Each class shows images of two kinds, and the class means say little: the cross-entropy of the support does."""
    g = torch.Generator().manual_seed(0)
    kinds = torch.tensor([[1.0, 0.0, 0.3], [-1.0, 0.0, 0.1], [0.0, 1.0, 0.0], [0.0, -1.0, 0.0]])
    labels = torch.tensor([0, 0, 1, 1]).repeat(6)
    z = kinds.repeat(6, 1) + 0.1 * torch.randn(20, 24, 3, generator=g)
    support, query = TaskSupport(z[:, :12], labels[:12]), z[:, 12:]
    metadiff = tuned(Metric((3,)), scale=8.0, prior=0.03, level=0.0)
    one, many, none = (
        float((adapted(m, support, Sampling(steps)).probabilities(query).argmax(dim=-1) == labels[12:]).float().mean())
        for m, steps in ((metadiff, 1), (metadiff, 50), (metadiff.without_descent(TaskTable.constant(1.0)), 50))
    )
    assert many > one > none


def spaced(size: int, seed: int = 0) -> Metric:
    """Whitened features alone, of a known prior: class means N(0, I), noise of variance 1 / lambda."""
    precision = torch.rand(size, generator=torch.Generator().manual_seed(seed)) + 0.2
    return Metric((size,), TaskSpace(torch.zeros(size), (torch.eye(size),), precision), plain=False)


@pytest.mark.parametrize("method", ["ddim", "ddpm"])
def test_draws_have_the_spread_of_the_posterior(method: str) -> None:
    """Against class weights drawn from the posterior itself. With 100 steps the spread is about 0.96 of it."""
    metric = spaced(8)
    assert metric.space is not None
    tasks, guidance = 800, 2.0
    support = TaskSupport.even(metric.expand(torch.randn(1, 2, 3, 8, generator=torch.Generator().manual_seed(5))))
    support = TaskSupport(support.x.expand(tasks, -1, -1), support.labels)
    metadiff = tuned(metric, guidance=guidance, domain=0.0, level=0.0).without_descent(TaskTable.constant(1.0))
    found = adapted(metadiff, support, Sampling(100, temperature=1.0, method=method))
    evidence = 3 * guidance * metric.space.precision
    mean = evidence / (1 + evidence) * (support.means()[0] / metric.space.precision.sqrt())
    noise = torch.randn(tasks, 2, 8, generator=torch.Generator().manual_seed(6)) * (1 + evidence).rsqrt()
    wanted = F.normalize((mean + noise) * metric.space.precision.sqrt(), dim=-1)
    torch.testing.assert_close(found.weights[0].mean(dim=0), wanted.mean(dim=0), atol=0.06, rtol=0)
    ratio = found.weights[0].std(dim=0) / wanted.std(dim=0)
    assert float(ratio.mean()) == pytest.approx(0.965, abs=0.05) and float((ratio - 1).abs().max()) < 0.2


def test_draws_differ_by_seed_and_by_sample_and_are_the_same_for_the_same_seed() -> None:
    metadiff = tuned(metric_of(TWO), **SETTINGS)
    support = support_of(metadiff.metric, (2, 3, 1))
    first, same, other = (adapted(metadiff, support, DRAWS, seeds=[seed]).weights for seed in (1, 1, 2))
    assert torch.equal(first, same)
    for a, b in ((first, other), (first[0], first[1])):
        assert float((a - b).abs().max()) > 0.05
    mean, again = (adapted(metadiff, support, replace(DRAWS, temperature=0.0), seeds=[seed]).weights for seed in (1, 2))
    assert torch.equal(mean, again) and torch.equal(mean[0], mean[1])


def test_without_base_classes_there_is_nothing_to_draw() -> None:
    metadiff = tuned(METRICS["two groups without base classes"](), **SETTINGS)
    support = support_of(metadiff.metric, (2, 3, 1))
    for sampling in (DRAWS, replace(DRAWS, method="ddpm", steps=100)):
        draws = adapted(metadiff, support, sampling, seeds=[4]).weights
        assert torch.equal(draws[0], draws[1])


@pytest.mark.parametrize("steps", [1, 10])
@pytest.mark.parametrize("name", KINDS)
def test_a_pool_has_its_effect_in_the_first_step_already(name: str, steps: int) -> None:
    metadiff = KINDS[name]()
    support = support_of(metadiff.metric, (1, 2, 1))
    pool = metadiff.metric.expand(features(3, 9, 1000, metadiff.metric.groups)).flatten(0, 1).unsqueeze(0)
    without, guided = (adapted(metadiff, support, Sampling(steps), pool=p).weights for p in (None, pool))
    assert float((guided - without).abs().max()) > 1e-2
    shuffled = pool[:, torch.randperm(27, generator=torch.Generator().manual_seed(1))]
    again = adapted(metadiff, support, Sampling(steps), pool=shuffled).weights
    torch.testing.assert_close(again, guided, atol=1e-3, rtol=0)
    nothing = metadiff.tuned(pool=PoolGuidance(weight=0.0))
    torch.testing.assert_close(
        adapted(nothing, support, Sampling(steps), pool=pool).weights, without, atol=1e-4, rtol=0
    )
    assert torch.equal(adapted(metadiff, support, Sampling(steps), pool=pool[:, :0]).weights, without)
    first, second = adapted(metadiff, support, Sampling(steps, samples=2), pool=pool).weights
    assert torch.equal(first, second)  # what the first sample found out about the pool is not carried over


@pytest.mark.parametrize("counts", [(57, 3, 0, 0, 0), (76, 1, 1, 1, 1), (285, 15, 0, 0, 0), (12, 12, 12, 12, 12)])
def test_a_pool_helps_whatever_its_proportions(counts: tuple[int, ...]) -> None:
    """Tasks of the model's own world: classes N(0, I), images around them with a known noise."""
    g, size, tasks = torch.Generator().manual_seed(sum(counts)), 32, 60
    noise = 1.6 + torch.rand(size, generator=g)
    metric = Metric((size,), TaskSpace(torch.zeros(size), (torch.eye(size),), noise**-2))
    metadiff = tuned(metric, domain=0.0, guidance=1.0, scale=5.0, prior=3.0, temperature=1.6)
    means = torch.randn(tasks, 5, size, generator=g)
    support = metric.expand(means.unsqueeze(2) + noise * torch.randn(tasks, 5, 1, size, generator=g))
    labels = torch.arange(5).repeat_interleave(torch.tensor(counts))
    query = metric.expand(means[:, labels] + noise * torch.randn(tasks, len(labels), size, generator=g))

    def accuracy(pool: Tensor | None) -> Tensor:
        found = adapted(metadiff, TaskSupport.even(support), pool=pool)
        return (found.probabilities(query).argmax(dim=-1) == labels).double().mean(dim=1)

    gain = accuracy(query) - accuracy(None)
    assert gain.mean() > 0 and gain.mean() > 1.96 * gain.std() / tasks**0.5


def finite(found: TaskClassifier, x: Tensor) -> Tensor:
    """The probabilities, which are such."""
    probabilities = found.probabilities(x)
    assert torch.isfinite(found.weights).all() and torch.isfinite(probabilities).all()
    torch.testing.assert_close(probabilities.sum(dim=-1), torch.ones(probabilities.shape[:2]), atol=1e-4, rtol=0)
    return probabilities


@pytest.mark.parametrize("counts", [[1, 1], [1, 30], [2] * 20, [1] * 50, list(range(1, 13)), [60, 3, 1]])
@pytest.mark.parametrize("name", KINDS)
def test_tasks_of_any_shape(name: str, counts: Sequence[int]) -> None:
    """Draws with a pool, too; support images go to their class, as it does not say so of many others."""
    metadiff = KINDS[name]()
    support = support_of(metadiff.metric, counts)
    for sampling in (Sampling(), Sampling(3, 2, 1.0, guidance=2.0)):
        found = adapted(metadiff, support, sampling, pool=support.x[:, :2])
        assert found.weights.shape == (sampling.samples, 1, len(counts), sum(metadiff.metric.parts))
        finite(found, support.x)
    if not metadiff.learned:
        own = adapted(metadiff, support, Sampling(30)).probabilities(support.x)[0].argmax(dim=-1)
        assert float((own == support.labels).float().mean()) > 0.8


ALIKE = {
    "all images the same": lambda x, labels: x[:, :1].expand_as(x),
    "one class of copies": lambda x, labels: torch.where((labels == 1).view(1, -1, 1), x[:, :1], x),
    "every class of copies": lambda x, labels: x[:, [labels.tolist().index(c) for c in labels.tolist()]],
    "images at the base mean": lambda x, labels: torch.zeros_like(x),
    "two classes of the same image": lambda x, labels: torch.where((labels < 2).view(1, -1, 1), x[:, :1], x),
    "images that hardly differ": lambda x, labels: x[:, :1] + 1e-5 * (x - x[:, :1]),
    "images that differ by rounding": lambda x, labels: x[:, :1] * (1 + 1e-7 * torch.randn(x.shape[1]).view(1, -1, 1)),
    "enormous features": lambda x, labels: 1e12 * x,
}


@pytest.mark.parametrize("domain", [0.5, 1.0])
@pytest.mark.parametrize("kind", ALIKE)
@pytest.mark.parametrize("name", ["two groups", "without base classes", "whitened alone"])
def test_images_that_do_not_differ(name: str, kind: str, domain: float) -> None:
    """With the largest scale and the smallest prior of the grid of the fit, which are the hardest to solve."""
    metric = METRICS[name]()
    support = support_of(metric, (4, 3, 1, 12))
    same = TaskSupport(ALIKE[kind](support.x, support.labels), support.labels)  # type: ignore[no-untyped-call]
    for scale, prior in ((10.0, 10.0), (5.0, 0.03)):
        metadiff = tuned(metric, **{**SETTINGS, "domain": domain, "scale": scale, "prior": prior})
        found = adapted(metadiff, same)
        probabilities = finite(found, torch.cat([support.x, same.x], dim=1))
        assert 1e-3 < float(found.settings.temperature) < 1e3
        if kind == "all images the same" and domain == 1.0:
            # nothing tells the classes apart, but that some have more images
            assert float(probabilities[0, -20:].std(dim=0).max()) < 1e-3


def test_settings_are_those_of_the_tables_and_of_what_was_asked_for() -> None:
    metric = metric_of(TWO)
    table = TaskTable((2, 8), (1, 4), ((1.0, 2.0), (3.0, 4.0)))
    metadiff = tuned(metric, **SETTINGS).tuned(guidance=table, scale=table)
    found = fitted_settings(metadiff, support_of(metric, (4, 4), tasks=3))
    assert found.guidance.tolist() == [2.0] * 3 and found.scale == 2.0 and found.level.shape == (3,)
    mean = fitted_settings(metadiff, support_of(metric, (1, 3)))  # the mean over the classes
    assert float(mean.guidance) == pytest.approx(1.5)
    asked = fitted_settings(metadiff, support_of(metric, (4, 4), tasks=3), guidance=9.0)
    assert asked.guidance.tolist() == [9.0] * 3


@pytest.mark.parametrize("shots", [1, 3])
def test_a_task_from_elsewhere_gives_up_the_prior_and_takes_its_own_domain(shots: int) -> None:
    """Far from the base classes the whole task lies elsewhere; its classes are what they were."""
    metric = metric_of(ONE)
    assert metric.space is not None
    table = TaskTable((5,), (1, 3), ((0.0, 0.0),))
    metadiff = tuned(metric, **{**SETTINGS, "domain": 0.5}).tuned(usual=Usual(table, 0.5))
    z = torch.stack([features(5, shots, seed, ONE) for seed in range(8)])
    home = fitted_settings(metadiff, TaskSupport.even(metric.expand(z)))
    away = fitted_settings(metadiff, TaskSupport.even(metric.expand(z + 3.0)))
    assert float(home.guidance.mean()) < 8 and away.guidance.tolist() == pytest.approx([FOREIGN] * 8)
    assert float(home.domain.mean()) < 0.8 and away.domain.tolist() == pytest.approx([1.0] * 8)
    asked = fitted_settings(metadiff, TaskSupport.even(metric.expand(z + 3.0)), guidance=2.0)
    assert asked.guidance.tolist() == [2.0] * 8 and asked.domain.tolist() == pytest.approx([1.0] * 8)
    without = replace(metadiff, metric=Metric(ONE))
    assert fitted_settings(without, TaskSupport.even(z + 3.0)).domain.tolist() == [0.5] * 8


def test_the_domain_is_between_that_of_the_base_classes_and_that_of_the_task() -> None:
    metric = metric_of(ONE)
    support = support_of(metric, (1, 3, 2))
    middle = support.x.mean(dim=1)[0]  # each image counts the same, whatever its class
    for share in (0.0, 0.5, 1.0):
        found = adapted(tuned(metric, **{**SETTINGS, "domain": share}), support).domain[0, 0]
        torch.testing.assert_close(found, (1 - share) * metric.origin + share * middle, atol=1e-4, rtol=1e-4)


def test_the_temperature_of_a_task_follows_its_own_images_where_there_are_some() -> None:
    """Clear classes are answered with confidence, confusing ones without; one image per class says nothing."""
    metric = metric_of(ONE)
    metadiff = tuned(metric, **SETTINGS, temperature=2.0)
    single = adapted(metadiff, support_of(metric, (1, 1, 1, 1), tasks=2))
    assert single.settings.temperature.tolist() == [2.0, 2.0]
    clear = support_of(metric, (5, 5, 5, 5), tasks=6)
    g = torch.Generator().manual_seed(0)
    confused = TaskSupport(clear.x, clear.labels[torch.randperm(20, generator=g)])
    sure, unsure = (adapted(metadiff, s).settings.temperature for s in (clear, confused))
    assert float(unsure.mean()) < 1.0 < float(sure.mean())


def test_probabilities_are_averaged_over_samples() -> None:
    metadiff = tuned(metric_of(TWO), **SETTINGS)
    support = support_of(metadiff.metric, (2, 2, 3), tasks=2)
    together = adapted(metadiff, support, replace(DRAWS, samples=3))
    x = support.x[:, :5]
    single = [replace(together, weights=together.weights[m : m + 1]).probabilities(x) for m in range(3)]
    torch.testing.assert_close(together.probabilities(x), torch.stack(single).mean(dim=0))
    torch.testing.assert_close(together.traceable(x), together.probabilities(x))


def test_logits_are_the_scale_times_the_temperature_times_the_joint_products() -> None:
    metadiff = tuned(metric_of(TWO), **SETTINGS)
    support = support_of(metadiff.metric, (2, 2, 3), tasks=2)
    found = adapted(metadiff, support)
    wanted = found.embed(support.x) @ found.weights[0].mT * 4.0 * found.settings.temperature.view(2, 1, 1)
    torch.testing.assert_close(found.logits(support.x), wanted, atol=1e-4, rtol=1e-4)


def test_a_learned_denoiser_serves_the_shots_that_it_was_trained_for() -> None:
    learned = replace(with_unet(tuned(metric_of(TWO), **SETTINGS)), most_shots=3)
    for counts, serves in (((3, 3), True), ((1, 5), True), ((4, 3), False)):
        support = support_of(learned.metric, counts)
        same = torch.allclose(
            adapted(learned, support).weights, adapted(learned.analytic(), support).weights, atol=1e-5
        )
        assert same is not serves


def test_tuned_changes_what_it_names() -> None:
    metadiff = tuned(metric_of(ONE), **SETTINGS)
    changed = metadiff.tuned(prior=TaskTable.constant(9.0))
    assert changed.tuning.prior.at(5, 1) == 9 and changed.tuning.scale == metadiff.tuning.scale
    assert changed.metric is metadiff.metric and metadiff.tuning.prior.at(5, 1) == 0.5


def test_ranks_and_seeds_belong_to_classes_and_tasks() -> None:
    assert ranks_of(np.array([[30, 10, 20], [5, 6, 4]])).tolist() == [[2, 0, 1], [1, 2, 0]]
    assert seeds_of(3, 2, 2) == seeds_of(3, 0, 4)[2:] and len(set(seeds_of(3, 0, 50) + seeds_of(4, 0, 50))) == 100


def test_a_class_of_many_images_does_not_win_by_their_number() -> None:
    """Were classes to weigh alike in the domain, the noise of their one image would cost the others dearly."""
    g = torch.Generator().manual_seed(0)
    own = torch.randn(20, 5, 1, 24, generator=g) + 1.5 * torch.randn(20, 5, 24, 24, generator=g)
    own = F.normalize(own + 3.0, dim=-1)  # all classes of a task have much in common
    labels = torch.tensor([0] * 9 + [1, 2, 3, 4])
    support = TaskSupport(torch.cat([own[:, 0, :9], own[:, 1:, 0]], dim=1), labels)
    probabilities = adapted(MetaDiff(Metric((24,))), support).probabilities(own[:, :, 9:].flatten(1, 2))
    predicted = probabilities.argmax(dim=-1)
    assert 0.1 < float((predicted == 0).float().mean()) < 0.3
    assert float((predicted == torch.arange(5).repeat_interleave(15)).float().mean()) > 0.62
