"""Checkpoints: one safetensors file each, self-describing, written atomically.

Format 1. A single metadata key, `metadiff`, holds sorted JSON (several keys would be written in random order, and equal
weights would not give equal bytes). Its fields: `format`, `kind` (see KINDS), `package` (version), and
what the kind needs: `config`, `classes`, `image` (size, mean, std), `encoder`, `metrics`.
"""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from metadiff_cli import __version__
from metadiff_cli.core.checkpoints.layout import check_layout, parse_json
from metadiff_cli.errors import CheckpointError
from metadiff_cli.files import atomic, usual_mode

FORMAT = 1
KEY = "metadiff"
KINDS = {
    "encoder": "an encoder (from `metadiff pretrain`)",
    "model": "a full model (from `metadiff metatrain`)",
    "baseline": "a trained baseline (from `metadiff metatrain --method`)",
    "classifier": "an adapted classifier (from `metadiff adapt --save`)",
    "state": "the state of an unfinished training",
}


@dataclass(frozen=True)
class Checkpoint:
    """A file that was read: its header and its tensors by name."""

    path: str
    header: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def kind(self) -> str:
        """One of KINDS."""
        return str(self.header["kind"])

    def part(self, prefix: str) -> dict[str, Tensor]:
        """Tensors whose name begins with `prefix.`, without it."""
        return {name[len(prefix) + 1 :]: t for name, t in self.tensors.items() if name.startswith(prefix + ".")}


def save_checkpoint(path: Path, kind: str, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    """Write a checkpoint of `kind`; the same tensors and header give the same bytes. Raises OSError."""
    assert kind in KINDS, kind
    full = {**header, "format": FORMAT, "kind": kind, "package": __version__}
    text = json.dumps(full, sort_keys=True, ensure_ascii=False, allow_nan=False)
    # a clone of each: safetensors refuses tensors that share memory, and views would be written whole
    plain = {name: t.detach().to("cpu").contiguous().clone() for name, t in tensors.items()}
    write_tensors(path, plain, {KEY: text})


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file, written atomically. Raises OSError."""
    with atomic(path) as temporary:
        try:
            save_file(tensors, temporary, metadata=metadata)
        except SafetensorError as error:
            raise _system_error(error) from error
        temporary.chmod(usual_mode())  # safetensors puts a file of its own there


def _system_error(error: SafetensorError) -> OSError:
    """What the system said, of which safetensors keeps the text."""
    found = re.search(r"os error (\d+)", str(error))
    return OSError(int(found[1]), os.strerror(int(found[1]))) if found else OSError(str(error))


def load_checkpoint(path: Path, kind: str | None = None) -> Checkpoint:
    """Read a checkpoint. Raises CheckpointError when it is missing, damaged, foreign, or not of `kind`."""
    header = read_header(path)
    found = header["kind"]
    if kind is not None and found != kind:
        hint = "make one with `metadiff metatrain`" if kind == "model" else f"give {KINDS[kind]}"
        raise CheckpointError(f"{path} is {KINDS[found]}, not {KINDS[kind]}", hint=hint)
    try:
        with safe_open(path, framework="pt") as file:
            return Checkpoint(str(path), header, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read ({error})", hint="copy or make it again") from error


def read_header(path: Path) -> dict[str, Any]:
    """The JSON header alone, checked; see load_checkpoint for the errors."""
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise CheckpointError(f"checkpoint {path} {what}", hint="give the .safetensors file of a run")
    try:
        _refuse_foreign(path)
        metadata = check_layout(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})", hint="check its permissions") from error
    return _checked_header(path, metadata.get(KEY))


def _checked_header(path: Path, text: str | None) -> dict[str, Any]:
    if text is None:
        raise CheckpointError(
            f"{path} is a safetensors file without a metadiff header",
            hint="give a file that `metadiff pretrain` or `metadiff metatrain` wrote",
        )
    header = parse_json(path, text)
    if not isinstance(header.get("kind"), str) or header["kind"] not in KINDS:
        raise CheckpointError(f"{path} has a header of an unknown kind", hint="a newer metadiff may read it")
    classes = header.get("classes", [])
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise CheckpointError(f"{path} has a damaged header (its classes are no names)", hint="copy or make it again")
    if header.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} has checkpoint format {header.get('format')!r:.40}, and metadiff {__version__} reads {FORMAT}",
            hint="install the metadiff that wrote it, or make the checkpoint again",
        )
    return header


def _refuse_foreign(path: Path) -> None:
    """Name the common mistake: a pickle or an archive under our extension. Nothing is unpickled."""
    with path.open("rb") as file:
        start, brace = file.read(8), file.read(1)
    # a safetensors file begins with the length of its header, which may well be 0x80 modulo 256, and then a brace
    if brace != b"{" and (start[:2] == b"PK" or start[:1] == b"\x80"):
        raise CheckpointError(
            f"{path} is a Python pickle (a .pt or .pth file), not safetensors",
            hint="metadiff never opens pickles; give a checkpoint that metadiff wrote",
        )
    if len(start) < 8 or int.from_bytes(start, "little") > os.path.getsize(path) - 8:
        raise CheckpointError(f"{path} is no safetensors file, or is truncated", hint="copy or make it again")
