"""Support sets and pools: each picture once, and nothing depends on order or file names."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metadiff_cli.classify.images import Encoded, digest_of
from metadiff_cli.classify.support_set import SupportSet, pool_of, require_classes, support_of
from metadiff_cli.core.method.metric import Metric
from metadiff_cli.errors import DataError


def picture(number: int, path: str = "") -> Encoded:
    """Picture `number` as it was encoded."""
    return Encoded(path or f"{number}.png", torch.full((3,), float(number)), digest_of(np.array([number])))


def example(label: str, number: int, path: str = "") -> tuple[str, Encoded]:
    """Picture `number`, in a class."""
    return label, picture(number, path or f"{label}/{number}.png")


def same(a: SupportSet, b: SupportSet) -> bool:
    return (
        (a.classes, a.digests, a.paths, a.counts()) == (b.classes, b.digests, b.paths, b.counts())
        and torch.equal(a.features, b.features)
        and np.array_equal(a.labels, b.labels)
    )


@settings(deadline=None)
@given(st.permutations(range(8)), st.integers(1, 7))
def test_in_two_parts_or_at_once_in_any_order(order: list[int], cut: int) -> None:
    examples = [example("ab"[i % 2] if i < 6 else "c", i) for i in range(8)]
    shuffled = [examples[i] for i in order]
    whole = support_of(examples)
    assert same(support_of(shuffled), whole)
    assert same(support_of(shuffled[:cut]).joined(support_of(shuffled[cut:])), whole)


def test_a_repeated_picture_counts_once_and_is_told() -> None:
    support = support_of([example("a", 1), example("a", 1, "a/copy.png"), example("b", 2)])
    assert support.counts() == {"a": 1, "b": 1} and support.repeated == (("a/copy.png", "a/1.png"),)
    again = support.joined(support_of([example("b", 2, "b/again.png"), example("b", 3)]))
    assert again.counts() == {"a": 1, "b": 2}
    assert again.repeated == (("a/copy.png", "a/1.png"), ("b/again.png", "b/2.png"))


def test_one_picture_in_two_classes_is_refused() -> None:
    with pytest.raises(DataError, match=r"in two classes: a/1\.png \('a'\) and b/1\.png \('b'\)"):
        support_of([example("a", 1), example("b", 1)])


def test_one_class_is_nothing_to_tell_apart() -> None:
    require_classes(support_of([example("a", 1), example("b", 2)]))
    with pytest.raises(DataError, match="one class only, 'a'"):
        require_classes(support_of([example("a", 1), example("a", 2)]))


def test_a_task_has_its_means_and_counts() -> None:
    task = support_of([example("a", 1), example("b", 2), example("b", 3)]).task(Metric((3,)))
    assert task.x.shape == (1, 3, 3) and task.counts.tolist() == [1, 2]
    assert torch.equal(task.means()[0], torch.tensor([[1.0] * 3, [2.5] * 3]))


def test_broken_images_are_left_out_and_listed() -> None:
    support = support_of([example("a", 1), ("a", Encoded("a/x.png", None, reason="damaged")), example("b", 2)])
    assert support.counts() == {"a": 1, "b": 1} and support.broken == (("a/x.png", "damaged"),)


def test_a_class_of_broken_images_alone_is_refused() -> None:
    with pytest.raises(DataError, match=r"class 'b' can be read; the first is b/x\.png: damaged"):
        support_of([example("a", 1), ("b", Encoded("b/x.png", None, reason="damaged"))])


def test_pools_hold_each_picture_once_and_none_that_is_labelled() -> None:
    a, b, c = (picture(n) for n in (1, 2, 3))
    pool, more = pool_of([c, a, b, a]), pool_of([b, a, c])
    assert pool is not None and more is not None and len(pool.digests) == len(pool.features) == 3
    first = pool_of([a])
    assert first is not None
    joined = first.joined(more)
    assert joined.digests == pool.digests and torch.equal(joined.features, pool.features)
    rest = pool.without([b.digest, digest_of(np.zeros(1))])
    assert rest is not None and set(rest.digests) == {a.digest, c.digest}
    assert pool.without(pool.digests) is None and pool_of([Encoded("x", None, reason="damaged")]) is None


def test_each_picture_has_its_path() -> None:
    support = support_of([example("a", 1), example("b", 2)])
    assert support.path_of()[digest_of(np.array([2]))] == "b/2.png"
