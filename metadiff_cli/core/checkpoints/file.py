"""Checkpoint files: one self-describing safetensors file each, written atomically.

Format 1. The metadata has two keys: `metadiff` holds sorted JSON, and `format` is `pt`, by which other programs know
the tensors of PyTorch. safetensors writes several keys in random order, so they are sorted afterwards: equal weights
give equal bytes. Our JSON has `format`, `kind` (one of KINDS) and `package` (the version that wrote it). What else it
holds depends on its kind: see model.py, classifier.py and baseline.py.

safetensors itself refuses files whose header does not fit their tensors. This module adds limits on sizes, and errors
that name common mistakes.
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import from_json
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from metadiff_cli._version import __version__
from metadiff_cli.errors import CheckpointError
from metadiff_cli.files import LFS_POINTER, atomic

FORMAT = 1
KEY = "metadiff"
FRAMEWORK = {"format": "pt"}  # what transformers, timm and the Hub look for in the metadata
MAX_FILE = 16 * 1024**3  # bytes; the largest encoders in use have 5 GB
MAX_HEADER = 16 * 1024**2  # bytes; ours have some kilobytes

KINDS = {
    "encoder": "an encoder (from `metadiff pretrain`)",
    "model": "a full model (from `metadiff metatrain`)",
    "baseline": "a trained baseline (from `metadiff metatrain --method`)",
    "classifier": "an adapted classifier (from `metadiff adapt --save`)",
    "state": "the state of an unfinished training",
}
USES = {  # for a hint, where another kind was wanted
    "encoder": "`metadiff metatrain --encoder` takes an encoder",
    "model": "`metadiff adapt --checkpoint` and `metadiff evaluate --checkpoint` take a model",
    "baseline": "`metadiff evaluate --checkpoint` takes a baseline",
    "classifier": "`metadiff adapt --classifier` takes a classifier",
    "state": "`--resume` goes on with it; what a run made so far is in the other .safetensors files beside it",
}


class Part(BaseModel):
    """Base of the parts of a header: no unknown keys, no conversion of types, no infinite numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @classmethod
    def of(cls, value: Any) -> Self:
        """The part in `value`, as JSON has it: lists for tuples. Raises ValueError."""
        return cls.model_validate_json(json.dumps(value))


class Header(Part):
    """What the header of every checkpoint holds; further keys depend on the kind."""

    model_config = ConfigDict(extra="ignore")

    kind: str
    package: str
    classes: list[str] = []


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint file: its header, and its tensors by name."""

    path: str
    header: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def kind(self) -> str:
        """One of KINDS."""
        return str(self.header["kind"])

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin with `prefix.`, by the rest of their names."""
        return {name[len(prefix) + 1 :]: t for name, t in self.tensors.items() if name.startswith(prefix + ".")}


