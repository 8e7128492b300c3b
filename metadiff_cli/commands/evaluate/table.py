"""How a person reads a result document: the tables of accuracies and of an open-set measurement."""

from collections.abc import Mapping
from typing import Any

from metadiff_cli.console import Screen

RESULT_COLUMNS = ("method", "accuracy %", "minus prototype", "minus analytic", "ECE %")
PAIRED = "paired_to_prototype"
OPEN_SET_COLUMNS = ("open set", "mean ± 95 %")
OPEN_SET_ROWS = {
    "auroc": "AUROC of the known score, %",
    "auroc_confidence": "AUROC of the confidence, %",
    "rejected_known": "rejected of known queries, %",
    "rejected_unknown": "rejected of unknown queries, %",
}


def show_result(document: Mapping[str, Any], screen: Screen) -> None:
    """Print the tables of a result document, of one or of several data sets."""
    if "data" in document:
        screen.table(domains_title(document), *domains_table(document))
        return
    screen.table(result_title(document), RESULT_COLUMNS, result_rows(document))
    if "open_set" in document:
        screen.text(open_set_title(document))  # longer than the table is wide
        screen.table("", OPEN_SET_COLUMNS, open_set_rows(document))


def result_title(document: Mapping[str, Any]) -> str:
    """One line on the episodes of a result document."""
    return (
        f"{document['way']}-way {document['shot']}-shot, {document['query']} queries per class, "
        f"{document['split']} classes, {document['episodes']} episodes, {document['protocol']}"
    )


def result_rows(document: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The cells of RESULT_COLUMNS for each method."""
    return [
        (
            _label(name, document),
            _accuracy(m),
            _difference(m.get("paired_to_prototype")),
            _difference(m.get("paired_to_analytic")),
            "-" if m["ece"] is None else f"{m['ece']:.1f}",
        )
        for name, m in document["methods"].items()
    ]


def domains_title(document: Mapping[str, Any]) -> str:
    """One line on the episodes of a result document of several data sets."""
    return (
        f"{document['way']}-way {document['shot']}-shot, {document['query']} queries per class, "
        f"{len(document['data'])} data sets, {document['episodes']} episodes each, {document['protocol']}"
    )


def domains_table(document: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The columns, and the cells of a row for each data set and one for the mean."""
    own, *_ = document["mean"]
    paired = PAIRED in document["mean"][own]
    columns = ("data set", *(_label(name, document["data"][0]) for name in document["mean"]))
    rows = [*((d["name"], d["methods"]) for d in document["data"]), ("mean", document["mean"])]
    return (*columns, *["minus prototype"] * paired), [
        (name, *(_accuracy(m) for m in methods.values()), *[_difference(methods[own].get(PAIRED))] * paired)
        for name, methods in rows
    ]


def open_set_title(document: Mapping[str, Any]) -> str:
    """One line on an open-set measurement."""
    found = document["open_set"]
    rate = 100 * found["false_rejection_rate"]
    return (
        f"{found['unknown_classes']} unknown classes beside {document['way']} known ones, threshold for "
        f"{rate:g} % false rejections, {found['episodes']} episodes"
    )


def open_set_rows(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The cells of OPEN_SET_COLUMNS."""
    found = document["open_set"]
    rows = [(name, f"{found[key]['mean']:.2f} ± {found[key]['ci95']:.2f}") for key, name in OPEN_SET_ROWS.items()]
    return [*rows, ("AUROC, known score minus confidence", _difference(found["paired_to_confidence"]))]


def _label(name: str, document: Mapping[str, Any]) -> str:
    if document["methods"][name].get("statistics") == "queries":
        return f"{name} (statistics of all queries)"
    return f"metadiff ({document['denoiser']})" if name == "metadiff" else name


def _accuracy(method: Mapping[str, float]) -> str:
    return f"{method['accuracy']:.2f} ± {method['ci95']:.2f}"


def _difference(paired: Mapping[str, float] | None) -> str:
    return "" if paired is None else f"{paired['difference']:+.2f} ± {paired['ci95']:.2f}"
