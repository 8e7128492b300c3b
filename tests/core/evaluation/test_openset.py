"""Episodes with queries of other classes: what is counted, and how."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metadiff_cli.core.evaluation.episodes import sample_episode
from metadiff_cli.core.evaluation.evaluate import Protocol
from metadiff_cli.core.evaluation.openset import auroc, measure_open_set
from metadiff_cli.core.method.adapt import MetaDiff, Sampling
from metadiff_cli.core.method.calibration import Rejection, TaskTable
from metadiff_cli.errors import CheckpointError, DataError
from tests.tasks import ONE, bank_of, features, metric_of, tuned
from tests.worlds import CPU

SCORES = st.lists(st.integers(-3, 3), min_size=1, max_size=6)


@pytest.fixture(scope="module")
def metadiff() -> MetaDiff:
    offset = Rejection(TaskTable.constant(-2.0), 0.05)
    return replace(tuned(metric_of(ONE)), targets=features(40, 30, 0).mean(dim=1)).tuned(rejection=offset)


@settings(deadline=None)
@given(SCORES, SCORES)
def test_auroc_counts_pairs(known: list[int], unknown: list[int]) -> None:
    pairs = [1.0 if k > u else 0.5 if k == u else 0.0 for k in known for u in unknown]
    found = auroc(torch.tensor([known]).float(), torch.tensor([unknown]).float())
    assert float(found) == pytest.approx(sum(pairs) / len(pairs))


def test_an_open_set_episode_begins_as_the_closed_one() -> None:
    indices = bank_of(features(12, 6, 0)).class_indices()
    closed, opened = (sample_episode(indices, way, 2, 3, seed=4, index=7) for way in (5, 10))
    assert (closed.support == opened.support[:, :5]).all() and (closed.query == opened.query[:, :15]).all()


def test_known_and_unknown_queries_are_told_apart_better_than_by_chance(metadiff: MetaDiff) -> None:
    bank, protocol = bank_of(features(20, 20, 12)), Protocol(5, 5, 5, 60, seed=3)
    found = measure_open_set(metadiff, bank, protocol, Sampling(), CPU)
    summary = found.summary()
    assert summary["auroc"]["mean"] > 65 and len(found.auroc) == 60
    assert summary["rejected_unknown"]["mean"] > summary["rejected_known"]["mean"] + 5
    difference = summary["auroc"]["mean"] - summary["auroc_confidence"]["mean"]
    assert summary["paired_to_confidence"]["difference"] == pytest.approx(difference, abs=1e-6)
    assert found.joined(found).auroc.shape == (120,)


def test_an_open_set_needs_further_classes(metadiff: MetaDiff) -> None:
    protocol = Protocol(5, 1, 5, 3)
    with pytest.raises(DataError, match="more than 5 classes"):
        measure_open_set(metadiff, bank_of(features(5, 6, 0)), protocol, Sampling(), CPU)
    assert len(measure_open_set(metadiff, bank_of(features(6, 6, 0)), protocol, Sampling(), CPU).auroc) == 3


def test_an_open_set_needs_a_fitted_threshold(metadiff: MetaDiff) -> None:
    with pytest.raises(CheckpointError, match="threshold"):
        measure_open_set(
            metadiff.tuned(rejection=None), bank_of(features(6, 6, 0)), Protocol(5, 1, 5, 3), Sampling(), CPU
        )
