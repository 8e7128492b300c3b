"""Images of no class: the known score and its threshold."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from metadiff_cli.core.method import rejection
from metadiff_cli.core.method.adapt import MetaDiff, Sampling, TaskClassifier
from metadiff_cli.core.method.calibration import Rejection, TaskTable
from metadiff_cli.core.method.held_out import HeldOut
from metadiff_cli.core.method.rejection import RATE, base_weights, known_scores, rejector_of, support_scores
from metadiff_cli.core.method.support import TaskSupport
from metadiff_cli.core.training import validation
from metadiff_cli.core.training.fit import fit_rejection
from metadiff_cli.core.training.validation import ValidationTasks
from metadiff_cli.errors import CheckpointError, DataError
from tests.tasks import METRICS, ONE, TWO, adapted, bank_of, features, metric_of, support_of, tuned
from tests.worlds import CPU

TABLE = Rejection(TaskTable((2, 10), (1, 2, 8), ((-1.0, -2.0, -3.0), (-0.5, -1.5, -2.5))), 0.05)


def model(name: str = "two groups") -> MetaDiff:
    """With 40 base classes, or none of them where the metric has none."""
    metric = METRICS[name]()
    targets = None if metric.space is None else features(40, 30, 0, metric.groups).mean(dim=1)
    return replace(tuned(metric, scale=4.0, prior=0.5), targets=targets).tuned(rejection=TABLE)


@pytest.fixture(params=METRICS)
def metadiff(request: pytest.FixtureRequest) -> MetaDiff:
    return model(request.param)


def mean_exp(logits: Tensor) -> Tensor:
    """log mean exp over the last dimension, as it is written."""
    return logits.double().exp().mean(dim=-1).log()


def world_scores(metadiff: MetaDiff, classifier: TaskClassifier, x: Tensor) -> Tensor:
    """The second term of the known score (Q,) of x (1, Q, J), which is 0 without base classes."""
    if metadiff.targets is None:
        return torch.zeros(x.shape[1]).double()
    base = classifier.embed(metadiff.metric.expand(metadiff.targets).unsqueeze(0))
    return mean_exp(classifier.logits_of(base, x))[0]


def test_the_known_score_is_the_log_odds_of_the_classes_of_the_task(metadiff: MetaDiff) -> None:
    support = support_of(metadiff.metric, (2, 3, 1))
    query = metadiff.metric.expand(features(1, 6, 9, metadiff.metric.groups))
    for sampling in (Sampling(), Sampling(5, 3, 1.0)):
        classifier = adapted(metadiff, support, sampling)
        own = torch.stack([mean_exp(classifier.logits(query, m)[0]) for m in range(sampling.samples)])
        wanted = mean_exp(own.T) - world_scores(
            metadiff, classifier, query
        )  # samples are averaged inside the logarithm
        found = known_scores(classifier, base_weights(metadiff, classifier), query)[0]
        torch.testing.assert_close(found.double(), wanted, atol=1e-3, rtol=1e-4)


def test_support_images_are_scored_as_if_they_were_not_in_the_support(metadiff: MetaDiff) -> None:
    """One that is alone in its class is scored against the other classes."""
    support = support_of(metadiff.metric, (3, 1, 2))
    classifier = adapted(metadiff, support)
    scores, alone = support_scores(classifier, support, base_weights(metadiff, classifier))
    assert alone.tolist() == [False, True, False]
    held = HeldOut(metadiff.metric, support).logits(classifier.settings)[0]
    usual = classifier.logits(support.x)[0]
    world = world_scores(metadiff, classifier, support.x)
    for i, c in enumerate(support.labels.tolist()):
        logits = float(classifier.settings.temperature) * held[i] if c != 1 else usual[i, [0, 2]]
        assert float(scores[0, i]) == pytest.approx(float(mean_exp(logits) - world[i]), abs=1e-3)


def test_the_threshold_is_the_mean_over_classes_of_support_scores_and_offsets(metadiff: MetaDiff) -> None:
    support = support_of(metadiff.metric, (3, 1, 2))
    classifier = adapted(metadiff, support)
    base = base_weights(metadiff, classifier)
    scores = support_scores(classifier, support, base)[0][0]
    means = [scores[support.labels == c].mean() for c in range(3)]
    offsets = TABLE.offsets  # of one image for the class that is alone, of the mean number for the others
    wanted = torch.stack(means).mean() + (2 * offsets.at(3, 2) + offsets.at(3, 1)) / 3
    rejector = rejector_of(metadiff, classifier, support)
    assert float(rejector.threshold) == pytest.approx(float(wanted), abs=1e-4)
    query = metadiff.metric.expand(features(1, 4, 7, metadiff.metric.groups))
    torch.testing.assert_close(rejector.margins(query), known_scores(classifier, base, query) - rejector.threshold)


def test_a_class_that_is_not_known_counts_in_no_score(metadiff: MetaDiff) -> None:
    """It is in the classifier, which sharpens the others against it, and neither in the scores nor in the threshold."""
    support = support_of(metadiff.metric, (3, 1, 2, 4))
    classifier = adapted(metadiff, support)
    query = metadiff.metric.expand(features(1, 4, 7, metadiff.metric.groups))
    rejector = rejector_of(metadiff, classifier, support, known=[0, 1, 3])
    wanted = mean_exp(classifier.logits(query)[0][:, [0, 1, 3]]) - world_scores(metadiff, classifier, query)
    margins = rejector.margins(query)[0] + rejector.threshold
    torch.testing.assert_close(margins.double(), wanted.double(), atol=1e-3, rtol=1e-4)
    held = HeldOut(metadiff.metric, support).logits(classifier.settings)[0] * float(classifier.settings.temperature)
    usual, world = classifier.logits(support.x)[0], world_scores(metadiff, classifier, support.x)
    means = [
        torch.stack([
            mean_exp(held[i, [0, 1, 3]] if c != 1 else usual[i, [0, 3]]) - world[i]
            for i in (support.labels == c).nonzero().flatten().tolist()
        ]).mean()
        for c in (0, 1, 3)
    ]  # fmt: skip
    offset = (2 * TABLE.offsets.at(3, 8 / 3) + TABLE.offsets.at(3, 1)) / 3
    assert float(rejector.threshold) == pytest.approx(float(torch.stack(means).mean()) + offset, abs=1e-3)


def test_a_single_known_class_needs_two_images(metadiff: MetaDiff) -> None:
    for counts, known in (((2, 3), [0]), ((2, 1), [1])):
        support = support_of(metadiff.metric, counts)
        classifier = adapted(metadiff, support)
        if counts[known[0]] > 1:
            assert torch.isfinite(rejector_of(metadiff, classifier, support, known=known).margins(support.x)).all()
        else:
            with pytest.raises(DataError, match="two images"):
                rejector_of(metadiff, classifier, support, known=known)


def test_neither_order_nor_the_other_tasks_matter(metadiff: MetaDiff) -> None:
    support = support_of(metadiff.metric, (3, 1, 2), tasks=2)
    query = metadiff.metric.expand(features(2, 5, 7, metadiff.metric.groups))
    both = rejector_of(metadiff, adapted(metadiff, support), support).margins(query)
    for b in range(2):
        one = TaskSupport(support.x[b : b + 1], support.labels)
        alone = rejector_of(metadiff, adapted(metadiff, one), one).margins(query[b : b + 1])
        torch.testing.assert_close(alone[0], both[b], atol=2e-3, rtol=1e-3)
    turned = support.take([5, 2, 0, 1, 4, 3])
    turned = TaskSupport(turned.x, torch.tensor([2, 0, 1])[turned.labels])
    again = rejector_of(metadiff, adapted(metadiff, turned), turned).margins(query)
    torch.testing.assert_close(again, both, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["one group", "without base classes"])
def test_a_fitted_threshold_rejects_its_share_of_known_images_and_more_of_the_others(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """On other classes than those of the fit, and for a number of shots that was not fitted."""
    monkeypatch.setattr(validation, "WAYS", (5,))
    monkeypatch.setattr(validation, "SHOTS", (1, 2, 5))
    metadiff = model(name)
    pairs = ValidationTasks(metadiff.metric, [bank_of(features(30, 24, 11, ONE))], CPU, 0)
    fitted = metadiff.tuned(rejection=fit_rejection(metadiff, pairs))
    assert fitted.tuning.rejection is not None and fitted.tuning.rejection.rate == RATE == 0.05
    for shot in (1, 3, 5):
        z = torch.stack([features(10, 15, seed, ONE) for seed in range(500, 560)])
        support = TaskSupport.even(metadiff.metric.expand(z[:, :5, :shot]))
        rejector = rejector_of(fitted, adapted(fitted, support), support)
        known, unknown = (
            float((rejector.margins(metadiff.metric.expand(part.flatten(1, 2))) < 0).float().mean())
            for part in (z[:, :5, 5:], z[:, 5:, 5:])
        )
        assert 0.02 < known < 0.10 and unknown > known + 0.05


@pytest.mark.parametrize("counts", [(1, 1), (1, 1, 1, 1, 1), (1, 9), (4, 4)])
def test_a_task_of_any_shape_has_a_threshold(metadiff: MetaDiff, counts: tuple[int, ...]) -> None:
    support = support_of(metadiff.metric, counts)
    margins = rejector_of(metadiff, adapted(metadiff, support), support).margins(support.x)
    assert torch.isfinite(margins).all()


def test_what_was_never_fitted_is_refused_with_the_next_step() -> None:
    metadiff = model().tuned(rejection=None)
    support = support_of(metadiff.metric, (2, 2))
    with pytest.raises(CheckpointError) as caught:
        rejector_of(metadiff, adapted(metadiff, support), support)
    assert caught.value.hint is not None and "--reject-below" in caught.value.hint


def test_many_base_classes_are_thinned() -> None:
    metadiff = model()
    classifier = adapted(metadiff, support_of(metadiff.metric, (2, 2), tasks=3))
    few = base_weights(metadiff, classifier)
    assert few is not None and few.shape == (3, 40, sum(metric_of(TWO).parts))
    many = replace(metadiff, targets=torch.randn(rejection.MOST_BASE * 3 + 1, 24))
    found = base_weights(many, classifier)
    assert found is not None and rejection.MOST_BASE // 2 < found.shape[1] <= rejection.MOST_BASE
