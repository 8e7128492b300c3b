"""What `adapt` writes: one outcome per query image, as a table, as JSON, or streamed as JSON Lines or CSV."""

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from metadiff_cli.console import Screen, counted

if TYPE_CHECKING:
    from metadiff_cli.classify.images import Prediction

SHOWN = 20  # errors named one by one on stderr
Document = dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """What became of a query image: label and confidences in 0..1, or the reason why there are none.

    `top` has classes and confidences, best first. `twin` is a support image alike, `truth` the class that the image was
    given in, `placed` where it was sorted to, `margin` the known score above the threshold of --reject auto.
    """

    path: str
    label: str | None = None
    confidence: float = 0.0
    rejected: bool = False
    top: tuple[tuple[str, float], ...] = ()
    reason: str = ""
    twin: str | None = None
    truth: str | None = None
    placed: str | None = None
    margin: float | None = None

    @property
    def good(self) -> bool:
        """Whether there is a prediction."""
        return bool(self.top)

    def document(self) -> Document:
        """Its JSON; optional keys only where there is something to say."""
        optional = {"truth": self.truth, "twin": self.twin, "sorted_to": self.placed, "margin": self.margin}
        return {
            "path": self.path,
            "label": self.label,
            "confidence": self.confidence,
            "rejected": self.rejected,
            "top": [{"label": label, "confidence": confidence} for label, confidence in self.top],
            **{key: value for key, value in optional.items() if value is not None},
        }


def decide(
    prediction: "Prediction", classes: Sequence[str], top_k: int, reject_below: float | None, truth: str | None = None
) -> Outcome:
    """The outcome of a prediction; equal confidences stand in the order of the classes."""
    p = prediction.probabilities
    if p is None:
        return Outcome(prediction.path, reason=prediction.reason, truth=truth)
    order = sorted(range(len(classes)), key=lambda i: (-p[i], i))
    margin = None if prediction.margin is None else round(prediction.margin, 6)
    rejected = (reject_below is not None and p[order[0]] < reject_below) or (margin is not None and margin < 0)
    return Outcome(
        prediction.path,
        None if rejected else classes[order[0]],
        round(p[order[0]], 6),
        rejected,
        tuple((classes[i], round(p[i], 6)) for i in order[:top_k]),
        twin=prediction.twin,
        truth=truth,
        margin=margin,
    )


@dataclass
class Errors:
    """Images that could not be used, with the reason, in the order they were met; the first `told` are known."""

    found: list[tuple[str, str]] = field(default_factory=list)
    told: int = 0

    def add(self, path: str, reason: str) -> None:
        """Take one in."""
        self.found.append((path, reason))

    def document(self) -> list[Document]:
        """Its JSON."""
        return [{"path": path, "reason": reason} for path, reason in self.found]

    def show(self, screen: Screen) -> None:
        """Name them, at the end, where they are seen."""
        new = self.found[self.told :]
        for path, reason in new[:SHOWN]:
            screen.warn(f"{path}: {reason}")
        if len(new) > SHOWN:
            screen.warn(f"{len(new) - SHOWN} more images have errors")


Tail = Callable[[], Document]
Writer = Callable[[Screen, Document, Iterator[Outcome], Tail], int]


def _write_json(screen: Screen, head: Document, outcomes: Iterator[Outcome], tail: Tail) -> int:
    entries = [outcome.document() for outcome in outcomes if outcome.good]
    screen.json({**head, "predictions": entries, **tail()})
    return len(entries)


def _write_jsonl(screen: Screen, head: Document, outcomes: Iterator[Outcome], tail: Tail) -> int:
    count = 0
    for outcome in outcomes:
        line = outcome.document() if outcome.good else {"path": outcome.path, "error": outcome.reason}
        screen.text(json.dumps(line, ensure_ascii=False))
        count += outcome.good
    return count


def _write_csv(screen: Screen, head: Document, outcomes: Iterator[Outcome], tail: Tail) -> int:
    screen.text("path,label,confidence,rejected,error")
    count = 0
    for outcome in outcomes:
        row: list[object] = [outcome.path, "", "", "", outcome.reason]
        if outcome.good:
            row = [outcome.path, outcome.label or "", f"{outcome.confidence:.6f}", str(outcome.rejected).lower(), ""]
            count += 1
        line = io.StringIO()
        csv.writer(line, lineterminator="").writerow(row)
        screen.text(line.getvalue())
    return count


def _write_table(screen: Screen, head: Document, outcomes: Iterator[Outcome], tail: Tail) -> int:
    rows = [
        (
            outcome.path,
            outcome.label if outcome.label is not None else "(rejected)",
            f"{outcome.confidence:.1%}",
            ", ".join(f"{label} {confidence:.0%}" for label, confidence in outcome.top[0 if outcome.rejected else 1 :]),
        )
        for outcome in outcomes
        if outcome.good
    ]
    if rows:
        title = f"{counted(len(rows), 'image')}, {len(head['classes'])} classes"
        if head["protocol"] == "transductive":
            title += "; transductive: predictions depend on one another"
        screen.table(title, ("image", "label", "confidence", "runners-up"), rows, left=2)
    return len(rows)


WRITERS: dict[str, Writer] = {"json": _write_json, "jsonl": _write_jsonl, "csv": _write_csv, "table": _write_table}
