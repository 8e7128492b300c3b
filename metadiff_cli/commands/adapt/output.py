"""What `adapt` writes: one outcome per query image, as a table, as JSON, or streamed as JSON Lines or CSV."""

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from metadiff_cli.console import Screen, counted
from metadiff_cli.core.checkpoints.facts import NONE

SHOWN = 20  # errors that stderr names one by one
NAMED = 5  # cases of one kind that it names
DIGITS = 6  # of a confidence or a margin in JSON and CSV
REJECTED = "(rejected)"
Document = dict[str, Any]


def shown(label: str | None) -> str:
    """A label as people read it; parentheses mark the answers that are no class."""
    return REJECTED if label is None else "(none)" if label == NONE else label


@dataclass(frozen=True)
class Outcome:
    """What `adapt` says of one query image, or the reason why it cannot say anything.

    `ranking` holds the most probable classes with their probabilities in 0..1, best first; it is empty for an image
    that cannot be read. `twin` is a support image that shows the same picture, `truth` the class that the image was
    given in, `sorted_to` the path of the sorted image, and `margin` the known score above the threshold of
    `--reject auto`.
    """

    path: str
    ranking: tuple[tuple[str, float], ...] = ()
    reason: str = ""
    rejected: bool = False
    twin: str | None = None
    truth: str | None = None
    sorted_to: str | None = None
    margin: float | None = None

    @property
    def readable(self) -> bool:
        """Whether there is a prediction."""
        return bool(self.ranking)

    @property
    def label(self) -> str | None:
        """The predicted class, which may be NONE; None for an image that is rejected or cannot be read."""
        return None if self.rejected or not self.ranking else self.ranking[0][0]

    @property
    def confidence(self) -> float:
        """The probability of the most probable class."""
        return self.ranking[0][1] if self.ranking else 0.0

    def document(self, top_k: int) -> Document:
        """The prediction as JSON; an optional key is there where it has a value."""
        optional = {"truth": self.truth, "twin": self.twin, "sorted_to": self.sorted_to, "margin": self.margin}
        return {
            "path": self.path,
            "label": self.label,
            "confidence": round(self.confidence, DIGITS),
            "rejected": self.rejected,
            "top": [{"label": label, "confidence": round(p, DIGITS)} for label, p in self.ranking[:top_k]],
            **{key: value for key, value in optional.items() if value is not None},
        }


def percentages(ranking: Sequence[tuple[str, float]]) -> str:
    """Classes with their probabilities, as a line of text."""
    return ", ".join(f"{shown(name)} {p:.0%}" for name, p in ranking)


@dataclass
class Errors:
    """Images that cannot be used, as path and reason; the user was told of the first `told` of them already."""

    found: list[tuple[str, str]]
    told: int = 0

    def add(self, path: str, reason: str) -> None:
        """Add an image."""
        self.found.append((path, reason))

    def document(self) -> list[Document]:
        """The errors as JSON."""
        return [{"path": path, "reason": reason} for path, reason in self.found]

    def show(self, screen: Screen) -> None:
        """Name the errors on stderr."""
        new = self.found[self.told :]
        for path, reason in new[:SHOWN]:
            screen.warn(f"{path}: {reason}")
        if len(new) > SHOWN:
            screen.warn(f"{len(new) - SHOWN} more images have errors")


@dataclass(frozen=True)
class Writing:
    """Where a writer writes, and what it writes beside the outcomes.

    `head` begins the JSON document; `tail` gives its end, once all outcomes are known.
    """

    screen: Screen
    top_k: int
    head: Document
    tail: Callable[[], Document]


def _write_json(to: Writing, outcomes: Iterator[Outcome]) -> int:
    entries = [outcome.document(to.top_k) for outcome in outcomes if outcome.readable]
    to.screen.json({**to.head, "predictions": entries, **to.tail()})
    return len(entries)


def _write_jsonl(to: Writing, outcomes: Iterator[Outcome]) -> int:
    count = 0
    for outcome in outcomes:
        failed = {"path": outcome.path, "error": outcome.reason}
        line = outcome.document(to.top_k) if outcome.readable else failed
        to.screen.text(json.dumps(line, ensure_ascii=False))
        count += outcome.readable
    return count


def _write_csv(to: Writing, outcomes: Iterator[Outcome]) -> int:
    to.screen.text("path,label,confidence,rejected,error")
    count = 0
    for outcome in outcomes:
        row = [outcome.path, "", "", "", outcome.reason]
        if outcome.readable:
            confidence = f"{outcome.confidence:.{DIGITS}f}"
            row = [outcome.path, outcome.label or "", confidence, str(outcome.rejected).lower(), ""]
        line = io.StringIO()
        csv.writer(line, lineterminator="").writerow(row)
        to.screen.text(line.getvalue())
        count += outcome.readable
    return count


def _write_table(to: Writing, outcomes: Iterator[Outcome]) -> int:
    rows: list[tuple[str, ...]] = []
    none: set[int] = set()
    for outcome in outcomes:
        if outcome.readable:
            others = outcome.ranking[0 if outcome.rejected else 1 : to.top_k]
            if outcome.label == NONE:
                none.add(len(rows))
            rows.append((outcome.path, shown(outcome.label), f"{outcome.confidence:.1%}", percentages(others)))
    if rows:
        classes = [name for name in to.head["classes"] if name != NONE]
        title = f"{counted(len(rows), 'image')}, {counted(len(classes), 'class', 'classes')}"
        title += " or none" if NONE in to.head["classes"] else ""
        if to.head["protocol"] == "transductive":
            title += "; transductive: predictions depend on one another"
        to.screen.table(title, ("image", "label", "confidence", "runners-up"), rows, left=2, dim=none)
    return len(rows)


Writer = Callable[[Writing, Iterator[Outcome]], int]
# Each writes all outcomes and returns the number of predictions.
WRITERS: dict[str, Writer] = {"json": _write_json, "jsonl": _write_jsonl, "csv": _write_csv, "table": _write_table}
