"""`metadiff inspect`: what a file of metadiff holds."""

import json
from pathlib import Path
from typing import Any

import yaml

from metadiff_cli.commands.train.card import card_lines
from metadiff_cli.console import Screen
from metadiff_cli.core.checkpoints.file import read_header
from metadiff_cli.data.hub import fetch
from metadiff_cli.errors import CheckpointError, DataError
from metadiff_cli.files import checkpoint_path

FIRST = ("kind", "encoder", "image", "classes")
FOR_PROGRAMS = ("plain", "depends")  # entries of a training state that no person reads
OF_A_RUN = ("checkpoint.safetensors", "encoder.safetensors", "result.json")
MAX_DOCUMENT = 16 * 2**20  # bytes of a JSON document; a result has a few kilobytes


def show_file(file: Path | None, screen: Screen, *, as_json: bool) -> None:
    """Print the contents of a file, or of the packaged checkpoint. Raises DataError or CheckpointError."""
    file = checkpoint_path(fetch(file, screen.note))
    held = read_document(file) if file.suffix.lower() == ".json" else read_model(file)
    if as_json:
        screen.json({"schema": "metadiff.inspect/1", "file": str(file), **held})
        return
    shown: dict[str, Any] = {key: held[key] for key in FIRST if key in held} | held
    if classes := held.get("classes", []):  # a library's encoder and a training state have none
        shown["classes"] = f"{len(classes)}: {', '.join(classes[:5])}{', ...' if len(classes) > 5 else ''}"
    shown = {key: value for key, value in shown.items() if key not in FOR_PROGRAMS}
    if (card := shown.pop("card", None)) is not None:
        screen.text("\n".join(card_lines(card)) + "\n")
    screen.text(yaml.safe_dump(shown, sort_keys=False, allow_unicode=True, default_flow_style=None).rstrip("\n"))


def read_model(path: Path) -> dict[str, Any]:
    """The header of a checkpoint or classifier. Raises CheckpointError for a folder and for any other file."""
    if path.is_dir():
        inside = [name for name in OF_A_RUN if (path / name).is_file()]
        raise CheckpointError(f"{path} is a folder", hint=f"give a file, such as {path / (inside or OF_A_RUN)[0]}")
    try:
        return read_header(path)
    except CheckpointError as error:
        if path.suffix.lower() == ".safetensors" or not path.is_file():
            raise
        raise CheckpointError(
            f"{path} is not a file that inspect reads",
            hint="give a .safetensors file, or the result.json or manifest.json of a run",
        ) from error


def read_document(path: Path) -> dict[str, Any]:
    """A result or a manifest with its `kind`. Raises DataError for any other file."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_DOCUMENT)
        if not content:
            raise DataError(f"{path} is empty", hint="copy it or make it again")
        document = json.loads(content)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})", hint="check its name and permissions") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not a JSON document ({error})", hint="copy it or make it again") from error
    if isinstance(document, dict) and str(document.get("schema", "")).startswith("metadiff."):
        return {"kind": "result", "result": document}
    if isinstance(document, dict) and {"command", "arguments", "versions"} <= set(document):
        return {"kind": "manifest", "result": document}
    raise DataError(f"{path} was not written by metadiff", hint="give a checkpoint, a classifier or a result.json")
