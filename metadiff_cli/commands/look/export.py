"""`metadiff export`: a saved classifier for runtimes without Python."""

from pathlib import Path
from typing import Annotated

import typer

from metadiff_cli.commands import options
from metadiff_cli.console import Screen


def export(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A classifier that `metadiff adapt --save` wrote.")],
    onnx: Annotated[
        Path, typer.Option("--onnx", metavar="FILE", help="ONNX file to write.", rich_help_panel=options.PLACES)
    ],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the file of --onnx.", rich_help_panel=options.PLACES)
    ] = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Write a saved classifier as one ONNX graph.

    It goes from pixels to class probabilities, for runtimes without Python, and
    needs the extra \\[onnx]. The input `pixels` is uint8 (n, S, S, 3): RGB images
    whose central square is resized to S x S; the rest is inside. Class names
    and calibration are in the file's metadata. With onnxruntime the graph is
    compared with metadiff's own probabilities, and nothing is written when they
    differ by more than 1e-4.

    Examples:

      metadiff export pets.safetensors --onnx pets.onnx

      metadiff export pets.safetensors --onnx pets.onnx --overwrite --json
    """
    screen = Screen(quiet=quiet)
    options.check_new(onnx, overwrite=overwrite)
    import torch

    from metadiff_cli.core.checkpoints.classifier import load_classifier
    from metadiff_cli.core.checkpoints.onnx import export_onnx, require_exporter

    require_exporter()
    classifier = load_classifier(file, torch.device("cpu")).classifier
    with screen.progress("exporting"):
        difference = export_onnx(classifier, onnx)
    if difference is None:
        screen.warn("not compared with metadiff's own results: that needs onnxruntime, from the extra [onnx]")
    size, classes = classifier.images.size, list(classifier.classes)
    if as_json:
        screen.json({
            "schema": "metadiff.export/1", "file": str(onnx), "classes": classes,
            "input": {"name": "pixels", "type": "uint8", "shape": ["n", size, size, 3]},
            "output": {"name": "probabilities", "type": "float32", "shape": ["n", len(classes)]},
            "difference": difference,
        })  # fmt: skip
        return
    screen.text(f"{onnx}: pixels (n, {size}, {size}, 3) uint8 RGB -> probabilities (n, {len(classes)}) float32")
    if difference is not None:
        screen.text(f"agrees with metadiff within {difference:.0e} under onnxruntime")
