"""Is a file a sound safetensors file, within limits? Asked before any memory is taken for what it claims to hold.

The format: 8 bytes with the length of a header, the header as JSON `{name: {dtype, shape, data_offsets}}` with texts
under `__metadata__`, then the tensors' bytes, without gaps. What the header claims must add up to the size of the file.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from metadiff_cli.errors import CheckpointError

MAX_HEADER = 16 * 1024 * 1024  # bytes; ours have some kilobytes
MAX_FILE = 16 * 1024**3  # bytes; the largest encoders that people use have 5 GB
MAX_TENSORS, MAX_NAME, MAX_DIMENSIONS = 50_000, 256, 8
MAX_DEPTH = 32  # of the JSON, its own and that of our header inside
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64,
}  # fmt: skip
METADATA = "__metadata__"


def check_layout(path: Path) -> Mapping[str, str]:
    """The texts of the header's metadata. Raises CheckpointError for a file that is damaged, odd or too large."""
    size = os.path.getsize(path)
    if size > MAX_FILE:
        raise _refused(path, f"it has {size / 1e9:.0f} GB, more than {MAX_FILE / 1e9:.0f}")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            raise _refused(path, f"its header is said to have {length} bytes")
        raw = file.read(length)
    header = parse_json(path, raw)
    metadata = header.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise _refused(path, "its metadata is no text")
    if len(header) > MAX_TENSORS:
        raise _refused(path, f"it has {len(header)} tensors, more than {MAX_TENSORS}")
    spans = sorted(_span(path, name, entry) for name, entry in header.items())
    end = 0
    for start, stop in spans:
        if start != end:
            raise _refused(path, "its tensors overlap or leave gaps")
        end = stop
    if end != size - 8 - length:
        raise _refused(path, f"its tensors take {end} bytes, and there are {size - 8 - length}")
    return metadata


def parse_json(path: Path, raw: bytes | str) -> dict[str, Any]:
    """A JSON object of limited depth and without a name twice. Raises CheckpointError for anything else."""
    try:
        value = json.loads(raw, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _refused(path, f"its header is no JSON: {error!s:.200}") from error
    if not isinstance(value, dict):
        raise _refused(path, "its header is no JSON object")
    if _too_deep(value):
        raise _refused(path, f"its header is nested more than {MAX_DEPTH} levels deep")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice")
    return found


def _too_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return bool(level)


def _span(path: Path, name: str, entry: Any) -> tuple[int, int]:
    """First and last byte of a tensor, after its entry was checked."""
    if len(name) > MAX_NAME or not name.isprintable():
        raise _refused(path, f"a tensor has the name {name!r:.80}")
    try:
        dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise _refused(path, f"the entry of tensor {name} lacks dtype, shape or data_offsets") from None
    if not isinstance(dtype, str) or dtype not in BITS:
        raise _refused(path, f"tensor {name} has the dtype {dtype!r:.80}")
    numbers = [*shape, start, stop] if isinstance(shape, list) and len(shape) <= MAX_DIMENSIONS else [None]
    if not all(type(n) is int and 0 <= n <= MAX_FILE for n in numbers):
        raise _refused(path, f"tensor {name} has the shape {shape!r:.80} at {start!r:.40} to {stop!r:.40}")
    if math.prod(shape) * BITS[dtype] // 8 != stop - start:
        raise _refused(path, f"tensor {name} of shape {shape} does not fill its {stop - start} bytes")
    return start, stop


def _refused(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is damaged or truncated, or no checkpoint ({why})", hint="copy it again, or make it again"
    )
