"""`metadiff inspect`: what a checkpoint holds."""

from pathlib import Path
from typing import Annotated

import typer

from metadiff_cli.commands import options
from metadiff_cli.commands.card import card_lines
from metadiff_cli.console import Screen


def inspect(
    file: Annotated[
        Path | None,
        typer.Argument(help=options.shown("A .safetensors file that metadiff wrote.", "the package's checkpoint")),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Show what a checkpoint holds.

    First its model card, then kind, classes, image size, settings, metrics.

    Examples:

      metadiff inspect

      metadiff inspect runs/mini/encoder.safetensors --json
    """
    import yaml

    from metadiff_cli.core.checkpoint import read_header

    file = options.checkpoint_path(file)
    header = read_header(file)
    screen = Screen()
    if as_json:
        screen.json({"schema": "metadiff.inspect/1", "file": str(file), **header})
        return
    shown = dict(header)
    if classes := header.get("classes", []):  # a library's encoder and a training state have none
        shown["classes"] = f"{len(classes)}: {', '.join(classes[:5])}{', ...' if len(classes) > 5 else ''}"
    shown.pop("plain", None)
    if (card := shown.pop("card", None)) is not None:
        screen.text("\n".join(card_lines(card)) + "\n")
    screen.text(yaml.safe_dump(shown, sort_keys=False, allow_unicode=True, default_flow_style=None).rstrip("\n"))
