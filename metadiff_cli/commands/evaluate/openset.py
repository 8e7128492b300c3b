"""`evaluate --open-set`: its part of the result document, and how a person reads it."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from metadiff_cli.commands.evaluate.measure import Part, rounded
from metadiff_cli.core.evaluation.openset import measure_open_set, unknown_classes
from metadiff_cli.core.method.adapt import Sampling
from metadiff_cli.core.method.rejection import require_rejection

COLUMNS = ("open set", "mean ± 95 %")
ROWS = {
    "auroc": "AUROC of the known score, %",
    "auroc_confidence": "AUROC of the confidence, %",
    "rejected_known": "rejected of known queries, %",
    "rejected_unknown": "rejected of unknown queries, %",
}


def open_set_document(
    parts: Sequence[Part], sampling: Sampling, device: torch.device, progress: Callable[[int], None]
) -> dict[str, Any]:
    """AUROC and rejection rates at the auto threshold; with several parts (--halves) over the episodes of all."""
    measured = None
    for part in parts:
        before = 0 if measured is None else len(measured.auroc)
        found = measure_open_set(
            part.model.metadiff, part.bank, part.protocol, sampling, device, partial(_further, progress, before)
        )
        measured = found if measured is None else measured.joined(found)
    assert measured is not None
    first = parts[0]
    document: dict[str, Any] = rounded({
        "unknown_classes": unknown_classes(first.bank, first.protocol.way),
        "episodes": len(measured.auroc),
        "false_rejection_rate": require_rejection(first.model.metadiff).rate,
        **measured.summary(),
    })  # fmt: skip
    return document


def _further(progress: Callable[[int], None], before: int, done: int) -> None:
    progress(before + done)


def open_set_title(document: Mapping[str, Any]) -> str:
    """One line on the measurement."""
    found = document["open_set"]
    rate = 100 * found["false_rejection_rate"]
    return (
        f"{found['unknown_classes']} unknown classes beside {document['way']} known ones, threshold for "
        f"{rate:g} % false rejections, {found['episodes']} episodes"
    )


def open_set_rows(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The cells of COLUMNS."""
    found = document["open_set"]
    rows = [(name, f"{found[key]['mean']:.2f} ± {found[key]['ci95']:.2f}") for key, name in ROWS.items()]
    paired = found["paired_to_confidence"]
    return [*rows, ("AUROC, known score minus confidence", f"{paired['difference']:+.2f} ± {paired['ci95']:.2f}")]
