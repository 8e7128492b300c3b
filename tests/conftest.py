"""Shared fixtures: an isolated cache, the command line in this process, small images, one small trained model."""

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from metadiff_cli.app import run

SMALL = [
    "--set", "data.glyphs.train=12", "--set", "data.glyphs.val=8", "--set", "data.glyphs.test=8",
    "--set", "data.glyphs.images_per_class=12", "--set", "pretrain.epochs=2", "--set", "pretrain.batch=16",
    "--set", "metatrain.steps=6", "--set", "metatrain.batch=4", "--set", "metatrain.validate_every=3",
    "--set", "metatrain.validation_episodes=20", "--set", "evaluation.episodes=20", "--set", "evaluation.query=5",
    "--set", "denoiser.width=32",
]  # fmt: skip


@dataclass(frozen=True)
class Result:
    """Of one command: exit code, stdout, stderr."""

    code: int
    out: str
    err: str


def invoke(*arguments: str | Path, stdin: str = "") -> Result:
    """Run the command line in this process, as the console script does, with stdout and stderr apart."""
    out, err, previous = io.StringIO(), io.StringIO(), sys.stdin
    sys.stdin = io.StringIO(stdin)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = run([str(a) for a in arguments])
    finally:
        sys.stdin = previous
    return Result(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="session", autouse=True)
def isolated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or writes the person's cache, data or settings."""
    kept = {k: v for k, v in os.environ.items() if k.startswith("METADIFF_")}
    for key in kept:
        del os.environ[key]
    os.environ["METADIFF_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["METADIFF_DATA_DIR"] = str(tmp_path_factory.mktemp("data"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(min(2, cores))  # two threads on one core wait for each other, and take many times as long
    yield
    os.environ.update(kept)


@pytest.fixture
def cli() -> Callable[..., Result]:
    """The command line: cli("adapt", "--help") -> Result."""
    return invoke


def paint(path: Path, colour: tuple[int, int, int], seed: int, size: int = 40) -> None:
    """A noisy picture of one colour."""
    rng = np.random.default_rng(seed)
    pixels = np.clip(np.array(colour) + rng.normal(0, 30, (size, size, 3)), 0, 255).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 50, 220), "grey": (128, 128, 128)}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """support/<colour>/* with unequal numbers of images, and query/* named by their colour."""
    for c, (name, colour) in enumerate(COLOURS.items()):
        for i in range(1 + c):
            paint(tmp_path / "support" / name / f"{i}.png", colour, seed=10 * c + i)
        paint(tmp_path / "query" / f"{name}.png", colour, seed=1000 + c)
    return tmp_path


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a whole `metatrain` on a few small glyphs."""
    out = tmp_path_factory.mktemp("runs") / "small"
    result = invoke("metatrain", "--preset", "glyphs-5w1s", "--out", out, "--json", *SMALL)
    assert result.code == 0, result.err
    return out


@pytest.fixture(scope="session")
def checkpoint(small_run: Path) -> Path:
    """Its checkpoint."""
    return small_run / "checkpoint.safetensors"
