"""What `inspect` says of files that are no checkpoints: results, settings, measurements, graphs, features."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from metadiff_cli.errors import ConfigError, DataError

MAX_TEXT = 256 * 2**20  # bytes: more than anybody looks at


def describe(path: Path) -> dict[str, Any] | None:
    """`kind` and content of a file by its suffix, None for what has to be a checkpoint.

    Raises DataError for a file that is not metadiff's, ConfigError for settings that are none.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None or not path.is_file():
        return None
    try:
        return reader(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})", hint="check its permissions") from error


def _result(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is no JSON document ({error})", hint="copy or make it again") from error
    if isinstance(document, dict) and str(document.get("schema", "")).startswith("metadiff."):
        return {"kind": "result", "result": document}
    if isinstance(document, dict) and {"command", "arguments", "versions"} <= set(document):
        return {"kind": "manifest", "result": document}
    raise _foreign(path)


def _settings(path: Path) -> dict[str, Any]:
    from metadiff_cli.config.load import check, read_yaml

    return {"kind": "settings", "config": check(read_yaml(path)).model_dump(mode="json")}


def _measurements(path: Path) -> dict[str, Any]:
    try:
        rows = list(csv.DictReader(_text(path).splitlines()))
    except csv.Error as error:
        raise DataError(f"{path} is no CSV file ({error})", hint="copy or make it again") from error
    if not rows or not {"step", "epoch"} & set(rows[0]):
        raise _foreign(path)
    return {"kind": "measurements", "rows": len(rows), "last": rows[-1]}


def _graph(path: Path) -> dict[str, Any]:
    try:
        import onnx
    except ImportError as error:
        raise ConfigError("the extra [onnx] is not installed", hint="pip install onnx") from error
    try:
        entries = {entry.key: entry.value for entry in onnx.load(str(path), load_external_data=False).metadata_props}
        return {"kind": "graph", "classes": json.loads(entries["classes"]), **json.loads(entries["metadiff"])}
    except Exception as error:  # protobuf has errors of its own for what it cannot parse
        raise _foreign(path) from error


def _features(path: Path) -> dict[str, Any]:
    import numpy as np

    try:
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise DataError(f"{path} is no NumPy file, or is truncated", hint="remove it; it is made again") from error
    return {"kind": "array", "shape": list(values.shape), "type": str(values.dtype)}


def _text(path: Path) -> str:
    if path.stat().st_size > MAX_TEXT:
        raise DataError(f"{path} is larger than {MAX_TEXT // 2**20} MiB", hint="look at it with other tools")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise _foreign(path) from error


def _foreign(path: Path) -> DataError:
    return DataError(f"{path} is no file that metadiff wrote", hint="`metadiff inspect --help` says what it reads")


READERS: dict[str, Callable[[Path], dict[str, Any]]] = {
    ".json": _result, ".yaml": _settings, ".yml": _settings, ".csv": _measurements, ".onnx": _graph, ".npy": _features,
}  # fmt: skip
