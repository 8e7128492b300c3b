"""Sizes, reports, timing of alternatives side by side, and worlds of random features and images."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from metadiff_cli.core.encoders.bank import FeatureBank, PixelBank

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Sizes:
    """How large everything is. The defaults are those of mini-ImageNet with conv4, 5-way 1-shot."""

    features: int = 1600
    classes: int = 64
    per_class: int = 60
    noise: float = 5.0  # of an image, where a class mean has 1
    way: int = 5
    shot: int = 1
    query: int = 15
    batch: int = 32  # tasks of a training step
    inner: tuple[int, ...] = (5, 10, 100, 1000)
    memory_inner: tuple[int, ...] = (1, 5, 10, 50, 100, 1000)
    memory_limit: float = 4.0  # GB that one measurement may take
    allocator: str = "exact"  # of the memory benchmark: "exact" gives freed tensors back at once, or "default"
    image: int = 84
    encoder: str = "conv4"
    device: str = "cpu"  # of `pretraining`
    images: int = 3000  # of extraction
    pretrain_batch: int = 64
    pretrain_steps: int = 20  # a round
    train_steps: int = 300  # of the denoiser that is sampled from
    slow_steps: int = 1000  # of the long samplers
    fast_steps: int = 10  # of the short DDIM
    draw_steps: int = 100  # of the short DDPM
    samples: int = 16
    episodes: int = 600
    draw_episodes: int = 10
    method_features: int = 512  # of `episodes`, `latency`, `many-classes` and `flat`
    method_episodes: int = 1000
    method_classes: int = 200
    method_images: int = 20
    large_images: tuple[int, ...] = (1_000, 10_000, 100_000)
    large_side: int = 28  # pixels
    large_classes: int = 1000
    large_per_class: int = 1300
    large_features: int = 512
    soak_runs: int = 200
    soak_steps: int = 5000
    soak_processes: int = 32
    rounds: int = 3
    seconds: float = 2.0  # at least, of one timing


TINY = Sizes(
    features=16, classes=8, per_class=24, batch=2, query=2, inner=(1, 2), memory_inner=(2,), image=32, images=12,
    pretrain_batch=4, pretrain_steps=1, train_steps=2, slow_steps=4, fast_steps=2, draw_steps=3, samples=2, episodes=4,
    draw_episodes=2, large_images=(20,), large_classes=12, large_per_class=24, large_features=16, soak_runs=2,
    soak_steps=20, soak_processes=0, method_features=32, method_episodes=10, method_classes=12, method_images=4,
    rounds=1, seconds=0.0,
)  # fmt: skip


@dataclass(frozen=True)
class Ratio:
    """One number that a benchmark is about; `least` or `most` is what it should reach, None where nothing is asked."""

    name: str
    value: float
    least: float | None = None
    most: float | None = None

    @property
    def reached(self) -> bool | None:
        """Whether the bound holds; None without one."""
        if self.least is None and self.most is None:
            return None
        return (self.least is None or self.value >= self.least) and (self.most is None or self.value <= self.most)


@dataclass(frozen=True)
class Report:
    """A table of measurements and the ratios that follow from it; `series` is what a plot shows."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]
    ratios: list[Ratio]
    notes: tuple[str, ...] = ()
    series: Mapping[str, list[tuple[int, float]]] = field(default_factory=dict)


def rates(works: Mapping[str, Callable[[], int]], sizes: Sizes) -> dict[str, float]:
    """Units per second of each piece of work, which returns the units it did: the median of `rounds` timings.

    One is timed after the other within a round, so that a machine that slows down does so for all. An untimed first
    call of each is not counted.
    """
    found: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        work()
    for _ in range(sizes.rounds):
        for name, work in works.items():
            found[name].append(_rate(work, sizes.seconds))
    return {name: statistics.median(values) for name, values in found.items()}


def _rate(work: Callable[[], int], seconds: float) -> float:
    done, started = 0, time.perf_counter()
    while True:
        done += work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        passed = time.perf_counter() - started
        if passed >= seconds:
            return done / passed


def feature_bank(sizes: Sizes, seed: int = 0) -> FeatureBank:
    """Unit-length features of classes that overlap, so that accuracies are neither chance nor perfect."""
    rng = np.random.default_rng(seed)
    spread = np.linspace(2.0, 0.2, sizes.features) / np.sqrt(sizes.features)
    means = rng.normal(size=(sizes.classes, 1, sizes.features)) * spread
    noise = rng.normal(size=(sizes.classes, sizes.per_class, sizes.features)) * sizes.noise * spread[::-1]
    z = (means + noise).reshape(-1, sizes.features).astype(np.float32)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    return FeatureBank(z, np.repeat(np.arange(sizes.classes), sizes.per_class), class_names(sizes.classes))


def pixel_bank(sizes: Sizes) -> PixelBank:
    """Random images (n, S, S, 3) uint8 in as many classes."""
    rng = np.random.default_rng(0)
    count = sizes.classes * min(sizes.per_class, sizes.shot + sizes.query)
    pixels = rng.integers(0, 256, (count, sizes.image, sizes.image, 3), dtype=np.uint8)
    return PixelBank(pixels, np.repeat(np.arange(sizes.classes), count // sizes.classes), class_names(sizes.classes))


def class_names(count: int) -> tuple[str, ...]:
    """Names of as many classes."""
    return tuple(f"c{i}" for i in range(count))


def write_images(folder: Path, count: int, size: int, seed: int) -> None:
    """`count` .webp files of soft random colours: noise alone would decode far more slowly than photos do."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
        coarse.resize((size, size), Image.Resampling.BICUBIC).save(folder / f"{i:05d}.webp", quality=90)
