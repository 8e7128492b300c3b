"""Several data sets at once: the episodes that each of them allows, and the mean over them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from metadiff_cli.commands.evaluate.measure import AGAINST, rounded
from metadiff_cli.commands.evaluate.methods import unused
from metadiff_cli.console import Screen, counted
from metadiff_cli.core.evaluation.evaluate import Protocol
from metadiff_cli.data.open import Source
from metadiff_cli.errors import ConfigError, DataError


@dataclass(frozen=True)
class Domain:
    """One of several data sets: what is measured on it."""

    name: str
    source: Source
    split: str
    protocol: Protocol


def check_different(folders: Sequence[Path]) -> None:
    """Raise ConfigError for a folder that is given twice."""
    places = [folder.resolve() for folder in folders]
    twice = next((folder for i, folder in enumerate(folders) if places[i] in places[:i]), None)
    if twice is not None:
        raise ConfigError(f"--data {twice} is given twice", hint="give every data set once")


def known_classes(source: Source, trained: Sequence[str]) -> set[str]:
    """The classes of a data set that are among those of the training.

    A training on several data sets calls its classes SET/CLASS.
    """
    known, name = set(trained), source.dataset.name
    classes = {cls for split in source.dataset.splits.values() for cls in split.classes}
    return {cls for cls in classes if cls in known or f"{name}/{cls}" in known}


def domain_of(
    source: Source, split: str | None, size: int, trained: Sequence[str], protocol: Protocol, taken: Sequence[str],
    screen: Screen,
) -> Domain:  # fmt: skip
    """What is measured on a data set: its classes and its episodes, which a note tells of where they are not as asked.

    Without a `split` it is "test". Of a folder without splits of its own that has no class of the training (`trained`),
    it is all classes. `size` is in pixels; `taken` are the names of other data sets. Raises DataError if the data set
    has no two classes with enough images.
    """
    name = unused(source.dataset.name, set(taken))
    if split is None:
        classes = {cls for part in source.dataset.splits.values() for cls in part.classes}
        split = "all" if source.dataset.drawn and not known_classes(source, trained) else "test"
        if split == "all":
            screen.note(
                f"{name} has no splits of its own: all {counted(len(classes), 'class', 'classes')} are measured"
            )
    decoded = source.split(split, size)
    counts = np.bincount(decoded.labels, minlength=len(decoded.classes)).tolist()
    fitting = fitted_to(protocol, counts)
    if fitting is None:
        raise DataError(
            f"{name} has fewer than 2 classes with enough images for {protocol.shot}-shot episodes",
            hint="lower --shot, leave the data set out, or add images",
        )
    if fitting.way != protocol.way:
        screen.note(f"{name}: {fitting.way}-way episodes, as only {fitting.way} classes have enough images")
    if fitting.query != protocol.query:
        screen.note(f"{name}: {counted(fitting.query, 'query', 'queries')} per class, as there are no more images")
    return Domain(name, source, split, fitting)


def fitted_to(protocol: Protocol, counts: Sequence[int]) -> Protocol | None:
    """The protocol with as many ways, then as many queries, as classes with these numbers of images allow.

    None where fewer than two classes have an image beside the support.
    """
    each = 1 if protocol.imbalance is None else 2  # images that a class must have for each query
    able = sorted((count for count in counts if count >= protocol.shot + each), reverse=True)
    if len(able) < 2:
        return None
    way = min(protocol.way, len(able))
    return replace(protocol, way=way, query=min(protocol.query, (able[way - 1] - protocol.shot) // each))


def domains_document(documents: Sequence[Mapping[str, Any]], protocol: Protocol) -> dict[str, Any]:
    """The result document of several data sets, from one with a `name` for each; `protocol` is what was asked for."""
    first = documents[0]
    return {
        "schema": first["schema"],
        "way": protocol.way,
        "shot": protocol.shot,
        "query": protocol.query,
        "episodes": protocol.episodes,
        "seed": protocol.seed,
        "protocol": first["protocol"],
        "imbalance": first["imbalance"],
        "mean": {name: _mean([d["methods"][name] for d in documents]) for name in first["methods"]},
        "data": list(documents),
    }


def _mean(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The means of one method over data sets. The calibration error is None where that of a data set is."""
    errors = [row["ece"] for row in rows if row["ece"] is not None]
    found: dict[str, Any] = {
        "accuracy": _average([row["accuracy"] for row in rows]),
        "ci95": _half_width([row["ci95"] for row in rows]),
        "ece": _average(errors) if len(errors) == len(rows) else None,
    }
    for key in (f"paired_to_{other}" for other in AGAINST):
        if key in rows[0]:
            found[key] = {
                "difference": _average([row[key]["difference"] for row in rows]),
                "ci95": _half_width([row[key]["ci95"] for row in rows]),
            }
    means: dict[str, Any] = rounded(found)
    return means


def _average(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _half_width(values: Sequence[float]) -> float:
    """Of the interval of a mean of independent values with these half-widths."""
    return math.hypot(*values) / len(values)
