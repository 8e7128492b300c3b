"""Glyphs: the same for the same numbers, different for different ones, hard for pixels and easy to read."""

import numpy as np
import pytest

from metadiff_cli.data.glyphs import POINTS, draw_class, glyph_dataset, rasterise

WAY, EPISODES = 5, 400


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """40 classes of 20 drawings (40, 20, 28, 28, 3)."""
    return np.stack([draw_class(cls, 20, 28, seed=0) for cls in range(40)])


@pytest.fixture(scope="module")
def drawn(images: np.ndarray) -> np.ndarray:
    """Their ink in 0..1 (40, 20, 28 * 28)."""
    return 1 - images[..., 0].reshape(40, 20, -1) / 255


def test_the_seed_and_the_class_decide(images: np.ndarray) -> None:
    assert np.array_equal(draw_class(7, 3, 28, seed=0), images[7, :3])
    assert not np.array_equal(draw_class(7, 3, 28, seed=1), images[7, :3])
    assert draw_class(0, 2, 20, seed=0).shape == (2, 20, 20, 3) and images.dtype == np.uint8


def test_dark_ink_on_white_paper(images: np.ndarray) -> None:
    flat = images.reshape(800, -1, 3)
    assert (flat == flat[..., :1]).all()
    assert (flat.max(axis=(1, 2)) == 255).all()
    assert np.median(flat.min(axis=(1, 2))) < 60
    ink = (flat[..., 0] < 128).mean(axis=1)
    assert (ink > 0).all() and 0.04 < ink.mean() < 0.2


def test_every_drawing_is_another(images: np.ndarray) -> None:
    assert len({image.tobytes() for image in images.reshape(800, -1)}) == 800


def test_long_thin_strokes_are_not_dotted() -> None:
    middle = 0.5 / 28  # the centre of row 14
    line = np.stack([np.linspace(-0.6, 0.6, POINTS), np.full(POINTS, middle)], axis=1)
    row = rasterise(line[None], np.array([0.022]), np.array([1.0]), 28)[0, 14]
    assert row.max() < 64


def test_classes_differ_more_than_writers_but_overlap(drawn: np.ndarray) -> None:
    flat = drawn.reshape(800, -1)
    squares = (flat**2).sum(axis=1)
    distances = np.sqrt(np.maximum(squares[:, None] + squares - 2 * flat @ flat.T, 0))  # (800, 800)
    same = np.kron(np.eye(40), np.ones((20, 20))).astype(bool)
    within, between = distances[same & ~np.eye(800, dtype=bool)], distances[~same]
    assert within.mean() < between.mean()
    assert np.quantile(within, 0.9) > np.quantile(between, 0.1)


def test_pixels_alone_are_not_enough(drawn: np.ndarray) -> None:
    """5-way 1-shot by the nearest image: above chance (20 %), far below what a trained encoder reaches."""
    rng, right = np.random.default_rng(0), []
    for _ in range(EPISODES):
        episode = drawn[rng.choice(len(drawn), WAY, replace=False)]
        shot = rng.integers(20)
        queries = np.delete(episode, shot, axis=1)  # (WAY, 19, P)
        distances = ((queries[:, :, None] - episode[:, shot]) ** 2).sum(axis=-1)  # (WAY, 19, WAY)
        right.append((distances.argmin(axis=-1) == np.arange(WAY)[:, None]).mean())
    assert 0.25 < np.mean(right) < 0.60


def test_dataset_has_disjoint_splits() -> None:
    seen: list[tuple[int, int]] = []
    dataset = glyph_dataset(
        train=4, val=2, test=3, images_per_class=3, progress=lambda done, total: seen.append((done, total))
    )
    names = [cls for split in dataset.splits.values() for cls in split.classes]
    assert list(dataset.splits) == ["train", "val", "test"]
    assert names == [f"glyph-{c:04d}" for c in range(9)] and seen == [(c, 9) for c in range(1, 10)]
    assert dataset.root == "glyphs" and dataset.skipped == {}


def test_dataset_shows_the_glyphs_its_names_say() -> None:
    test = glyph_dataset(train=4, val=2, test=3, images_per_class=3).splits["test"]
    assert test.pixels is not None and np.array_equal(test.pixels[3:6], draw_class(7, 3, 28, seed=0))
    assert test.labels == (0, 0, 0, 1, 1, 1, 2, 2, 2)
    assert test.classes[0] == "glyph-0006" and test.paths[1] == "glyphs/glyph-0006/01"
