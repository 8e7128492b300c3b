"""The fit of all hyper-parameters and controls on made-up validation domains."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from metadiff_cli.core.encoders.bank import FeatureBank
from metadiff_cli.core.evaluation.controls import ANALYTIC, CONTROLS
from metadiff_cli.core.evaluation.evaluate import Protocol, evaluate, method_of, run_through
from metadiff_cli.core.method.adapt import MetaDiff, Sampling
from metadiff_cli.core.method.calibration import TaskTable, calibration_error
from metadiff_cli.core.method.denoisers import UNetDenoiser, randomise
from metadiff_cli.core.method.guidance import GUIDANCE_GRID, LEVEL_GRID
from metadiff_cli.core.method.metric import Metric
from metadiff_cli.core.method.rejection import RATE
from metadiff_cli.core.method.task_space import TaskSpace, class_statistics
from metadiff_cli.core.training import fit, validation
from metadiff_cli.core.training.fit import (
    DESCENT_GRID,
    DOMAIN_GRID,
    SHRINKAGE,
    START,
    choose_shrinkage,
    fit_confidences,
    fit_tuning,
    paired_gain,
)
from metadiff_cli.core.training.validation import ValidationTasks
from metadiff_cli.errors import DataError
from tests.tasks import METRICS, ONE, TWO, bank_of, features, metric_of, tuned
from tests.worlds import CPU


@pytest.fixture(autouse=True)
def few_episodes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("EPISODES", 30), ("CHECKED", 8), ("FEWEST", 6)):
        monkeypatch.setattr(validation, name, value)


@pytest.fixture
def five_shot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hyper-parameters for 5-way 1-shot and 5-shot alone, on more episodes, and no controls."""
    for name, value in (("EPISODES", 100), ("CHECKED", 60), ("WAYS", (5,)), ("SHOTS", (1, 5))):
        monkeypatch.setattr(validation, name, value)
    monkeypatch.setattr(fit, "fit_controls", lambda metadiff, pairs: {})


def banks(groups: tuple[int, ...] = TWO, classes: int = 8, images: int = 8) -> list[FeatureBank]:
    """Two domains: one from the world of the base classes, and one that lies elsewhere."""
    away = features(classes, images, 21, groups) + 0.3
    return [bank_of(features(classes, images, 20, groups)), bank_of(away)]


def uneven(counts: Sequence[int], seed: int = 0) -> FeatureBank:
    """Classes of these numbers of images."""
    z = features(len(counts), max(counts), seed, TWO)
    rows = torch.cat([z[c, :count] for c, count in enumerate(counts)])
    return FeatureBank(rows.numpy(), np.repeat(np.arange(len(counts)), counts), tuple(map(str, range(len(counts)))))


def pairs_of(*domains: FeatureBank) -> ValidationTasks:
    return ValidationTasks(metric_of(TWO), domains, CPU, 0)


@pytest.mark.parametrize("name", METRICS)
def test_everything_is_fitted_for_the_ways_and_shots_that_the_images_allow(name: str) -> None:
    metric = METRICS[name]()
    targets = None if metric.space is None else features(9, 2, 5, metric.groups).mean(dim=1)
    notes: list[str] = []
    tuning, controls = fit_tuning(
        replace(MetaDiff(metric), targets=targets), banks(metric.groups), CPU, seed=0, note=notes.append
    )
    grid = [(5, 1), (5, 2), (5, 5)]  # eight classes of eight images, of which queries take one or more
    for table in [getattr(tuning, field) for field in START]:
        assert table.ways == (5,) and table.shots == (1, 2, 5)
        assert all(math.isfinite(value) for row in table.values for value in row)
    assert set(controls) == {*CONTROLS, ANALYTIC}
    for settings in controls.values():
        assert [(s.way, s.shot) for s in settings] == grid
        assert all(0 < s.temperature < 1e4 for s in settings)
    assert (tuning.usual is None) == (metric.space is None or not metric.plain)
    assert tuning.rejection is not None and tuning.rejection.rate == RATE
    assert tuning.rejection.offsets.ways == (2, 3, 5) and tuning.rejection.offsets.shots == (1, 2, 5)
    for way, shot in grid:
        said = [note for note in notes if note.startswith(f"{way}-way {shot}-shot: ")]
        assert said and "over the class mean" in said[-1]
        assert (tuning.scale.at(way, shot), tuning.prior.at(way, shot)) in {*DESCENT_GRID, (5.0, 1.0), (1.0, 1e6)}
        for field, values in (("domain", DOMAIN_GRID), ("level", (*LEVEL_GRID, 0.2)), ("guidance", GUIDANCE_GRID)):
            found = getattr(tuning, field).at(way, shot)
            assert any(found == pytest.approx(value) for value in values)


