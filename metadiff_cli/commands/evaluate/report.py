"""`evaluate --report`: a page with the plots of a result document and, after a training, its curves."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from metadiff_cli.commands.evaluate.measure import PICTURES
from metadiff_cli.commands.evaluate.table import (
    OPEN_SET_COLUMNS,
    RESULT_COLUMNS,
    open_set_rows,
    open_set_title,
    result_rows,
    result_title,
)
from metadiff_cli.commands.pages.page import write_page
from metadiff_cli.commands.pages.plots import (
    Bin,
    Interval,
    Trajectory,
    curve,
    intervals,
    reliability,
    trajectories,
    two_curves,
)

CURVES = {
    "loss": "Training loss",
    "accuracy": "Training accuracy, %",
    "validation": "Validation accuracy, %",
    "gain": "Gain over the analytic denoiser, points",
}
APART = ("methods", "reliability", "open_set", "path", PICTURES)  # shown in tables and plots of their own
NO_CURVE = frozenset({"epoch", "epochs", "step", "steps", "size", "best", "ci95"})


@dataclass(frozen=True)
class Figure:
    """A plot with its caption, and a smaller line below the caption."""

    title: str
    svg: Markup
    about: str = ""


def write_evaluation_report(
    path: Path, document: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]] = (),
    pretraining: Sequence[Mapping[str, Any]] = (), *, title: str | None = None,
) -> None:  # fmt: skip
    """Write the page of an `evaluate --json` document, atomically.

    `metrics` are the rows of metrics.csv, as numbers or text; `pretraining` are those of the stage before. A document
    with `reliability`, a list of `{"confidence", "accuracy", "count"}` (the first two in 0..1), gets a reliability
    diagram, one with `path` the curves of the descent, one with PICTURES the trajectories of weights. Raises
    MetaDiffError when the file cannot be written.
    """
    figures = [_accuracy(document), *_differences(document), *_reliability(document)]
    figures += [*_descent(document), *_trajectories(document), *_training(metrics)]
    figures += _training(pretraining, "Pretraining: ")
    rows = result_rows(document)
    write_page(
        path, "evaluate.html", title=title or "metadiff: accuracy on episodes", about=result_title(document),
        tiles_facts=_tiles(rows[list(document["methods"]).index(_own(document))]), facts=_facts(document),
        figures=figures, columns=RESULT_COLUMNS, rows=rows, open_set=_open_set(document),
    )  # fmt: skip


def _own(document: Mapping[str, Any]) -> str:
    """The measured method: MetaDiff, else the first one, which is the checkpoint's."""
    names = list(document["methods"])
    return "metadiff" if "metadiff" in names else names[0]


def _tiles(row: Sequence[str]) -> list[tuple[str, str]]:
    """The numbers at the head of the page: the measured method's row of the table, without empty cells."""
    cells = [
        (name[0].upper() + name[1:], cell)
        for name, cell in zip(RESULT_COLUMNS, row, strict=True)
        if cell not in ("", "-")
    ]
    return cells[1:]


def _facts(document: Mapping[str, Any]) -> list[tuple[str, object]]:
    """Everything that is neither a result nor a plot; nested values have dotted names."""
    facts: list[tuple[str, object]] = []
    for key, value in document.items():
        if key in APART or value is None:
            continue
        nested = value.items() if isinstance(value, Mapping) else [(None, value)]
        facts += [(f"{key}.{inner}" if inner else key, v) for inner, v in nested if v is not None]
    return facts


def _open_set(document: Mapping[str, Any]) -> dict[str, Any] | None:
    """The table of an open-set measurement, if there is one."""
    if "open_set" not in document:
        return None
    return {"title": open_set_title(document), "columns": OPEN_SET_COLUMNS, "rows": open_set_rows(document)}


def _accuracy(document: Mapping[str, Any]) -> Figure:
    rows = [
        Interval(name, m["accuracy"], m["ci95"], name == _own(document))
        for name, m in _by_accuracy(document["methods"].items())
    ]
    about = "Mean over episodes with its 95 % interval; all methods are measured on the same episodes."
    return Figure("Accuracy", Markup(intervals(rows, "accuracy, %")), about)


def _differences(document: Mapping[str, Any]) -> list[Figure]:
    """The paired differences to each control that the document has."""
    figures = []
    methods = _by_accuracy(document["methods"].items())
    for key in dict.fromkeys(key for _, m in methods for key in m if key.startswith("paired_to_")):
        rows = [
            Interval(name, m[key]["difference"], m[key]["ci95"], name == _own(document))
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
    about = "On the diagonal the confidence equals the accuracy. Below the diagonal the classifier is overconfident."
    return [Figure("Reliability", Markup(svg), about)]


def _descent(document: Mapping[str, Any]) -> list[Figure]:
    """Accuracy and inner loss from step to step."""
    if (found := document.get("path")) is None:
        return []
    names = ("accuracy, %", "support loss, nats")
    svg = two_curves(found["accuracy"], found["loss"], "step", names)
    about = (
        "After each step of the descent at temperature 0, the mean over the first episodes: the accuracy of the "
        "queries, and the inner loss, which is the support's cross-entropy and the distance from the prior."
    )
    return [Figure("Along the descent", Markup(svg), about)]


def _trajectories(document: Mapping[str, Any]) -> list[Figure]:
    """The weights of one task after each step, if the document has them."""
    if (found := document.get(PICTURES)) is None:
        return []
    steps, draws = len(found["weights"]), len(found["weights"][0])
    paths = [
        Trajectory(
            name, tuple(target), [[tuple(found["weights"][s][r][n]) for s in range(steps)] for r in range(draws)]
        )
        for n, (name, target) in enumerate(zip(found["classes"], found["targets"], strict=True))
    ]
    first, second = (f"{100 * share:.0f} % of their variance" for share in found["shares"])
    svg = trajectories(paths, f"first principal component, {first}", f"second, {second}")
    about = (
        f"The class weights of a {document['shot']}-shot task after each of {steps} steps, for {draws} draws of noise "
        "at temperature 1. The large dots are the sampled weights. The rings are the means of all images of a class, "
        "which the support only hints at. The plane is that in which the rings spread most."
    )
    return [Figure("Weights on their way", Markup(svg), about)]


def _training(metrics: Sequence[Mapping[str, Any]], stage: str = "") -> list[Figure]:
    """A curve for each column of numbers, with its interval if the column has one."""
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
            label = CURVES.get(name, name)
            title = stage + (label[0].lower() + label[1:] if stage else label)
            figures.append(Figure(title, Markup(curve(points, across, title, zero=name == "gain"))))
    return figures


def _float(value: object) -> float | None:
    """A number from a cell of metrics.csv; None for an empty cell, for text, and for what is not finite."""
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
