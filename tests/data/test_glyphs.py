"""Glyphs: the same for the same numbers, different for different ones, hard for pixels and easy to read."""

import numpy as np
import pytest

from metadiff_cli.data.glyphs import POINTS, draw_glyphs, glyph_dataset, rasterise

WAY, EPISODES = 5, 400


@pytest.fixture(scope="module")
def drawn() -> np.ndarray:
    """Ink in 0..1 of 40 classes (40, 20, 28 * 28)."""
    images, _ = draw_glyphs(classes=40, images_per_class=20)
    return 1 - images[..., 0].reshape(40, 20, -1) / 255


def test_shapes_and_types() -> None:
    images, labels = draw_glyphs(classes=3, images_per_class=4, size=20)
    assert images.shape == (12, 20, 20, 3) and images.dtype == np.uint8
    assert labels.dtype == np.int64 and labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_the_seed_decides() -> None:
    first, again = draw_glyphs(classes=2, images_per_class=3)[0], draw_glyphs(classes=2, images_per_class=3)[0]
    other, _ = draw_glyphs(classes=2, images_per_class=3, seed=1)
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_a_glyph_does_not_depend_on_how_many_are_drawn() -> None:
    many, _ = draw_glyphs(classes=6, images_per_class=5)
    few, labels = draw_glyphs(classes=2, images_per_class=3, first_class=4)
    assert np.array_equal(few.reshape(2, 3, 28, 28, 3), many.reshape(6, 5, 28, 28, 3)[4:, :3])
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_dark_ink_on_white_paper() -> None:
    images, _ = draw_glyphs(classes=40, images_per_class=20)
    assert (images == images[..., :1]).all()
    assert (images.max(axis=(1, 2, 3)) == 255).all()
    assert np.median(images.min(axis=(1, 2, 3))) < 60
    ink = (images[..., 0] < 128).mean(axis=(1, 2))
    assert (ink > 0).all() and 0.04 < ink.mean() < 0.2


def test_every_drawing_is_another() -> None:
    images, _ = draw_glyphs(classes=10, images_per_class=20)
    assert len({image.tobytes() for image in images}) == 200


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
    assert dataset.root == "glyphs" and dataset.skipped == 0


def test_dataset_shows_the_glyphs_its_names_say() -> None:
    test = glyph_dataset(train=4, val=2, test=3, images_per_class=3).splits["test"]
    images, labels = draw_glyphs(classes=3, images_per_class=3, first_class=6)
    assert test.pixels is not None and np.array_equal(test.pixels, images)
    assert test.labels == tuple(labels.tolist())
    assert test.classes[0] == "glyph-0006" and test.paths[1] == "glyphs/glyph-0006/01"
