"""`evaluate --report`: a page with the plots of a result document and, after a training, its curves."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from metadiff_cli.commands.learning import RESULT_COLUMNS, result_rows, result_title
from metadiff_cli.commands.plots import Bin, Interval, curve, intervals, reliability
from metadiff_cli.commands.report import write_page

CURVES = {
    "loss": "Training loss",
    "accuracy": "Training accuracy, %",
    "validation": "Validation accuracy, %",
    "gain": "Gain over the analytic denoiser, points",
}
NO_CURVE = frozenset({"epoch", "epochs", "step", "steps", "size", "best", "ci95"})


@dataclass(frozen=True)
class Figure:
    """A plot with its caption and a smaller line below it."""

    title: str
    svg: Markup
    about: str = ""


def write_evaluation_report(
    path: Path, document: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]] = (), *, title: str | None = None
) -> None:
    """Write the page of an `evaluate --json` document, atomically.

    `metrics` are the rows of metrics.csv, as numbers or text. Where the document has `reliability`, a list of
    `{"confidence", "accuracy", "count"}` with both in 0..1, its diagram is drawn. Raises MetaDiffError when the file
    cannot be written.
    """
    figures = [_accuracy(document), *_differences(document), *_reliability(document), *_training(metrics)]
    rows = result_rows(dict(document))
    write_page(
        path, "evaluate.html", title=title or "metadiff: accuracy on episodes", about=result_title(dict(document)),
        tiles_facts=_tiles(rows[list(document["methods"]).index("metadiff")]), facts=_facts(document),
        figures=figures, columns=RESULT_COLUMNS, rows=rows,
    )  # fmt: skip


def _tiles(row: Sequence[str]) -> list[tuple[str, str]]:
    """The numbers at the head of the page: MetaDiff's cells of the table, without empty ones."""
    cells = [(name[0].upper() + name[1:], cell) for name, cell in zip(RESULT_COLUMNS, row, strict=True) if cell]
    return cells[1:]


def _facts(document: Mapping[str, Any]) -> list[tuple[str, object]]:
    """What is neither a result nor a plot, nested values by dotted names."""
    facts: list[tuple[str, object]] = []
    for key, value in document.items():
        if key in ("methods", "reliability") or value is None:
            continue
        nested = value.items() if isinstance(value, Mapping) else [(None, value)]
        facts += [(f"{key}.{inner}" if inner else key, v) for inner, v in nested if v is not None]
    return facts


def _accuracy(document: Mapping[str, Any]) -> Figure:
    rows = [
        Interval(name, m["accuracy"], m["ci95"], name == "metadiff")
        for name, m in _by_accuracy(document["methods"].items())
    ]
    svg = intervals(rows, "accuracy, %")
    return Figure("Accuracy", Markup(svg), "Mean over episodes with its 95 % interval; all methods on the same ones.")


def _differences(document: Mapping[str, Any]) -> list[Figure]:
    """The paired differences to each control that the document has."""
    figures = []
    methods = _by_accuracy(document["methods"].items())
    for key in dict.fromkeys(key for _, m in methods for key in m if key.startswith("paired_to_")):
        rows = [
            Interval(name, m[key]["difference"], m[key]["ci95"], name == "metadiff")
            for name, m in methods
            if m.get(key) is not None
        ]
        if rows:
            svg = intervals(rows, "percentage points", zero=True)
            about = "Paired over the same episodes, with its 95 % interval."
            figures.append(Figure(f"Difference to {key.removeprefix('paired_to_')}", Markup(svg), about))
    return figures


def _by_accuracy(methods: Iterable[tuple[str, dict[str, Any]]]) -> list[tuple[str, dict[str, Any]]]:
    return sorted(methods, key=lambda item: -item[1]["accuracy"])


def _reliability(document: Mapping[str, Any]) -> list[Figure]:
    bins = [Bin(float(b["confidence"]), float(b["accuracy"]), int(b["count"])) for b in document.get("reliability", ())]
    if not any(b.count for b in bins):
        return []
    svg = reliability(bins, "accuracy against confidence")
    about = "Points on the diagonal: confidence is what it says. Below it, the classifier is too sure."
    return [Figure("Reliability", Markup(svg), about)]


def _training(metrics: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """A curve for each column of numbers, with its interval where the column has one."""
    if not metrics:
        return []
    across = "step" if "step" in metrics[0] else "epoch"
    figures = []
    for name in dict.fromkeys(name for row in metrics for name in row if name not in NO_CURVE):
        half = "ci95" if name == "gain" else ""
        points = [
            (x, y, _float(row.get(half)) or 0.0)
            for row in metrics
            if (x := _float(row.get(across))) is not None and (y := _float(row.get(name))) is not None
        ]
        if len(points) > 1:
            title = CURVES.get(name, name)
            figures.append(Figure(title, Markup(curve(points, across, title, zero=name == "gain"))))
    return figures


def _float(value: object) -> float | None:
    """A number from a cell of metrics.csv; None for an empty cell, text, and what is not finite."""
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
