"""What guides a task: the choice of its metric, doubt in the statistics of the base classes, and a pool."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from metadiff_cli.core.method.calibration import TaskTable
from metadiff_cli.core.method.guidance import (
    FEW,
    FOREIGN,
    GUIDANCE_GRID,
    GUIDANCE_PENALTY,
    LEVEL_GRID,
    LEVEL_PENALTY,
    MOST_CHARGED,
    PROTOTYPE,
    Evidence,
    PoolGuidance,
    Usual,
    chosen_by,
    doubt_of,
    doubted_guidance,
    pool_evidence,
    shift_of,
)
from metadiff_cli.core.method.held_out import HeldOut
from metadiff_cli.core.method.metric import Metric
from metadiff_cli.core.method.support import SupportStats, TaskSupport
from metadiff_cli.core.method.task_space import TaskSpace
from tests.tasks import TWO, metric_of, settings_of, support_of

SIZE = 64
PRECISION = torch.linspace(0.1, 5.0, SIZE)
USUAL = Usual(TaskTable((5,), (1,), ((0.0,),)), 0.2)


def tasks(count: int, ways: int, shots: float, moved: Tensor | float = 0.0) -> SupportStats:
    """As the prior has them: class means N(0, 1), noise of variance 1 / lambda, all moved together."""
    g = torch.Generator().manual_seed(0)
    means = torch.randn(count, ways, SIZE, generator=g)
    noise = torch.randn(count, ways, SIZE, generator=g) * (shots * PRECISION).rsqrt()
    return SupportStats(means + noise + moved, torch.full((count, ways, 1), shots), PRECISION.view(1, 1, -1))


@pytest.mark.parametrize(("ways", "shots"), [(2, 1.0), (5, 5.0), (20, 1.0)])
def test_the_shift_of_tasks_from_the_prior_is_none(ways: int, shots: float) -> None:
    assert float(shift_of(tasks(500, ways, shots)).exp().mean()) == pytest.approx(1, abs=0.03)


def test_moved_tasks_have_a_shift_whatever_their_classes_are() -> None:
    """The distance of a task as a whole counts, not that of its classes from one another."""
    assert bool((shift_of(tasks(50, 5, 1.0, moved=2.0)) > shift_of(tasks(50, 5, 1.0)) + 0.5).all())
    wide = tasks(50, 4, 1.0)
    apart = torch.tensor([5.0, -5.0, 5.0, -5.0]).view(1, 4, 1)
    spread = SupportStats(wide.mean + apart, wide.count, wide.precision)
    assert torch.allclose(shift_of(spread), shift_of(wide), atol=1e-4)


def test_doubt_begins_beyond_what_is_usual_and_is_complete_soon_after() -> None:
    """Shifts of -1 to 3 standard deviations: one task each."""
    here = tasks(1, 5, 1.0)
    shift = float(shift_of(here))
    for deviations, wanted in ((-1, 0.0), (0, 0.0), (1, 0.0), (1.5, 0.5), (2, 1.0), (3, 1.0)):
        usual = Usual(TaskTable((5,), (1,), ((shift - 0.2 * deviations,),)), 0.2)
        assert float(doubt_of(here, usual)) == pytest.approx(wanted, abs=1e-3)
    by_task = doubt_of(tasks(3, 5, 1.0, moved=torch.tensor([0.0, 0.0, 3.0]).view(3, 1, 1)), USUAL)
    assert by_task.tolist() == [0, 0, 1]


def test_a_usual_shift_without_spread_is_refused() -> None:
    with pytest.raises(ValueError, match="deviation"):
        Usual(TaskTable.constant(0.0), 0.0)


def test_guidance_grows_with_the_doubt_from_home_to_foreign() -> None:
    found = doubted_guidance(torch.tensor([0.0, 0.3, 0.7, 1.0]), 2.0).tolist()
    assert found == sorted(found) and found[0] == pytest.approx(2) and found[-1] == pytest.approx(FOREIGN)
    assert 2 < found[1] < found[2] < FOREIGN


def test_a_home_beyond_foreign_stays() -> None:
    assert float(doubted_guidance(torch.ones(1), 64.0)) == pytest.approx(64)
    stays = float(doubted_guidance(torch.ones(1), PROTOTYPE))
    assert stays == pytest.approx(PROTOTYPE) and stays <= PROTOTYPE  # exp(log(a)) is more than a in fp32


def flat_metric(whitened: Tensor) -> Metric:
    """Two groups of 8 numbers, whose whitened form takes each number times one of `whitened` (16,)."""
    space = TaskSpace(torch.zeros(16), (whitened[:8].diag(), whitened[8:].diag()), torch.ones(16))
    return Metric((8, 8), space)


def made_up(metric: Metric, informative: slice, seed: int = 0, tasks: int = 12) -> TaskSupport:
    """Tasks of 4 classes of 4 images that differ in some numbers; the others are noise, and larger."""
    g = torch.Generator().manual_seed(seed)
    z = 3 * torch.randn(tasks, 4, 4, 16, generator=g)
    z[..., informative] = 0.3 * torch.randn(tasks, 4, 4, 16, generator=g)[..., informative]
    z[..., informative] += torch.randn(tasks, 4, 1, 16, generator=g)[..., informative]
    return TaskSupport.even(metric.expand(z))


def test_the_level_goes_to_the_features_that_tell_the_classes_apart() -> None:
    metric = flat_metric(torch.ones(16))
    settings = settings_of(12, level=0.35)
    last = chosen_by(HeldOut(metric, made_up(metric, slice(0, 8))), settings)
    below = chosen_by(HeldOut(metric, made_up(metric, slice(8, 16))), settings)
    assert float(last.level.mean()) < 0.15 and float(below.level.mean()) > 0.55
    assert set(below.level.tolist()) <= {float(torch.tensor(w)) for w in (0.35, *LEVEL_GRID)}


def test_the_guidance_gives_up_a_prior_that_is_wrong_and_keeps_one_that_is_right() -> None:
    """The whitened form stretches some numbers: those that tell the classes apart, or the noise."""
    stretched = torch.cat([torch.full((4,), 30.0), torch.full((4,), 0.03)]).repeat(2)
    metric = flat_metric(stretched)
    good, bad = torch.zeros(16, dtype=torch.bool), torch.zeros(16, dtype=torch.bool)
    good[[0, 1, 2, 3, 8, 9, 10, 11]], bad[[4, 5, 6, 7, 12, 13, 14, 15]] = True, True
    settings = settings_of(12, guidance=4.0, level=0.35, domain=1.0)
    found = {}
    for name, informative in (("right", good), ("wrong", bad)):
        g = torch.Generator().manual_seed(0)
        z = torch.randn(12, 4, 4, 16, generator=g)
        z[..., informative] = 0.3 * z[..., informative] + torch.randn(12, 4, 1, 8, generator=g)
        found[name] = chosen_by(HeldOut(metric, TaskSupport.even(metric.expand(z))), settings).guidance
    assert float(found["wrong"].log().mean()) > float(found["right"].log().mean()) + 2
    assert set(found["wrong"].tolist()) <= {4.0, *GUIDANCE_GRID}


@pytest.mark.parametrize("fitted", [(2.0, 0.15), (64.0, 0.6), (PROTOTYPE, 0.0)])
def test_what_the_support_does_not_tell_is_as_it_was_fitted(fitted: tuple[float, float]) -> None:
    """Images that are all the same: every choice is as good, and those away from the fitted ones are charged."""
    metric = metric_of(TWO)
    x = support_of(metric, (1, 1)).x[:, :1].expand(3, 9, -1)
    settings = settings_of(3, guidance=fitted[0], level=fitted[1])
    chosen = chosen_by(HeldOut(metric, TaskSupport(x, torch.arange(9) % 3)), settings)
    torch.testing.assert_close(chosen.guidance, settings.guidance)
    torch.testing.assert_close(chosen.level, settings.level)


def test_the_choice_has_the_lowest_loss_with_its_charge() -> None:
    """By trying every candidate, for each task on its own."""
    metric, settings = metric_of(TWO), settings_of(6, guidance=4.0, level=0.2)
    held = HeldOut(metric, support_of(metric, (3, 2, 4, 3), tasks=6))
    chosen = chosen_by(held, settings)

    def costs(name: str, values: tuple[float, ...], start: object, charge: object) -> Tensor:
        settings = {name: [torch.full((6,), v) for v in values]}[name]
        return torch.stack([held.loss(replace(start, **{name: v})) + charge(float(v[0])) for v in settings])  # type: ignore[type-var, operator]

    levels = (0.2, *LEVEL_GRID)
    best = costs("level", levels, settings, lambda w: LEVEL_PENALTY * abs(w - 0.2)).argmin(dim=0)
    assert chosen.level.tolist() == pytest.approx([levels[i] for i in best])
    scales = (4.0, *GUIDANCE_GRID)
    distance = {1.0: 1.0, 4.0: 0.0, 16.0: 1.0, PROTOTYPE: MOST_CHARGED}
    found = costs("guidance", scales, replace(settings, level=chosen.level), lambda a: GUIDANCE_PENALTY * distance[a])
    assert chosen.guidance.tolist() == pytest.approx([scales[i] for i in found.argmin(dim=0)])


def test_a_guidance_that_was_asked_for_stays_and_the_level_is_chosen() -> None:
    metric = flat_metric(torch.ones(16))
    settings = settings_of(12, guidance=3.0, level=0.35)
    held = HeldOut(metric, made_up(metric, slice(8, 16)))
    chosen = chosen_by(held, settings, keep_guidance=True)
    assert chosen.guidance is settings.guidance and float(chosen.level.mean()) > 0.55


@pytest.mark.parametrize("metric", [Metric((16,)), metric_of(TWO, plain=False)])
def test_nothing_is_chosen_that_a_metric_does_not_have(metric: Metric) -> None:
    settings = settings_of(2)
    chosen = chosen_by(HeldOut(metric, support_of(metric, (2, 2), tasks=2)), settings)
    assert chosen.guidance is settings.guidance and chosen.level is settings.level


def evidence() -> Evidence:
    """Two tasks of 3 classes, of 2, 1 and 4 images."""
    g = torch.Generator().manual_seed(0)
    return Evidence(torch.randn(2, 3, 5, generator=g), torch.tensor([2.0, 1.0, 4.0]).view(1, 3, 1))


def test_the_evidence_of_a_pool_is_a_weighted_mean_with_counts_that_add_up() -> None:
    pool = torch.randn(2, 30, 5, generator=torch.Generator().manual_seed(1))
    logits = torch.randn(2, 30, 3, generator=torch.Generator().manual_seed(2))
    before, how = evidence(), PoolGuidance(weight=0.4)
    after = pool_evidence(before, pool, how)(logits)
    torch.testing.assert_close(after.count.sum(dim=1), torch.full((2, 1), 7 + 0.4 * 30))  # each image counts 0.4 in all
    total = (after.count * after.means).sum(dim=1)
    torch.testing.assert_close(total, (before.count * before.means).sum(dim=1) + 0.4 * pool.sum(dim=1))


def test_images_that_are_sure_of_their_class_join_it_alone() -> None:
    pool = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 0, 1, 0, 2, 0])
    sure = 1000.0 * torch.nn.functional.one_hot(labels, 3).float().expand(2, -1, -1)
    before = evidence()
    after = pool_evidence(before, pool, PoolGuidance(weight=1.0))(sure)
    assert torch.allclose(after.count[0].flatten(), torch.tensor([6.0, 2.0, 5.0]))
    wanted = (2 * before.means[:, 0] + pool[:, labels == 0].sum(dim=1)) / 6
    torch.testing.assert_close(after.means[:, 0], wanted)


@pytest.mark.parametrize("images", [400, 8])
def test_the_proportions_of_a_pool_are_found_and_smoothed(images: int) -> None:
    """An image of no clear class is shared out by the proportions; those of a small pool are nearly even."""
    labels = torch.arange(images) % 8 == 0  # one in eight is of class 1
    logits = 20.0 * torch.stack([~labels, labels], dim=1).float()
    logits[0] = 0.0
    pool = torch.zeros(1, images, 3)
    pool[0, 0] = 1.0  # a mark: how much of the unclear image a class takes
    before = Evidence(torch.zeros(1, 2, 3), torch.ones(1, 1, 1))
    how = PoolGuidance(weight=1.0, smoothing=8.0)
    after = pool_evidence(before, pool, how)(logits.unsqueeze(0))
    smoothing = 8.0 * (1 + FEW * 2 / images)
    first = (smoothing + int((~labels).sum())) / (2 * smoothing + images - 1)  # where the proportions settle
    taken = (after.means * after.count)[0, :, 0].tolist()
    assert taken == pytest.approx([first, 1 - first], abs=1e-3)
    assert abs(taken[0] - 0.875) < 0.02 if images == 400 else taken[0] < 0.62


def test_a_pool_that_counts_nothing_leaves_the_evidence() -> None:
    before = evidence()
    after = pool_evidence(before, torch.randn(2, 7, 5), PoolGuidance(weight=0.0))(torch.randn(2, 7, 3))
    torch.testing.assert_close(after.means, before.means)
    torch.testing.assert_close(after.count, before.count.expand(2, -1, -1))
