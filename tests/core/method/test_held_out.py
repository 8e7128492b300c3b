"""Held-out logits against classifiers that are made anew, slowly and from scratch, without the images left out."""

from collections.abc import Sequence

import pytest
import torch

from metadiff_cli.core.method import held_out
from metadiff_cli.core.method.held_out import FEW_FOLDS, FOLDS, MANY, Folds, HeldOut, holdable
from metadiff_cli.core.method.support import TaskSupport
from tests.tasks import METRICS, Slow, adapted, metric_of, settings_of, support_of, tuned

COUNTS = [(3, 3), (1, 2, 5, 3), (7, 1, 2)]


@pytest.fixture
def to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The descent of each fold goes on until nothing changes."""
    monkeypatch.setattr(held_out, "STEPS", 1000)


@pytest.mark.usefixtures("to_the_end")
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("name", METRICS)
def test_they_are_those_of_a_classifier_made_without_the_image(name: str, counts: Sequence[int]) -> None:
    """Two tasks at once, each with hyper-parameters of its own; the left-out image leaves the domain as well."""
    metric = METRICS[name]()
    support = support_of(metric, counts, tasks=2)
    settings = settings_of(2, guidance=torch.tensor([1.0, 8.0]), domain=torch.tensor([0.5, 1.0]))
    folds = Folds.of(support.labels)
    found = HeldOut(metric, support, folds).logits(settings)
    for f in range(len(folds.keep)):
        out = folds.fold == f
        kept = torch.nonzero(~out).flatten()
        for b in range(2):
            rest = TaskSupport(support.x[b : b + 1, kept], support.labels[kept])
            slow = Slow(metric, rest, settings.of(b))
            wanted = slow.logits(slow.minimum(), support.x[b, out])
            torch.testing.assert_close(found[b, out].double(), wanted, atol=3e-3, rtol=0)
    assert bool((found[:, ~folds.left_out] == 0).all())


@pytest.mark.usefixtures("to_the_end")
def test_queries_are_held_out_of_the_support_alone() -> None:
    """As the fit has it: one fold, whose classifier is that of the support."""
    metric, settings = metric_of(), settings_of()
    support, queries = support_of(metric, (3, 1, 4)), support_of(metric, (2, 2, 2), seed=8)
    both = TaskSupport(torch.cat([support.x, queries.x], dim=1), torch.cat([support.labels, queries.labels]))
    query = torch.arange(14) >= 8
    found = HeldOut(metric, both, Folds.apart(query)).logits(settings)[0, query]
    slow = Slow(metric, support, settings)
    torch.testing.assert_close(found.double(), slow.logits(slow.minimum(), queries.x[0]), atol=3e-3, rtol=0)


def test_a_fold_depends_on_none_of_the_images_that_it_leaves_out() -> None:
    """Whatever such an image looks like, the logits of the others in its fold stay."""
    metric, settings = metric_of(), settings_of(domain=1.0)
    support = support_of(metric, (4, 4, 4))
    folds = Folds.of(support.labels)
    before = HeldOut(metric, support, folds).logits(settings)
    first, *others = torch.nonzero(folds.fold == 0).flatten().tolist()
    moved = support.x.clone()
    moved[:, first] = metric.expand(torch.full((24,), 0.3))
    after = HeldOut(metric, TaskSupport(moved, support.labels), folds).logits(settings)
    torch.testing.assert_close(after[:, others], before[:, others], atol=1e-3, rtol=0)
    assert float((after - before)[:, folds.fold == 1].abs().max()) > 0.1


@pytest.mark.parametrize("counts", [(3, 3, 3), (1, 6, 2, 9)])
def test_which_images_are_left_out_together_follows_from_the_images_alone(counts: Sequence[int]) -> None:
    metric, settings = metric_of(), settings_of(3)
    support = support_of(metric, counts, tasks=3)
    whole = HeldOut(metric, support).logits(settings)
    order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(
        HeldOut(metric, support.take(order)).logits(settings), whole[:, order], atol=1e-3, rtol=0
    )
    for b in range(3):  # and neither from the other tasks
        alone = HeldOut(metric, TaskSupport(support.x[b : b + 1], support.labels)).logits(settings.of(b))
        torch.testing.assert_close(alone[0], whole[b], atol=1e-3, rtol=0)
    classes = torch.randperm(len(counts), generator=torch.Generator().manual_seed(6))
    turned = HeldOut(metric, TaskSupport(support.x, classes[support.labels])).logits(settings)
    torch.testing.assert_close(turned[:, :, classes], whole, atol=1e-3, rtol=0)


@pytest.mark.parametrize("at_once", [1, 500, 10**9])
def test_folds_in_any_portions_give_the_same(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    metric, settings = metric_of(), settings_of(3)
    support = support_of(metric, (5, 2, 4), tasks=3)
    whole = HeldOut(metric, support).logits(settings)
    monkeypatch.setattr(held_out, "AT_ONCE", at_once)
    torch.testing.assert_close(HeldOut(metric, support).logits(settings), whole, atol=1e-4, rtol=0)


def test_tasks_may_share_hyper_parameters() -> None:
    """As the fit has it: one number for all, not one for each."""
    for name in METRICS:
        metric = METRICS[name]()
        held = HeldOut(metric, support_of(metric, (3, 2), tasks=4))
        torch.testing.assert_close(held.logits(settings_of(1)), held.logits(settings_of(4)), atol=1e-4, rtol=0)


def test_what_is_kept_from_one_call_is_not_taken_for_another() -> None:
    """A choice goes through many hyper-parameters, and the products of those that stay are reused."""
    metric = METRICS["two groups"]()
    support = support_of(metric, (3, 2, 4))
    held, first = HeldOut(metric, support), settings_of()
    for name, value in (("level", 0.7), ("guidance", 64.0), ("domain", 0.2), ("guidance", 1.0), ("level", 0.0)):
        first = held_out.TaskSettings(**{**vars(first), name: torch.tensor([value])})
        torch.testing.assert_close(held.logits(first), HeldOut(metric, support).logits(first), atol=1e-4, rtol=0)


def test_the_loss_is_the_cross_entropy_of_the_images_that_are_left_out() -> None:
    metric, settings = metric_of(), settings_of(2, temperature=torch.tensor([0.5, 2.0]))
    support = support_of(metric, (3, 1, 2), tasks=2)
    held = HeldOut(metric, support)
    rows = support.labels != 1  # the only image of a class has no say
    logits = settings.temperature.view(-1, 1, 1) * held.logits(settings)
    for b in range(2):
        wanted = torch.nn.functional.cross_entropy(logits[b, rows], support.labels[rows], reduction="sum")
        torch.testing.assert_close(held.loss(settings)[b], wanted)


def test_images_that_hardly_differ_are_told_apart() -> None:
    """As frames of a camera that stands still: products of the images themselves have too few digits for that."""
    metric, settings = metric_of(), settings_of(domain=1.0)
    support = support_of(metric, (3, 3))
    close = TaskSupport(support.x[:, :1] + 1e-3 * (support.x - support.x[:, :1]), support.labels)
    folds = Folds.of(support.labels)
    wanted = HeldOut(metric, support, folds).logits(settings)
    torch.testing.assert_close(HeldOut(metric, close, folds).logits(settings), wanted, atol=0.05, rtol=0)


@pytest.mark.parametrize("counts", [(3, 3, 3), (1, 4), (30, 1, 7)])
def test_a_fold_leaves_some_images_out_and_never_a_class(counts: Sequence[int]) -> None:
    labels = torch.repeat_interleave(torch.tensor(counts))[torch.randperm(sum(counts))]
    folds = Folds.of(labels)
    assert len(folds.keep) <= FOLDS
    per_class = folds.keep @ torch.nn.functional.one_hot(labels).float()
    assert bool((per_class >= 1).all())  # every fold can make a classifier of every class
    alone = torch.tensor(counts)[labels] == 1
    assert torch.equal(folds.left_out, ~alone)  # every image is scored but one that is alone in its class
    for image in torch.nonzero(~alone).flatten():
        assert folds.keep[:, image].sum() == len(folds.keep) - 1 and folds.keep[folds.fold[image], image] == 0
    sizes = torch.tensor([[int(((folds.fold == f) & (labels == c)).sum()) for c in range(len(counts))]
                          for f in range(len(folds.keep))])  # fmt: skip
    for c, count in enumerate(counts):
        used = sizes[: min(count, FOLDS), c]
        assert count == 1 or int(used.max() - used.min()) <= 1  # evenly, so that no fold loses most of a class


def test_many_images_are_in_few_folds() -> None:
    labels = torch.arange(20).repeat(MANY // 20 + 1)
    assert len(Folds.of(labels[:MANY]).keep) == FOLDS and len(Folds.of(labels).keep) == FEW_FOLDS


def test_of_very_many_images_some_choose_and_all_adapt(monkeypatch: pytest.MonkeyPatch) -> None:
    metric = metric_of()
    support = support_of(metric, (9, 2, 6))
    assert holdable(support) is support
    monkeypatch.setattr(held_out, "MOST", 12)
    assert holdable(support).counts.tolist() == [4, 2, 4]
    found = adapted(tuned(metric), support)
    chosen = adapted(tuned(metric), holdable(support)).settings
    assert torch.equal(found.settings.guidance, chosen.guidance)
    torch.testing.assert_close(found.settings.temperature, chosen.temperature)
    middle = support.x.mean(dim=1)[0]
    torch.testing.assert_close(found.domain[0, 0], 0.8 * middle + 0.2 * metric.origin, atol=1e-4, rtol=1e-4)