def save_checkpoint(path: Path, kind: str, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    """Write a checkpoint of `kind`; the same tensors and header give the same bytes. Raises OSError."""
    assert kind in KINDS, kind
    full = {**header, "format": FORMAT, "kind": kind, "package": __version__}
    text = json.dumps(full, sort_keys=True, ensure_ascii=False, allow_nan=False)
    # a clone of each: safetensors refuses tensors that share memory, and would write the whole storage of a view
    plain = {name: t.detach().to("cpu").contiguous().clone() for name, t in tensors.items()}
    with atomic(path) as temporary:
        try:
            save_file(plain, temporary, metadata={KEY: text, **FRAMEWORK})
        except SafetensorError as error:
            raise _system_error(error) from error
        _sort_metadata(temporary)


def _sort_metadata(path: Path) -> None:
    """Write the metadata of a safetensors file in the order of its keys, in place; everything else stays as it is."""
    with path.open("rb+") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header = {"__metadata__": dict(sorted(header.pop("__metadata__").items())), **header}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= size, "the same keys and values in another order have the same length"
        file.seek(8)
        file.write(text.ljust(size))  # the format pads a header with spaces


def _system_error(error: SafetensorError) -> OSError:
    """The error of the system, such as a full disk, of which safetensors keeps only the text."""
    found = re.search(r"os error (\d+)", str(error))
    return OSError(int(found[1]), os.strerror(int(found[1]))) if found else OSError(str(error))


def load_checkpoint(path: Path, kind: str | None = None) -> Checkpoint:
    """Read a checkpoint onto the CPU.

    Raises CheckpointError if the file is missing, damaged, of another program, or not of `kind`.
    """
    header = read_header(path)
    found = header["kind"]
    if kind is not None and found != kind:
        raise CheckpointError(f"{path} is {KINDS[found]}, not {KINDS[kind]}", hint=USES[found])
    with open_tensors(path) as file:
        return Checkpoint(str(path), header, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118


def read_header(path: Path) -> dict[str, Any]:
    """Read and check the JSON header alone. Raises CheckpointError as `load_checkpoint` does."""
    with open_tensors(path) as file:
        text = (file.metadata() or {}).get(KEY)
    if text is None:
        raise CheckpointError(
            f"{path} is a safetensors file without a metadiff header",
            hint="give a file that `metadiff pretrain` or `metadiff metatrain` wrote",
        )
    return _checked(path, text)


def _checked(path: Path, text: str) -> dict[str, Any]:
    """The header in `text`. Raises CheckpointError if it is not one that this version reads."""
    try:
        header = from_json(text, allow_inf_nan=False)
        json.dumps(header, allow_nan=False)  # refuses 1e999, which the parser takes for infinity
        if isinstance(header, dict) and header.get("format") != FORMAT:
            raise CheckpointError(
                f"{path} has checkpoint format {header.get('format')!r:.40}, but metadiff {__version__} reads {FORMAT}",
                hint="install the metadiff that wrote it, or make the checkpoint again",
            )
        Header.of(header)
    except ValueError as error:
        raise damaged(path, reason_of(error)) from error
    if header["kind"] not in KINDS:
        raise CheckpointError(f"{path} is of an unknown kind", hint="a newer metadiff may read it")
    found: dict[str, Any] = header
    return found


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """Open a safetensors file of any program.

    Raises CheckpointError for a file that is missing, too large, damaged, or of another format.
    """
    try:
        check_file(path)
        _check_start(path)
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise damaged(path, reason_of(error)) from error
    except OSError as error:
        reason = error.strerror or reason_of(error)
        raise CheckpointError(f"{path} cannot be read ({reason})", hint="check its permissions") from error


def check_file(path: Path, hint: str = "give the .safetensors file of a run") -> None:
    """Raise CheckpointError unless `path` is a file with content, within MAX_FILE; `hint` says what to give instead."""
    if not path.is_file():
        raise CheckpointError(f"{path} is a folder" if path.is_dir() else f"{path} does not exist", hint=hint)
    size = path.stat().st_size
    if size == 0:
        raise CheckpointError(f"{path} is empty", hint="copy it again, or make it again")
    if size > MAX_FILE:
        raise CheckpointError(
            f"{path} has {size / 1e9:.0f} GB, more than {MAX_FILE / 1e9:.0f}", hint="give the weights alone"
        )
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise CheckpointError(
                f"{path} is a git-lfs pointer, not the file itself", hint="fetch it with `git lfs pull`"
            )


def _check_start(path: Path) -> None:
    """Raise CheckpointError for a file whose first bytes are not those of a safetensors file.

    Such a file begins with the length of its header in 8 bytes, and a brace. Nothing is unpickled here.
    """
    with path.open("rb") as file:
        start = file.read(9)
    # the length of a header may well be 0x80 modulo 256, so the brace is looked at as well
    if start[8:9] != b"{" and (start[:2] == b"PK" or start[:1] == b"\x80"):
        raise CheckpointError(
            f"{path} is a Python pickle (a .pt or .pth file), not safetensors",
            hint="metadiff never opens pickles; give a checkpoint that metadiff wrote",
        )
    if int.from_bytes(start[:8], "little") > min(MAX_HEADER, path.stat().st_size - 8):
        raise damaged(path, "its header is longer than the file, or than any header")


def damaged(path: Path | str, reason: str) -> CheckpointError:
    """The error of a file that is not a sound checkpoint."""
    return CheckpointError(
        f"{path} is damaged or truncated, or is not a checkpoint ({reason})", hint="copy it again, or make it again"
    )


def reason_of(error: BaseException) -> str:
    """What an error says first, or the first problem that pydantic found; printable and short."""
    if isinstance(error, ValidationError):
        problem = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, problem["loc"]))
        text = f"{place}: {problem['msg']}" if place else problem["msg"]
    else:
        first, *more = (str(error).strip() or type(error).__name__).splitlines()
        text = f"{first} {more[0].strip()}" if first.endswith(":") and more else first
    return "".join(c if c.isprintable() else "?" for c in text[:200])
