"""Glyphs: a generated data set of handwriting-like characters, for demonstrations and tests without a download.

A class is a character of one to four curved strokes. An image is one writer's drawing of it: control points tremble,
the whole is slanted, turned, scaled, shifted and gently warped, pen and ink differ, and a stroke may end early.
Everything follows from (seed, class, image) alone, so class k is the same however many classes are drawn.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from metadiff_cli.data.folders import Dataset, Split


@dataclass(frozen=True)
class Hand:
    """How much writers differ; lengths are in units of the image side.

    The values are chosen so that few-shot accuracy is far from 100 % with a trained encoder, and poor on raw pixels.
    """

    tremble: float = 0.075  # standard deviation of each control point
    slant: float = 0.30  # of the shear
    turn: float = 0.22  # radians
    scale: float = 0.16  # of the logarithm of each side's scale
    shift: float = 0.055
    pen: tuple[float, float] = (0.022, 0.045)  # half width of a stroke
    early: float = 0.15  # chance that a stroke ends early
    warp: float = 0.015  # amplitude of each wave of the elastic field: bends strokes without breaking them
    ink: tuple[float, float] = (0.8, 1.0)  # darkness of the ink


HAND = Hand()
POINTS = 64  # samples along a stroke: with half of them the thinnest pens leave dotted lines
WAVES = 3  # of the elastic field, each about one period across the image


def draw_class(cls: int, count: int, size: int, seed: int) -> np.ndarray:
    """`count` drawings (count, size, size, 3) uint8 of class `cls`, dark on white."""
    strokes = character(np.random.default_rng([seed, cls]))
    drawings = [_by_writer(strokes, np.random.default_rng([seed, cls, 1 + image])) for image in range(count)]
    points = np.stack([d[0] for d in drawings])  # (count, strokes * POINTS, 2)
    pens = np.array([d[1] for d in drawings])
    inks = np.array([d[2] for d in drawings])
    grey = rasterise(points, pens, inks, size)
    return np.repeat(grey[..., None], 3, axis=3)


def character(rng: np.random.Generator) -> np.ndarray:
    """Draw the control points (strokes, 4, 2) of a character, in -0.5..0.5: cubic Bezier curves, some nearly straight.

    A stroke often starts where an earlier one starts, ends or bends, as in real scripts.
    """
    count = int(rng.choice([1, 2, 3, 4], p=[0.12, 0.36, 0.36, 0.16]))
    strokes: list[np.ndarray] = []
    for _ in range(count):
        start = rng.uniform(-0.36, 0.36, 2)
        if strokes and rng.random() < 0.6:
            start = strokes[rng.integers(len(strokes))][rng.integers(4)]
        end = rng.uniform(-0.36, 0.36, 2)
        while np.linalg.norm(end - start) < 0.25:  # a dot is no stroke
            end = rng.uniform(-0.36, 0.36, 2)
        bend = rng.normal(0, 0.04 if rng.random() < 0.4 else 0.3, (2, 2))
        inner = start + (end - start) * np.array([[1 / 3], [2 / 3]]) + bend
        strokes.append(np.clip(np.vstack([start, inner, end]), -0.5, 0.5))
    return np.stack(strokes)


def _by_writer(strokes: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, float, float]:
    """Points (strokes * POINTS, 2) of one drawing, the half width of its pen and the darkness of its ink."""
    control = strokes + rng.normal(0, HAND.tremble, strokes.shape)
    ends = np.where(rng.random(len(strokes)) < HAND.early, rng.uniform(0.6, 0.95, len(strokes)), 1.0)
    t = np.linspace(0, 1, POINTS)[None, :] * ends[:, None]  # (strokes, POINTS)
    basis = np.stack([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3], axis=2)
    points = (basis @ control).reshape(-1, 2)
    angle, shear = rng.normal(0, HAND.turn), rng.normal(0, HAND.slant)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    scale = np.diag(np.exp(rng.normal(0, HAND.scale, 2)))
    points = points @ (turn @ np.array([[1, shear], [0, 1]]) @ scale).T + rng.normal(0, HAND.shift, 2)
    pen = float(rng.uniform(*HAND.pen))
    return points + _warp(points, rng), pen, float(rng.uniform(*HAND.ink))


def _warp(points: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Displacements (P, 2) of points (P, 2) in a smooth field of a few long sine waves in random directions."""
    frequency = rng.normal(0, 1, (2, WAVES))  # periods per image side
    phase = rng.uniform(0, 2 * np.pi, WAVES)
    push = rng.normal(0, HAND.warp, (WAVES, 2))
    field: np.ndarray = np.sin(2 * np.pi * (points @ frequency) + phase) @ push
    return field


def rasterise(points: np.ndarray, pens: np.ndarray, inks: np.ndarray, size: int) -> np.ndarray:
    """Grey images (n, size, size) uint8 of points (n, P, 2) in -0.5..0.5 joined by round pens (n,) with inks (n,)."""
    centres = ((np.arange(size, dtype=np.float32) + 0.5) / size - 0.5).astype(np.float32)
    x, y = points[:, :, 0].astype(np.float32), points[:, :, 1].astype(np.float32)
    across = (centres[None, :, None] - x[:, None, :]) ** 2  # (n, size, P)
    down = (centres[None, :, None] - y[:, None, :]) ** 2
    squared = np.min(down[:, :, None, :] + across[:, None, :, :], axis=3)  # (n, size, size)
    edge = 0.5 / size  # half a pixel of antialiasing to either side
    ink = np.clip((pens[:, None, None] + edge - np.sqrt(squared)) / (2 * edge), 0, 1)
    grey: np.ndarray = np.round(255 * (1 - inks[:, None, None] * ink)).astype(np.uint8)
    return grey


def glyph_dataset(
    *,
    train: int = 256,
    val: int = 64,
    test: int = 64,
    images_per_class: int = 20,
    size: int = 28,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Dataset:
    """Draw a data set with as many `train`, `val` and `test` classes, all different, at `size` pixels.

    `progress` is told the number of classes drawn so far.
    """
    splits, first, total = {}, 0, train + val + test
    for name, count in (("train", train), ("val", val), ("test", test)):
        names = tuple(f"glyph-{first + c:04d}" for c in range(count))
        drawn = []
        for c in range(count):
            drawn.append(draw_class(first + c, images_per_class, size, seed))
            progress(first + c + 1, total)
        labels = tuple(int(label) for label in np.repeat(np.arange(count), images_per_class))
        paths = tuple(f"glyphs/{cls}/{i:02d}" for cls in names for i in range(images_per_class))
        splits[name] = Split(name, names, paths, labels, "glyphs", np.concatenate(drawn))
        first += count
    return Dataset("glyphs", "glyphs", splits)
