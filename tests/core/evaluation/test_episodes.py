"""Episodes: disjoint, reproducible one by one, refused with a clear message."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metadiff_cli.core.evaluation.episodes import check_episodes, episode_batches, sample_episode, training_batch
from metadiff_cli.errors import DataError

INDICES = [np.arange(30 * c, 30 * c + 30) for c in range(12)]
NAMES = [f"class {c}" for c in range(12)]


@settings(max_examples=60, deadline=None)
@given(
    way=st.integers(2, 12), shot=st.integers(1, 10), query=st.integers(1, 10), seed=st.integers(0, 2**40),
    index=st.integers(0, 10**6), imbalance=st.sampled_from([None, 0.5, 2.0]),
)  # fmt: skip
def test_support_and_query_are_disjoint_and_labelled(
    way: int, shot: int, query: int, seed: int, index: int, imbalance: float | None
) -> None:
    e = sample_episode(INDICES, way, shot, query, seed=seed, index=index, imbalance=imbalance)
    assert e.support.shape == (1, way, shot) and e.query.shape == e.labels.shape == (1, way * query)
    rows = np.concatenate([e.support.ravel(), e.query.ravel()])
    assert len(set(rows.tolist())) == way * (shot + query)
    assert len(set(e.classes[0].tolist())) == way
    assert np.array_equal(e.support[0] // 30, np.repeat(e.classes[0][:, None], shot, axis=1))
    assert np.array_equal(e.query[0] // 30, e.classes[0][e.labels[0]])


def test_an_episode_depends_on_seed_and_index_alone() -> None:
    one_by_one = list(episode_batches(INDICES, 5, 1, 3, count=10, batch=1, seed=4))
    (together,) = episode_batches(INDICES, 5, 1, 3, count=10, batch=10, seed=4)
    for i, single in enumerate(one_by_one):
        assert np.array_equal(single.query[0], together.query[i])
    other = sample_episode(INDICES, 5, 1, 3, seed=5, index=0)
    assert not np.array_equal(other.query, one_by_one[0].query)


def test_imbalance_varies_the_counts() -> None:
    (e,) = episode_batches(INDICES, 5, 1, 6, count=200, batch=200, seed=0, imbalance=0.5)
    counts = np.stack([np.bincount(labels, minlength=5) for labels in e.labels])
    assert (counts.sum(axis=1) == 30).all() and counts.std() > 4


def test_training_batches_mix_ways_and_shots() -> None:
    shapes = {training_batch(INDICES, (5, 10), (1, 5), 3, batch=2, seed=0, step=s).support.shape[1:] for s in range(60)}
    assert {way for way, _ in shapes} == set(range(5, 11)) and {shot for _, shot in shapes} == set(range(1, 6))


def test_fewer_classes_than_ways_make_one_task_of_all() -> None:
    batch = training_batch(INDICES[:3], (5, 10), (1, 5), 3, batch=2, seed=0, step=0)
    assert batch.classes.shape == (2, 3)


def test_what_does_not_suffice_is_named() -> None:
    with pytest.raises(DataError, match=r"class 'class 0' has 30 images; 20-shot with 15 queries needs 35"):
        check_episodes(INDICES, NAMES, 5, 20, 15)
    with pytest.raises(DataError, match=r"13-way episodes need 13 classes; there are 12"):
        check_episodes(INDICES, NAMES, 13, 1, 1)
    with pytest.raises(DataError, match=r"has 1 image;"):
        check_episodes([np.arange(1), np.arange(9)], ["lone", "many"], 2, 1, 1)
