"""Corrections of a support: each equals a support that was given that way from the start."""

from pathlib import Path

import numpy as np
import pytest
import torch

from metadiff_cli.classify.edit import find_image, forget, relabel, rename
from metadiff_cli.classify.images import Encoded, digest_of
from metadiff_cli.classify.support_set import SupportSet, support_of
from metadiff_cli.data.images import load_square
from metadiff_cli.errors import DataError
from tests.worlds import paint

LABELS = "aaabbc"


def image(number: int) -> Encoded:
    """Picture `number`."""
    return Encoded(f"{number}.png", torch.full((3,), float(number)), digest_of(np.array([number])))


def support(labels: str = LABELS) -> SupportSet:
    """Pictures 0, 1, ... in these classes; a dot leaves a picture out."""
    return support_of((label, image(i)) for i, label in enumerate(labels) if label != ".")


def same(a: SupportSet, b: SupportSet) -> bool:
    return (a.classes, a.digests, a.paths) == (b.classes, b.digests, b.paths) and (
        torch.equal(a.features, b.features) and np.array_equal(a.labels, b.labels)
    )


def test_forgotten_images_might_never_have_been_there() -> None:
    assert same(forget(support(), {image(1).digest, image(3).digest}), support("a.a.bc"))
    assert same(forget(support(), {image(5).digest}), support("aaabb."))  # with its class
    assert same(forget(support(), ()), support())
    with pytest.raises(DataError, match="no image of the support is left"):
        forget(support(), support().digests)


def test_other_labels_might_have_been_given_at_once() -> None:
    assert same(relabel(support(), {image(0).digest: "c", image(4).digest: "n"}), support("caabnc"))
    assert same(relabel(support(), {image(5).digest: "b"}), support("aaabbb"))


def test_renaming_may_swap_and_never_merges() -> None:
    assert same(rename(support(), {"a": "b", "b": "a"}), support("bbbaac"))
    assert same(rename(support(), {"a": "z"}), support("zzzbbc"))
    with pytest.raises(DataError, match="2 classes would be called 'b'"):
        rename(support(), {"a": "b"})
    with pytest.raises(DataError, match="no class 'x'"):
        rename(support(), {"x": "y"})


def test_an_image_is_found_by_its_pixels_or_by_its_name(tmp_path: Path) -> None:
    for i in range(3):
        paint(tmp_path / f"{i}.png", (200, 80 * i, 0), seed=i)
    pixels = [load_square(tmp_path / f"{i}.png", 16) for i in range(3)]
    digests = [digest_of(p) for p in pixels]
    paths = ["x/0.png", "y/0.png"]  # of one name, in one class
    held = support_of(("a", Encoded(path, torch.zeros(3), d)) for path, d in zip(paths, digests, strict=False))
    (tmp_path / "0.png").rename(tmp_path / "another name.png")
    assert find_image(held, str(tmp_path / "another name.png"), 16) == digests[0]
    assert find_image(held, str(tmp_path / "2.png"), 16) is find_image(held, "a/1.png", 16) is None
    with pytest.raises(DataError, match=r"2 images of the support are called a/0\.png"):
        find_image(held, "a/0.png", 16)
    (tmp_path / "bad.png").write_bytes(b"x")
    with pytest.raises(DataError, match="not an image"):
        find_image(held, str(tmp_path / "bad.png"), 16)
    one = forget(held, digests[1:])
    assert find_image(one, "a/0.png", 16) == digests[0]
