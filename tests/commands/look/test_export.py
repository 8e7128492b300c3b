"""`metadiff export`: the ONNX graph computes what metadiff computes, says what it is, and is written whole or not."""

import json
import shutil
from collections.abc import Callable
from importlib.resources import files as resources
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from jsonschema import Draft202012Validator

from metadiff_cli.core.checkpoints import onnx as export
from metadiff_cli.core.checkpoints.classifier import load_classifier, settings_header
from metadiff_cli.data.images import load_square
from tests.worlds import COLOURS, Result, invoke, paint

CLI = Callable[..., Result]
NEEDED = "the extra [onnx] is not installed"


@pytest.fixture(scope="module")
def classifier(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved classifier of two averaged samples, with class names that are not all ASCII."""
    folder = tmp_path_factory.mktemp("export")
    for c, (name, colour) in enumerate(COLOURS.items()):
        paint(folder / "support" / f"{name} ß" / "1.png", colour, seed=c)
        paint(folder / "query" / f"{name}.png", colour, seed=100 + c)
    result = invoke("adapt", "-S", folder / "support", "-Q", folder / "query", "-c", checkpoint, "--samples", "2",
                    "--temperature", "1", "--save", folder / "mine.safetensors")  # fmt: skip
    assert result.code == 0, result.err
    return folder / "mine.safetensors"


@pytest.fixture(scope="module")
def graph(classifier: Path) -> tuple[Path, dict[str, Any]]:
    """Its ONNX file, and what the command said."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason=NEEDED)
    out = classifier.with_name("mine.onnx")
    result = invoke("export", classifier, "--onnx", out, "--json")
    assert result.code == 0, result.err
    return out, json.loads(result.out)


def test_pixels_in_the_probabilities_of_adapt_out(classifier: Path, graph: tuple[Path, dict[str, Any]]) -> None:
    saved = load_classifier(classifier, torch.device("cpu")).classifier
    assert len(saved.task.weights) == 2
    files = sorted((classifier.parent / "query").iterdir())
    pixels = torch.from_numpy(np.stack([load_square(file, saved.images.size) for file in files]))
    run = export.open_graph(graph[0])
    assert run is not None
    ours = saved.probabilities(saved.images.encode(pixels))
    assert float(ours.max() - ours.min()) > 0.05  # or agreement would mean little
    assert torch.allclose(run(pixels), ours, rtol=0, atol=export.TOLERANCE)
    assert torch.allclose(run(pixels[1:2]), ours[1:2], rtol=0, atol=export.TOLERANCE)


def test_the_file_says_what_it_is(classifier: Path, graph: tuple[Path, dict[str, Any]]) -> None:
    path, document = graph
    saved = load_classifier(classifier, torch.device("cpu")).classifier
    runtime = pytest.importorskip("onnxruntime", reason=NEEDED)
    session = runtime.InferenceSession(str(path))
    kept = session.get_modelmeta().custom_metadata_map
    facts = json.loads(kept["metadiff"])
    assert json.loads(kept["classes"]) == list(saved.classes) == document["classes"]
    assert facts["settings"] == settings_header(saved.task.settings)
    assert facts["image"]["size"] == saved.images.size == session.get_inputs()[0].shape[1]
    Draft202012Validator(json.loads((resources("metadiff_cli.schemas") / "export-1.json").read_text())).validate(
        document
    )
    assert document["difference"] <= export.TOLERANCE
    assert [p.name for p in path.parent.glob("*.onnx*")] == [path.name]  # no weights beside it


class Traced:
    """Stands in for torch's program of a classifier, as tracing takes seconds: saving copies a graph."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.model = SimpleNamespace(metadata_props={})

    def save(self, path: str, *, external_data: bool) -> None:
        shutil.copyfile(self.path, path)


def test_a_graph_that_differs_is_not_written(
    cli: CLI, classifier: Path, graph: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "_traced", lambda classifier: Traced(graph[0]))
    assert cli("export", classifier, "--onnx", tmp_path / "same.onnx").code == 0
    monkeypatch.setattr(export, "open_graph", lambda path: lambda pixels: torch.zeros(len(pixels), len(COLOURS)))
    result = cli("export", classifier, "--onnx", tmp_path / "x.onnx")
    assert result.code == 1 and "differs" in result.err
    assert [path.name for path in tmp_path.iterdir()] == ["same.onnx"]


def test_without_onnxruntime_it_says_that_nothing_was_compared(
    cli: CLI, classifier: Path, graph: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "_traced", lambda classifier: Traced(graph[0]))
    monkeypatch.setattr(export, "open_graph", lambda path: None)
    result = cli("export", classifier, "--onnx", tmp_path / "x.onnx", "--json")
    assert result.code == 0 and "onnxruntime" in result.err
    assert json.loads(result.out)["difference"] is None


def test_what_cannot_be_exported(
    cli: CLI, classifier: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "x.onnx"
    monkeypatch.setattr(export, "require_exporter", lambda: None)
    model = cli("export", checkpoint, "--onnx", out)
    assert model.code == 4 and "adapt --save" in model.err
    assert cli("export", tmp_path / "gone.safetensors", "--onnx", out).code == 4
    out.write_text("kept")
    assert (refused := cli("export", classifier, "--onnx", out)).code == 2 and "--overwrite" in refused.err
    assert cli("export", classifier, "--onnx", tmp_path, "--overwrite").code == 2
    (tmp_path / "link.onnx").symlink_to(classifier)
    for same in (classifier, tmp_path / "link.onnx"):
        assert "the classifier itself" in cli("export", classifier, "--onnx", same, "--overwrite").err
    assert cli("inspect", classifier).code == 0
    assert out.read_text() == "kept"


def test_a_missing_extra_is_named(cli: CLI, classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metadiff_cli.core.encoders.graphs.find_spec", lambda name: None)
    result = cli("export", classifier, "--onnx", tmp_path / "x.onnx")
    assert result.code == 2 and "onnxscript" in result.err and "[onnx]: pip install" in result.err
