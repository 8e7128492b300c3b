"""`metadiff inspect`: what a checkpoint holds."""

from pathlib import Path
from typing import Annotated

import typer

from metadiff_cli.commands import options
from metadiff_cli.console import Screen


def inspect(
    file: Annotated[Path, typer.Argument(help="A file that metadiff wrote.")], as_json: options.AsJson = False
) -> None:
    """Show the header of a checkpoint: kind, classes, image size, settings, metrics.

    Examples:

      metadiff inspect runs/mini/checkpoint.safetensors

      metadiff inspect runs/mini/encoder.safetensors --json
    """
    import yaml

    from metadiff_cli.core.checkpoint import read_header

    header = read_header(file)
    screen = Screen()
    if as_json:
        screen.json({"schema": "metadiff.inspect/1", "file": str(file), **header})
        return
    classes = header.get("classes", [])
    shown = {**header, "classes": f"{len(classes)}: {', '.join(classes[:5])}{', ...' if len(classes) > 5 else ''}"}
    shown.pop("plain", None)
    screen.text(yaml.safe_dump(shown, sort_keys=False, allow_unicode=True, default_flow_style=None).rstrip("\n"))