@pytest.mark.usefixtures("five_shot")
def test_the_same_seed_gives_the_same_fit_and_another_one_other_episodes() -> None:
    found = [fit_tuning(MetaDiff(metric_of(ONE)), banks(ONE), CPU, seed=seed) for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]


def world(informative: Sequence[int], seed: int = 0, signal: float = 1.0) -> FeatureBank:
    """10 classes of 12 images that differ in some of 24 numbers; the others are noise."""
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(10, 12, 24, generator=g)
    rows = list(informative)
    z[..., rows] = 0.5 * z[..., rows] + signal * torch.randn(10, 1, len(rows), generator=g)
    return bank_of(z)


@pytest.mark.usefixtures("five_shot")
def test_the_level_goes_to_the_layers_that_help() -> None:
    metric = metric_of(TWO, base=False)
    for rows, low, high in ((range(16), 0.0, 0.2), (range(16, 24), 0.5, 0.7)):
        tuning, _ = fit_tuning(MetaDiff(metric), [world(rows), world(rows, seed=1)], CPU, seed=0)
        assert low <= tuning.level.at(5, 5) <= high


@pytest.mark.usefixtures("five_shot")
def test_the_guidance_follows_the_base_classes_where_these_are_right() -> None:
    """The whitened form stretches the numbers that tell classes apart, or those that do not."""
    found = {}
    for name, rows in (("right", range(12)), ("wrong", range(12, 24))):
        stretch = torch.cat([torch.full((12,), 5.0), torch.full((12,), 0.2)])
        metric = Metric((24,), TaskSpace(torch.zeros(24), (stretch.diag(),), torch.ones(24)))
        domains = [world(rows, signal=0.5), world(rows, seed=1, signal=0.5)]
        found[name], _ = fit_tuning(MetaDiff(metric), domains, CPU, seed=0)
    assert found["wrong"].guidance.at(5, 5) > 10 * found["right"].guidance.at(5, 5)


def test_a_domain_that_loses_counts_more() -> None:
    """A candidate is worth its mean gain, and three times what a domain loses beyond a little."""
    search = fit._Search(metric_of(TWO), pairs_of(*banks()).tasks(5, 1))

    def score(*gains: float) -> float:
        search.gains = lambda settings: torch.tensor(gains)  # type: ignore[method-assign]
        return search.score(search.settings)

    assert score(1.0, 1.0) == pytest.approx(1.0) and score(2.2, -0.2) == pytest.approx(1.0)
    assert score(3.2, -1.2) == pytest.approx(1.0 - 3 * 1.0 / 2)


def test_no_candidate_of_the_search_is_clearly_better_than_what_was_chosen() -> None:
    search = fit._Search(metric_of(TWO), pairs_of(*banks()).tasks(5, 2))
    before = search.score(search.settings)
    search.run(lambda text: None)
    assert search.score(search.settings) >= before
    last = [search._changed("scale", value) for value in DESCENT_GRID]  # what is settled last
    assert max(search.score(candidate) for candidate in last) <= search.score(search.settings) + fit.BETTER


