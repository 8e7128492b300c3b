"""Large folders and large feature banks: cost per image as they grow, peak memory, and how soon training starts.

Each number is from a process of its own. Times of images are those of the processor, which other processes do not
lengthen; the first step of a training is timed by the clock as well.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.benchmarks.common import Ratio, Report, Sizes, class_names

PER_FOLDER = 100  # images
MEMORY = 1500.0  # MB that a large folder may take
START = 10.0  # seconds


def images(sizes: Sizes) -> Report:
    """From a folder of tiny images to features, for growing numbers of images."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for count in sizes.large_images:
            place = Path(name) / str(count)
            _write_images(place / "images", count, sizes.large_side)
            found = _measured("images", place, sizes)
            each = [round(1e6 * found[stage] / count, 1) for stage in ("scan", "decode", "features")]
            rows.append((count, *each, round(sum(each), 1), round(found["peak"])))
    growth = rows[-1][4] / rows[0][4]
    return Report(
        f"Folders of {sizes.large_side} x {sizes.large_side} images to features, {sizes.encoder}, both views",
        ("images", "scan us", "decode us", "features us", "sum us", "peak MB"), rows,
        [Ratio(f"cost per image, {rows[-1][0]} / {rows[0][0]} images", growth, most=1.2),
         Ratio("peak memory in MB", max(row[5] for row in rows), most=MEMORY)],
        ("microseconds of processor time per image",),
    )  # fmt: skip


def bank(sizes: Sizes) -> Report:
    """From the start of a process to the first step of meta-training on a bank of random features."""
    shape = (sizes.large_classes * sizes.large_per_class, sizes.large_features)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        size = _write_bank(Path(name) / "bank.npy", shape)
        found = _measured("bank", Path(name), sizes)
        rows.append((round(size, 2), *(round(found[key], 1) for key in ("processor", "wall", "peak", "own"))))
    return Report(
        f"First step of meta-training, {sizes.large_classes} classes x {sizes.large_per_class}, D = {shape[1]}",
        ("bank MB", "processor s", "wall s", "peak MB", "own MB"), rows,
        [Ratio("seconds to the first step", rows[0][2], most=START),
         Ratio("own memory / bank", rows[0][4] / rows[0][0], most=0.5)],
        ("imports included; the peak counts what is mapped of the bank, the process's own memory at the end does not",),
    )  # fmt: skip


def _measured(what: str, place: Path, sizes: Sizes) -> dict[str, float]:
    command = [sys.executable, "-m", "tests.benchmarks.large", what, str(place), json.dumps(asdict(sizes))]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "STARTED": str(time.time())})
    if done.returncode != 0:
        raise RuntimeError(f"measuring {what} failed:\n{done.stderr}")
    found: dict[str, float] = json.loads(done.stdout)
    return found


def _write_images(root: Path, count: int, side: int) -> None:
    """`count` .png files of noise, PER_FOLDER in a folder."""
    rng = np.random.default_rng(0)
    for start in range(0, count, PER_FOLDER):
        folder = root / f"class{start // PER_FOLDER:06d}"
        folder.mkdir(parents=True)
        pixels = rng.integers(0, 256, (min(PER_FOLDER, count - start), side, side, 3), dtype=np.uint8)
        for i, single in enumerate(pixels):
            Image.fromarray(single).save(folder / f"{i:03d}.png", compress_level=1)


def _write_bank(path: Path, shape: tuple[int, int], rows: int = 10_000) -> float:
    """Unit-length random features; returns MB."""
    rng = np.random.default_rng(0)
    out = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    for start in range(0, shape[0], rows):
        z = rng.standard_normal((min(rows, shape[0] - start), shape[1]), dtype=np.float32)
        out[start : start + rows] = z / np.linalg.norm(z, axis=1, keepdims=True)
    out.flush()
    return max(path.stat().st_size / 1e6, 0.01)


def _to_features(place: Path, sizes: Sizes) -> dict[str, float]:
    """In the fresh process: seconds of each stage."""
    from metadiff_cli.core.device import keep_freed_memory
    from metadiff_cli.core.encoders.bank import build_bank
    from metadiff_cli.data.benchmarks import open_dataset
    from metadiff_cli.data.cache import decode_split
    from metadiff_cli.data.folders import require_split
    from tests.benchmarks.images import BATCH, frozen_encoder

    keep_freed_memory()
    encoder, seconds = frozen_encoder(sizes, sizes.large_side), {}
    encoder.encode(_some_pixels(sizes))  # the first pass sets things up
    clock = _Clock()
    split = require_split(open_dataset(place / "images"), "all")
    seconds["scan"] = clock()
    decoded = decode_split(split, sizes.large_side, place / "decoded")
    seconds["decode"] = clock()
    build_bank(
        encoder, decoded.images, decoded.labels, decoded.classes, folder=place / "features", key=decoded.key,
        batch=BATCH,
    )  # fmt: skip
    seconds["features"] = clock()
    return seconds


def _some_pixels(sizes: Sizes) -> Any:
    import torch

    return torch.zeros(2, sizes.large_side, sizes.large_side, 3, dtype=torch.uint8)


def _first_step(place: Path, sizes: Sizes) -> dict[str, float]:
    """In the fresh process: what `metatrain` does between a bank that is there and the end of the first step."""
    from metadiff_cli.config.schema import MetatrainConfig
    from metadiff_cli.core.encoders.bank import FeatureBank
    from tests.benchmarks.learning import trainer_on

    features = np.load(place / "bank.npy", mmap_mode="r")
    labels = np.repeat(np.arange(sizes.large_classes), sizes.large_per_class)
    bank = FeatureBank(features, labels, class_names(sizes.large_classes))
    trainer, _ = trainer_on(bank, MetatrainConfig(batch=sizes.batch, steps=1, query=sizes.query))
    next(iter(trainer.run(lambda denoiser: None)))
    return {"processor": time.process_time(), "wall": time.time() - float(os.environ["STARTED"])}


class _Clock:
    """Seconds of processor time since the last call."""

    def __init__(self) -> None:
        self.last = time.process_time()

    def __call__(self) -> float:
        before, self.last = self.last, time.process_time()
        return self.last - before


WORKS: dict[str, Callable[[Path, Sizes], dict[str, float]]] = {"images": _to_features, "bank": _first_step}


def _child(what: str, place: Path, values: dict[str, Any]) -> dict[str, float]:
    from tests.benchmarks.learning import private_megabytes, resident_megabytes

    sizes = Sizes(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})
    found = WORKS[what](place, sizes)
    return {**found, "peak": resident_megabytes(peak=True), "own": private_megabytes()}


if __name__ == "__main__":
    print(json.dumps(_child(sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3]))))
