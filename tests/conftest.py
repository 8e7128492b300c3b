"""Shared fixtures: an isolated cache, the command line in this process, small images, one small trained model."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.worlds import COLOURS, SMALL, Result, invoke, paint


@pytest.fixture(scope="session", autouse=True)
def isolated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or writes the person's cache, data or settings."""
    kept = {k: v for k, v in os.environ.items() if k.startswith("METADIFF_")}
    for key in kept:
        del os.environ[key]
    os.environ["METADIFF_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["METADIFF_DATA_DIR"] = str(tmp_path_factory.mktemp("data"))
    torch.set_num_threads(1)  # tensors are small, and threads that share a core wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start
    yield
    os.environ.update(kept)


@pytest.fixture
def cli() -> Callable[..., Result]:
    """The command line: cli("adapt", "--help") -> Result."""
    return invoke


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


@pytest.fixture(scope="session")
def saved_classifier(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved classifier of two averaged samples, with class names that are not all ASCII; query/*.png lie beside."""
    folder = tmp_path_factory.mktemp("export")
    for c, (name, colour) in enumerate(COLOURS.items()):
        paint(folder / "support" / f"{name} ß" / "1.png", colour, seed=c)
        paint(folder / "query" / f"{name}.png", colour, seed=100 + c)
    result = invoke("adapt", "-S", folder / "support", "-Q", folder / "query", "-c", checkpoint, "--samples", "2",
                    "--temperature", "1", "--save", folder / "mine.safetensors")  # fmt: skip
    assert result.code == 0, result.err
    return folder / "mine.safetensors"


@pytest.fixture(scope="session")
def graph(saved_classifier: Path) -> tuple[Path, dict[str, Any]]:
    """Its ONNX file, and what `export` said."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason="the extra [onnx] is not installed")
    out = saved_classifier.with_name("mine.onnx")
    result = invoke("export", saved_classifier, "--onnx", out, "--json")
    assert result.code == 0, result.err
    return out, json.loads(result.out)