def test_episodes_are_the_same_whenever_asked_and_queries_are_no_support() -> None:
    pairs = pairs_of(*banks())
    first, again = (pairs.tasks(5, 2)[0] for _ in range(2))
    assert torch.equal(first.support.x, again.support.x) and torch.equal(first.query, again.query)
    for rows, queries in zip(first.episodes.support, first.episodes.query, strict=True):
        assert not set(rows.flatten().tolist()) & set(queries.tolist())
    x, q, labels = first.plain()
    metric = metric_of(TWO)
    torch.testing.assert_close(metric.expand(x).flatten(1, 2), first.support.x, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(metric.expand(q), first.query, atol=1e-4, rtol=1e-4)
    assert torch.equal(labels, first.labels) and len(x) == len(first.query)


def test_a_candidate_is_scored_by_classifiers_of_the_support_alone() -> None:
    """Whatever a query looks like, the logits of the others stay."""
    task = pairs_of(*banks()).tasks(5, 2)[0]
    search = fit._Search(metric_of(TWO), [task])
    logits = search._logits(search.held[0], search.settings)
    changed = task.query.clone()
    changed[:, 0] = 0.5
    other = fit._Search(metric_of(TWO), [replace(task, query=changed)])
    torch.testing.assert_close(other._logits(other.held[0], other.settings)[:, 1:], logits[:, 1:], atol=1e-3, rtol=0)


@pytest.mark.parametrize(("domains", "ways", "shots"), [
    ([uneven([9] * 12)], [5, 10], [1, 2, 5]),
    ([uneven([30] * 25)], [5, 10, 20], [1, 2, 5, 10]),
    ([uneven([4] * 3)], [3], [1, 2]),
    ([uneven([2, 2])], [2], [1]),
    ([uneven([2] * 20), uneven([12] * 6)], None, None),
    ([uneven([1] * 20), uneven([12] * 6)], None, None),
    ([uneven([3, 1, 1, 1, 1, 7]), uneven([5] * 5)], None, None),
])  # fmt: skip
def test_few_images_lower_ways_and_shots(
    domains: list[FeatureBank], ways: list[int] | None, shots: list[int] | None
) -> None:
    """And every combination has episodes of one domain or more, with a query of each class."""
    pairs = pairs_of(*domains)
    if ways is not None:
        assert (pairs.ways, pairs.shots) == (ways, shots)
    assert list(pairs)
    for way, shot in [*pairs, *((2, shot) for shot in pairs.shots)]:
        tasks = pairs.tasks(way, shot)
        assert tasks
        for task in tasks:
            assert task.support.ways == way and task.support.shots == shot
            assert set(task.labels.tolist()) == set(range(way))


@pytest.mark.parametrize("domains", [
    [uneven([5])],
    [uneven([5]), uneven([9])],
    [uneven([1] * 9)],
    [uneven([5, 1])],
], ids=["one class", "one class in each domain", "one image per class", "one class of two images"])  # fmt: skip
def test_what_no_fit_can_be_made_of_is_refused_with_the_next_step(domains: list[FeatureBank]) -> None:
    with pytest.raises(DataError, match="two validation classes of two images") as caught:
        fit_tuning(MetaDiff(metric_of(TWO)), domains, CPU, seed=0)
    assert caught.value.hint


@pytest.mark.parametrize("domains", [[uneven([2, 2])], [uneven([2] * 20), uneven([12] * 6)]])
def test_the_smallest_domains_are_fitted_on(domains: list[FeatureBank]) -> None:
    tuning, controls = fit_tuning(MetaDiff(metric_of(TWO)), domains, CPU, seed=0)
    assert 1e-3 <= tuning.temperature.at(2, 1) <= 1e3 and 0.1 <= tuning.correction.at(2, 1) <= 10
    assert all(controls.values())


def measured(metadiff: MetaDiff, shot: int) -> tuple[Tensor, Tensor]:
    """Confidence and correctness on classes that are hard to tell apart."""
    bank, protocol = world(range(24), seed=5, signal=0.4), Protocol(5, shot, 5, 60, seed=5)
    scores = run_through(evaluate(bank, {"m": method_of(metadiff, bank, Sampling(), protocol, CPU)}, protocol, CPU))
    return torch.cat(scores["m"].confidence), torch.cat(scores["m"].correct)


@pytest.mark.usefixtures("five_shot")
def test_confidences_hold_on_other_classes_after_the_fit() -> None:
    metadiff = MetaDiff(metric_of(ONE))
    validation = [world(range(24), seed, signal=0.4) for seed in (0, 1)]
    fitted = replace(metadiff, tuning=fit_tuning(metadiff, validation, CPU, seed=0)[0])
    assert calibration_error(*measured(fitted, 1)) < 6 and calibration_error(*measured(fitted, 5)) < 6
    wrong = fitted.tuned(temperature=TaskTable.constant(fitted.tuning.temperature.at(5, 1) / 6))
    assert calibration_error(*measured(wrong, 1)) > 15  # with five images each, a task mends much of that itself


def test_confidences_are_fitted_anew_for_another_denoiser_and_nothing_else_is() -> None:
    metadiff = tuned(metric_of(ONE), temperature=30.0)
    found = fit_confidences(metadiff, banks(ONE), CPU, seed=0)
    assert found.correction.at(5, 1) < 20 / 30 and found.rejection is not None
    unchanged = replace(found, correction=metadiff.tuning.correction, rejection=None)
    assert unchanged == replace(metadiff.tuning, rejection=None)


def base(whitened: Callable[[Tensor, torch.Generator], Tensor]) -> list[Tensor]:
    """30 base classes whose means differ everywhere, with noise as given."""
    g = torch.Generator().manual_seed(9)
    means = torch.randn(30, 1, 24, generator=g)
    return list(means + whitened(torch.randn(30, 20, 24, generator=g), g))


def test_the_noise_of_the_base_classes_is_trusted_as_far_as_it_serves_others() -> None:
    """The noise of new classes is that of the base classes, or the other way round."""
    spread = torch.cat([torch.full((12,), 2.0), torch.full((12,), 0.2)])
    statistics = class_statistics(base(lambda z, g: z * spread))
    chosen = {}
    for name, scale in (("same", spread), ("other", spread.flip(0))):
        g = torch.Generator().manual_seed(3)
        domains = [bank_of(torch.randn(10, 1, 24, generator=g) + torch.randn(10, 12, 24, generator=g) * scale)
                   for _ in range(2)]  # fmt: skip
        notes: list[str] = []
        chosen[name] = choose_shrinkage(statistics, domains, CPU, seed=0, note=notes.append)
        scores = [float(note.rsplit(" ", 1)[1]) for note in notes]
        assert len(scores) == len(SHRINKAGE) and chosen[name] == SHRINKAGE[int(np.argmax(scores))]
    assert chosen["same"][0] < chosen["other"][0]


def test_the_gain_of_a_learned_denoiser_is_paired_and_the_mean_over_domains() -> None:
    metadiff, protocol = tuned(metric_of(ONE), guidance=1.0), Protocol(5, 1, 4, 40)
    domains = banks(ONE)
    assert paired_gain(metadiff, domains, protocol, CPU) == (0.0, 0.0)  # the same twice
    random = replace(metadiff, denoiser=randomise(UNetDenoiser(24, 32), seed=0), learned=True)
    gain, half = paired_gain(random, domains, protocol, CPU)
    each = [paired_gain(random, [domain], protocol, CPU) for domain in domains]
    assert gain == pytest.approx(sum(g for g, _ in each) / 2) and gain < 0
    assert half == pytest.approx(math.hypot(*(h for _, h in each)) / 2) and half > 0


def test_the_gain_is_measured_on_as_much_as_a_domain_has() -> None:
    metadiff = tuned(metric_of(TWO))
    small = [uneven([2, 2, 2]), uneven([3, 9, 9, 9, 9, 9])]
    assert paired_gain(metadiff, small, Protocol(5, 5, 4, 5), CPU) == (0.0, 0.0)


def test_few_numbers_in_memory_mean_few_episodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "NUMBERS", 40_000)
    task = pairs_of(*banks()).tasks(5, 2)[0]
    assert len(task.query) >= 1 and task.query.numel() + task.support.x.numel() <= 40_000
    assert F.one_hot(task.labels).sum(dim=0).min() >= 1
