"""`metadiff export`: a saved classifier for runtimes without Python."""

from pathlib import Path

import torch

from metadiff_cli.commands.settings import check_new
from metadiff_cli.console import Screen
from metadiff_cli.core.checkpoints.classifier import load_classifier
from metadiff_cli.core.checkpoints.onnx import export_onnx, require_exporter
from metadiff_cli.errors import ConfigError


def export_classifier(file: Path, onnx: Path, screen: Screen, *, overwrite: bool, as_json: bool) -> None:
    """Write the classifier in `file` as an ONNX graph, and say what goes in and out.

    Raises ConfigError when `onnx` cannot be written or the exporter is not installed, CheckpointError when `file` is no
    saved classifier, and MetaDiffError when the graph computes something else.
    """
    check_new(onnx, overwrite=overwrite)
    if onnx.exists() and file.exists() and onnx.samefile(file):
        raise ConfigError(f"--onnx {onnx} would replace the classifier itself", hint="give another name")
    require_exporter()
    classifier = load_classifier(file, torch.device("cpu"))
    with screen.progress("exporting"):
        difference = export_onnx(classifier, onnx)
    if difference is None:
        screen.warn("the graph was not compared with metadiff's results: onnxruntime of the extra [onnx] is missing")
    rejects = classifier.model.metadiff.tuning.rejection is not None
    size, classes = classifier.model.images.size, list(classifier.classes)
    if as_json:
        screen.json({
            "schema": "metadiff.export/1", "file": str(onnx), "classes": classes,
            "input": {"name": "pixels", "type": "uint8", "shape": ["n", size, size, 3]},
            "output": {"name": "probabilities", "type": "float32", "shape": ["n", len(classes)]},
            "margins": {"name": "margins", "type": "float32", "shape": ["n"]} if rejects else None,
            "difference": difference,
        })  # fmt: skip
        return
    outputs = f"probabilities (n, {len(classes)}){', margins (n)' if rejects else ''}"
    screen.text(f"{onnx}: pixels (n, {size}, {size}, 3) uint8 RGB -> {outputs} float32")
    if difference is not None:
        screen.text(f"differs from metadiff by {difference:.0e} at most, under onnxruntime")
