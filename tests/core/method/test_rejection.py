"""Images of no class: the known score, its threshold, and the open-set measurement."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from metadiff_cli.core.encoders.bank import FeatureBank
from metadiff_cli.core.evaluation.episodes import sample_episode
from metadiff_cli.core.evaluation.evaluate import Protocol
from metadiff_cli.core.evaluation.openset import auroc, measure_open_set
from metadiff_cli.core.method import rejection
from metadiff_cli.core.method.adapt import MetaDiff, Sampling, TaskClassifier, Tuning, adapt_tasks
from metadiff_cli.core.method.calibration import TaskTable
from metadiff_cli.core.method.denoisers import AnalyticDenoiser
from metadiff_cli.core.method.metric import task_logits
from metadiff_cli.core.method.rejection import Rejection, base_classes, known_scores, left_out_scores, rejector_of
from metadiff_cli.core.method.support import TaskSupport
from metadiff_cli.core.method.task_space import fit_task_space
from metadiff_cli.core.training.fit import fit_rejection
from metadiff_cli.errors import CheckpointError, DataError
from tests.worlds import CPU, IMAGES, SIZE, bank_of, classifier_of, world

TABLE = Rejection(TaskTable((2, 10), (1, 2, 8), ((-1.0, -2.0, -3.0), (-0.5, -1.5, -2.5))), 0.05)


@pytest.fixture(scope="module")
def metadiff() -> MetaDiff:
    base = world(40, IMAGES, seed=0)
    space = fit_task_space(list(base))
    return MetaDiff(space, AnalyticDenoiser(), False, Tuning(rejection=TABLE), space.to_task(base.mean(dim=1)))


def tuned(metadiff: MetaDiff, table: Rejection | None) -> MetaDiff:
    return metadiff.tuned(replace(metadiff.tuning, rejection=table))


def uneven(metadiff: MetaDiff, support: TaskSupport, sampling: Sampling) -> TaskClassifier:
    """Of one task whose classes differ in size."""
    ranks = torch.arange(len(support.count)).unsqueeze(0)
    return adapt_tasks(metadiff, support, sampling, ranks=ranks, seeds=[0])


def score_of(classifier: TaskClassifier, base: Tensor, weights: Tensor, z: Tensor) -> float:
    """The definition, for one image z (D,) and weights (N, D) of one task."""
    logits = [
        classifier.scale * task_logits(z.view(1, 1, -1), w.unsqueeze(0), classifier.space, classifier.guidance)
        for w in (weights, base)
    ]
    own, world_ = (float(row.flatten().exp().mean().log()) for row in logits)
    return own - world_


def test_left_out_scores_are_those_of_classifiers_made_without_the_image(metadiff: MetaDiff) -> None:
    """Classes of 3, 1 and 2 images; an image alone in its class meets the other classes only."""
    metadiff = metadiff.tuned(replace(metadiff.tuning, shared=0.0))  # the domain is estimated with all images
    z, labels = world(3, 2, seed=5).flatten(0, 1).unsqueeze(0), torch.tensor([0, 0, 0, 1, 2, 2])
    sampling = Sampling(guidance=2.0)
    whole = uneven(metadiff, TaskSupport.of(z, labels), sampling)
    base = base_classes(metadiff)
    found = left_out_scores(whole, base, TaskSupport.of(z, labels), torch.tensor([False, True, False]))
    for i, c in enumerate(labels.tolist()):
        weights = whole.weights[0, 0]
        others = torch.arange(6) != i
        if c == 1:
            weights = weights[[0, 2]]
        else:
            without = TaskSupport.of(z[:, others], labels[others])
            weights = weights.index_copy(0, torch.tensor([c]), uneven(metadiff, without, sampling).weights[0, 0, [c]])
        assert float(found[0, i]) == pytest.approx(score_of(whole, base, weights, z[0, i]), abs=5e-3)


def test_the_threshold_is_the_mean_over_classes_of_left_out_scores_and_offsets(metadiff: MetaDiff) -> None:
    support = TaskSupport.of(world(2, 2, seed=6).flatten(0, 1).unsqueeze(0), torch.tensor([0, 0, 0, 1]))
    classifier = uneven(metadiff, support, Sampling())
    base = base_classes(metadiff)
    scores = left_out_scores(classifier, base, support, torch.tensor([False, True]))[0]
    offsets = TABLE.offsets
    wanted = ((scores[:3].mean() + offsets.at(2, 2)) + (scores[3] + offsets.at(2, 1))) / 2
    rejector = rejector_of(metadiff, classifier, support)
    assert float(rejector.threshold) == pytest.approx(float(wanted), abs=1e-5)
    query = world(1, 4, seed=7)
    torch.testing.assert_close(rejector.margins(query), known_scores(classifier, base, query) - rejector.threshold)


def test_neither_order_nor_the_other_tasks_matter(metadiff: MetaDiff) -> None:
    z, query = world(8, 3, seed=1).unflatten(0, (2, 4)), world(2, 5, seed=2)
    both = rejector_of(metadiff, classifier_of(metadiff, z), z).margins(query)
    for i in range(2):
        alone = rejector_of(metadiff, classifier_of(metadiff, z[i : i + 1]), z[i : i + 1]).margins(query[i : i + 1])
        torch.testing.assert_close(alone[0], both[i], atol=1e-4, rtol=1e-4)
    turned = z.flip(1).flip(2)
    again = rejector_of(metadiff, classifier_of(metadiff, turned), turned).margins(query)
    torch.testing.assert_close(again, both, atol=1e-4, rtol=1e-4)


def test_a_fitted_threshold_rejects_its_share_of_known_images_and_more_of_the_others(metadiff: MetaDiff) -> None:
    fresh = tuned(metadiff, fit_rejection(metadiff, bank_of(30, seed=11), CPU, seed=0, query=4))
    assert fresh.tuning.rejection is not None and fresh.tuning.rejection.rate == rejection.RATE
    for shot in (1, 5):
        found = measure_open_set(fresh, bank_of(30, seed=12), Protocol(5, shot, 5, 150, seed=3), Sampling(), CPU)
        summary = found.summary()
        assert 2 < summary["rejected_known"]["mean"] < 9  # other classes than those of the fit
        assert summary["rejected_unknown"]["mean"] > summary["rejected_known"]["mean"] + 5
        assert summary["auroc"]["mean"] > 65
    assert found.joined(found).auroc.shape == (300,)


def test_a_table_of_one_shot_serves_more_shots(metadiff: MetaDiff) -> None:
    """Where validation classes have too few images to leave one out, no support image is left out of its class."""
    single = tuned(metadiff, Rejection(TaskTable((2, 10), (1,), ((-1.0,), (-0.5,))), 0.05))
    z = world(3, 4, seed=3).unsqueeze(0)
    classifier = classifier_of(single, z)
    alone = left_out_scores(classifier, base_classes(single), TaskSupport.even(z), torch.ones(3, dtype=torch.bool))
    assert single.tuning.rejection is not None
    wanted = alone.mean() + single.tuning.rejection.offsets.at(3, 1)
    assert float(rejector_of(single, classifier, z).threshold) == pytest.approx(float(wanted), abs=1e-5)


def test_what_was_never_fitted_is_refused_with_the_next_step(metadiff: MetaDiff) -> None:
    z = world(3, 2, seed=0).unsqueeze(0)
    for bare in (tuned(metadiff, None), replace(metadiff, targets=None)):
        with pytest.raises(CheckpointError) as caught:
            rejector_of(bare, classifier_of(bare, z), z)
        assert caught.value.hint is not None and "metadiff refit" in caught.value.hint
    assert fit_rejection(replace(metadiff, targets=None), bank_of(4, seed=0), CPU, seed=0) is None


def test_few_images_and_few_classes_still_give_a_table(metadiff: MetaDiff) -> None:
    z = world(3, 2, seed=0)
    small = FeatureBank(z.flatten(0, 1).numpy(), np.repeat(np.arange(3), 2), ("a", "b", "c"))
    table = fit_rejection(metadiff, small, CPU, seed=0)
    assert table is not None and table.offsets.shots == (1,) and table.offsets.ways == (2, 3)


def test_many_base_classes_are_thinned(metadiff: MetaDiff) -> None:
    assert len(base_classes(metadiff)) == 40
    many = replace(metadiff, targets=torch.zeros(rejection.MOST_BASE * 3 + 1, SIZE))
    assert rejection.MOST_BASE // 2 < len(base_classes(many)) <= rejection.MOST_BASE


SCORES = st.lists(st.integers(-3, 3), min_size=1, max_size=6)


@settings(deadline=None)
@given(SCORES, SCORES)
def test_auroc_counts_pairs(known: list[int], unknown: list[int]) -> None:
    pairs = [1.0 if k > u else 0.5 if k == u else 0.0 for k in known for u in unknown]
    found = auroc(torch.tensor([known]).float(), torch.tensor([unknown]).float())
    assert float(found) == pytest.approx(sum(pairs) / len(pairs))


def test_an_open_set_episode_begins_as_the_closed_one() -> None:
    indices = bank_of(12, seed=0).class_indices()
    closed, opened = (sample_episode(indices, way, 2, 3, seed=4, index=7) for way in (5, 10))
    assert (closed.support == opened.support[:, :5]).all() and (closed.query == opened.query[:, :15]).all()


def test_an_open_set_needs_further_classes(metadiff: MetaDiff) -> None:
    with pytest.raises(DataError, match="more than 5 classes"):
        measure_open_set(metadiff, bank_of(5, seed=0), Protocol(5, 1, 5, 3), Sampling(), CPU)
    assert len(measure_open_set(metadiff, bank_of(6, seed=0), Protocol(5, 1, 5, 3), Sampling(), CPU).auroc) == 3
