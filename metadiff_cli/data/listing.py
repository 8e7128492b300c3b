"""Labelled images from a folder of class folders, or from a listing: a CSV file with the columns `path` and `label`."""

import codecs
import csv
import io
import os
import re
from dataclasses import dataclass
from pathlib import Path

from metadiff_cli.data.folders import Split, scan_support
from metadiff_cli.data.scan import Scan, check_folder, class_name
from metadiff_cli.errors import DataError

LISTINGS = frozenset({".csv", ".tsv"})
SUPPORT = "give --support a folder with one folder of images per class, or a CSV of path,label"
SHOWN = 8  # columns that a message names
DELIMITERS = (",", ";", "\t")  # spreadsheets in some languages write semicolons


@dataclass(frozen=True)
class Row:
    """A line of a listing: the path as written, joined to the folder of the listing, and the label, if there is one."""

    path: str
    label: str | None
    line: int


def is_listing(path: str | Path) -> bool:
    """Whether a path is a file that lists images; no error for a path that cannot be accessed."""
    return os.path.splitext(path)[1].lower() in LISTINGS and os.path.isfile(path)


def open_labelled(source: Path, scan: Scan | None = None) -> Split:
    """The classes of a folder of class folders, or of a listing in which every line has a label.

    `scan` takes the findings of the walk through the folder: files that were left out, and notes. Raises DataError.
    """
    if not is_listing(source):
        check_folder(source, hint=SUPPORT)
        return scan_support(source, scan if scan is not None else Scan())
    rows = read_listing(source)
    for row in rows:
        if row.label is None:
            raise DataError(f"{source}, line {row.line}: no label", hint="fill the column 'label' of every line")
    names = tuple(sorted({str(row.label) for row in rows}))
    position = {name: i for i, name in enumerate(names)}
    labels = tuple(position[str(row.label)] for row in rows)
    return Split("support", names, tuple(row.path for row in rows), labels, str(source))


def read_listing(file: str | Path) -> list[Row]:
    """The lines of a CSV file with a header that names `path` and maybe `label`; paths are relative to its folder.

    Raises DataError for a file that cannot be read, has no column `path`, or lists nothing.
    """
    try:
        text = as_utf8(Path(file).read_bytes()).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "its text is not UTF-8"
        raise DataError(f"{file} cannot be read ({reason})", hint="save it as CSV in UTF-8") from error
    first, _, rest = text.partition("\n")
    declared = re.fullmatch(r'"?sep=(.)"?\r?', first, re.IGNORECASE)  # a line that Excel writes and hides
    if declared:
        text, delimiter = rest, declared[1]
    else:
        delimiter = max(DELIMITERS, key=first.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    before = 1 if declared else 0
    try:
        header = [name.strip().lower() for name in next(reader, [])]
        _check_header(file, header)
        rows = [_row(os.path.dirname(file), header, cells, reader.line_num + before) for cells in reader if any(cells)]
    except csv.Error as error:
        raise DataError(f"{file}, line {reader.line_num + before}: {error}", hint="correct the line") from error
    if not rows:
        raise DataError(f"{file} lists no images", hint="add lines such as photos/1.jpg,daisy")
    for row in rows:
        if not os.path.basename(row.path):
            raise DataError(f"{file}, line {row.line}: no path", hint="fill the column 'path' of every line")
    return rows


def as_utf8(data: bytes) -> bytes:
    """Text with the byte-order mark of UTF-16 or UTF-8, as Windows writes it, in UTF-8; other text as it is."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16", errors="replace").encode()
    return data.removeprefix(codecs.BOM_UTF8)


def _check_header(file: str | Path, header: list[str]) -> None:
    if not any(header):
        raise DataError(f"{file} is empty", hint="begin it with the line path,label")
    if "path" not in header:
        columns = ", ".join(f"'{name}'" for name in header[:SHOWN])
        raise DataError(
            f"{file} has no column 'path'; it has {columns}",
            hint="call the columns path and label in the first line",
        )


def _row(folder: str, header: list[str], cells: list[str], line: int) -> Row:
    values = dict(zip(header, cells, strict=False))
    return Row(os.path.join(folder, values.get("path", "")), class_name(values.get("label", "").strip()) or None, line)
