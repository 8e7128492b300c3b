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
from tests.worlds import Result

CLI = Callable[..., Result]
Graph = tuple[Path, dict[str, Any]]
NEEDED = "the extra [onnx] is not installed"


def test_pixels_in_the_probabilities_of_adapt_out(saved_classifier: Path, graph: Graph) -> None:
    stored = load_classifier(saved_classifier, torch.device("cpu"))
    saved, rejector = stored.classifier, stored.rejector()
    assert len(saved.task.weights) == 2 and rejector is not None
    files = sorted((saved_classifier.parent / "query").iterdir())
    pixels = torch.from_numpy(np.stack([load_square(file, saved.images.size) for file in files]))
    run = export.open_graph(graph[0])
    assert run is not None
    z = saved.images.encode(pixels)
    ours, margins = saved.probabilities(z), rejector.margins(saved.task.metric.expand(z).unsqueeze(0))[0]
    assert float(ours.max() - ours.min()) > 0.05  # or agreement would mean little
    for rows in (slice(None), slice(1, 2)):
        found, found_margins = run(pixels[rows])
        assert torch.allclose(found, ours[rows], rtol=0, atol=export.TOLERANCE)
        assert torch.allclose(found_margins, margins[rows], rtol=0, atol=export.MARGIN_TOLERANCE)


def test_the_file_says_what_it_is(saved_classifier: Path, graph: Graph) -> None:
    path, document = graph
    saved = load_classifier(saved_classifier, torch.device("cpu")).classifier
    runtime = pytest.importorskip("onnxruntime", reason=NEEDED)
    session = runtime.InferenceSession(str(path))
    kept = session.get_modelmeta().custom_metadata_map
    facts = json.loads(kept["metadiff"])
    assert json.loads(kept["classes"]) == list(saved.classes) == document["classes"]
    assert facts["settings"] == settings_header(saved.task.settings)
    assert facts["pixels"]["size"] == saved.images.size == session.get_inputs()[0].shape[1]
    assert facts["support"] == dict.fromkeys(saved.classes, 1) and len(facts["pictures"]) == len(saved.classes)
    assert document["margins"]["shape"] == ["n"] and facts["rejection"]["false_rejection_rate"] == 0.05
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
    cli: CLI,
    saved_classifier: Path,
    graph: Graph,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(export, "_traced", lambda classifier: Traced(graph[0]))
    assert cli("export", saved_classifier, "--onnx", tmp_path / "same.onnx").code == 0
    exact = export.open_graph(graph[0])
    assert exact is not None
    for output in (0, 1):  # the probabilities, the margins

        def wrong(pixels: torch.Tensor, output: int = output) -> tuple[torch.Tensor, ...]:
            return tuple(found + 0.1 * (number == output) for number, found in enumerate(exact(pixels)))

        monkeypatch.setattr(export, "open_graph", lambda path, wrong=wrong: wrong)
        result = cli("export", saved_classifier, "--onnx", tmp_path / "x.onnx")
        assert result.code == 1 and f"the {('probabilities', 'margins')[output]} of the ONNX graph" in result.err
    assert [path.name for path in tmp_path.iterdir()] == ["same.onnx"]


def test_without_onnxruntime_it_says_that_nothing_was_compared(
    cli: CLI,
    saved_classifier: Path,
    graph: Graph,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(export, "_traced", lambda classifier: Traced(graph[0]))
    monkeypatch.setattr(export, "open_graph", lambda path: None)
    result = cli("export", saved_classifier, "--onnx", tmp_path / "x.onnx", "--json")
    assert result.code == 0 and "onnxruntime" in result.err
    assert json.loads(result.out)["difference"] is None


def test_what_cannot_be_exported(
    cli: CLI, saved_classifier: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "x.onnx"
    monkeypatch.setattr(export, "require_exporter", lambda: None)
    model = cli("export", checkpoint, "--onnx", out)
    assert model.code == 4 and "adapt --save" in model.err
    assert cli("export", tmp_path / "gone.safetensors", "--onnx", out).code == 4
    out.write_text("kept")
    assert (refused := cli("export", saved_classifier, "--onnx", out)).code == 2 and "--overwrite" in refused.err
    assert cli("export", saved_classifier, "--onnx", tmp_path, "--overwrite").code == 2
    (tmp_path / "link.onnx").symlink_to(saved_classifier)
    for same in (saved_classifier, tmp_path / "link.onnx"):
        assert "the classifier itself" in cli("export", saved_classifier, "--onnx", same, "--overwrite").err
    assert cli("inspect", saved_classifier).code == 0
    assert out.read_text() == "kept"


def test_a_missing_extra_is_named(
    cli: CLI, saved_classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("metadiff_cli.core.encoders.graphs.find_spec", lambda name: None)
    result = cli("export", saved_classifier, "--onnx", tmp_path / "x.onnx")
    assert result.code == 2 and "onnxscript" in result.err and "[onnx]: pip install" in result.err
