"""`metadiff inspect`: what a file of metadiff holds."""

from pathlib import Path
from typing import Annotated, Any

import typer

from metadiff_cli.commands import options
from metadiff_cli.commands.look.files import describe
from metadiff_cli.commands.train.card import card_lines
from metadiff_cli.console import Screen
from metadiff_cli.files import checkpoint_path

FIRST = ("kind", "encoder", "image", "classes")


def inspect(
    file: Annotated[
        Path | None,
        typer.Argument(help=options.shown("A file that metadiff wrote.", "the package's checkpoint")),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Show what a file of metadiff holds.

    Of a checkpoint first its model card, then kind, classes, image size,
    settings, metrics. Also of saved classifiers, results (.json), settings
    (.yaml), measurements of a training (.csv), exported graphs (.onnx), and
    features of the cache (.npy).

    Examples:

      metadiff inspect

      metadiff inspect runs/mini/encoder.safetensors --json
    """
    import yaml

    from metadiff_cli.core.checkpoints.file import read_header

    file = checkpoint_path(file)
    header = describe(file) or read_header(file)
    screen = Screen()
    if as_json:
        screen.json({"schema": "metadiff.inspect/1", "file": str(file), **header})
        return
    shown: dict[str, Any] = {key: header[key] for key in FIRST if key in header} | header
    if classes := header.get("classes", []):  # a library's encoder and a training state have none
        shown["classes"] = f"{len(classes)}: {', '.join(classes[:5])}{', ...' if len(classes) > 5 else ''}"
    for key in ("plain", "depends"):  # of a training state: they are for the program
        shown.pop(key, None)
    if (card := shown.pop("card", None)) is not None:
        screen.text("\n".join(card_lines(card)) + "\n")
    screen.text(yaml.safe_dump(shown, sort_keys=False, allow_unicode=True, default_flow_style=None).rstrip("\n"))
