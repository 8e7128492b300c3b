"""`adapt --labelled`: accuracy and confusion matrix of query images whose classes are known."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from metadiff_cli.commands.adapt.output import REJECTED, Outcome, shown
from metadiff_cli.console import Screen, counted
from metadiff_cli.core.checkpoints.facts import NONE

WIDEST = 20  # classes of a matrix that is shown whole
PAIRS = 15  # confusions that are named where it is not
NAMED = 5  # classes that a line names
NAME, BORDER = 12, 3  # columns of text: of a class name before it is folded, and around each cell


def is_right(truth: str, label: str | None, classes: Sequence[str]) -> bool:
    """Whether a label is right. An image of NONE, or of a class that is not in `classes`, has to get no class."""
    return label == truth if truth in classes and truth != NONE else label in (None, NONE)


class Score:
    """Counts of true class and label, None for a rejected image.

    Classes that the support lacks are counted apart. With NONE among its classes they count as NONE as well.
    """

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = tuple(classes)
        self.none = NONE in classes
        self.pairs: Counter[tuple[str, str | None]] = Counter()
        self.unlabelled = 0

    def add(self, outcome: Outcome) -> None:
        """Count the outcome of an image that can be read."""
        if outcome.truth is None:
            self.unlabelled += 1
        else:
            self.pairs[outcome.truth, outcome.label] += 1

    def document(self) -> dict[str, Any]:
        """The score as JSON: the accuracy in percent of images whose class the support has, with its 95 % interval.

        With NONE in the support all images are in it. A rejected image of a class counts as wrong.
        """
        foreign = {pair: n for pair, n in self.pairs.items() if pair[0] not in self.classes}
        known = {pair: n for pair, n in self.pairs.items() if self.none or pair not in foreign}
        images, correct = sum(known.values()), sum(n for pair, n in known.items() if is_right(*pair, self.classes))
        rows, columns = self._rows(), self._columns()
        return {
            "images": images,
            "correct": correct,
            "rejected": _count(known, None),
            "accuracy": round(100 * correct / images, 4) if images else None,
            "ci95": wilson(correct, images) if images else None,
            "confusion": {
                "rows": rows,
                "columns": [REJECTED if column is None else column for column in columns],
                "matrix": [[self.pairs[row, column] for column in columns] for row in rows],
            },
            "other_classes": {
                "images": sum(foreign.values()),
                "rejected": _count(foreign, None),
                **({"none": _count(foreign, NONE)} if self.none else {}),
                "classes": sorted({truth for truth, _ in foreign}),
            },
            "unlabelled": self.unlabelled,
        }

    def counts(self) -> list[list[int]]:
        """Images by class (rows) and label (columns), both of the support; rejected images are left out.

        Classes that the support lacks are in the row of NONE, where there is one.
        """
        found = Counter[tuple[str, str | None]]()
        for (truth, label), n in self.pairs.items():
            found[truth if truth in self.classes else NONE, label] += n
        return [[found[truth, label] for label in self.classes] for truth in self.classes]

    def _rows(self) -> list[str]:
        seen = {truth for truth, _ in self.pairs}
        return [*(c for c in self.classes if c in seen), *sorted(seen - set(self.classes))]

    def _columns(self) -> list[str | None]:
        rejected = any(label is None for _, label in self.pairs)
        return [*self.classes, *([None] if rejected else [])]

    def show(self, screen: Screen, *, matrix: bool) -> None:
        """Show the summary on stderr, and the matrix on stdout; of many classes the most frequent confusions alone.

        Without `matrix`, because stdout holds rows for a program, the confusions are shown on stderr.
        """
        document = self.document()
        for line in _summary(document):
            screen.result(line)
        wrong = self._wrong()
        if matrix and len(self.classes) <= WIDEST and self._width(document["confusion"]) <= screen.out.width:
            self._show_matrix(screen, document["confusion"])
        elif matrix and wrong:
            rows = [(shown(truth), label, str(n)) for n, truth, label in wrong[:PAIRS]]
            screen.table("most frequent confusions", ("class", "taken for", "images"), rows, left=2)
            screen.note("a matrix of all classes would be too wide; --json holds it")
        elif wrong:
            pairs = ", ".join(f"{shown(truth)} taken for {label} {n}" for n, truth, label in wrong[:PAIRS])
            screen.result(f"most frequent confusions: {pairs}")

    def _show_matrix(self, screen: Screen, confusion: dict[str, Any]) -> None:
        number = {cls: str(i + 1) for i, cls in enumerate(self.classes)}
        columns = [number.get(column, column) for column in confusion["columns"]]
        rows = [
            (number.get(row, ""), shown(row), *(str(n) if n else "" for n in counts))
            for row, counts in zip(confusion["rows"], confusion["matrix"], strict=True)
        ]
        title = "confusion matrix: a row is a true class, a column a label"
        screen.table(title, ("", "class", *columns), rows, left=2)
        if others := [f"{number[cls]} {shown(cls)}" for cls in self.classes if cls not in confusion["rows"]]:
            screen.text(f"columns of classes without images here: {', '.join(others)}")

    def _width(self, confusion: dict[str, Any]) -> int:
        """Columns of text that the matrix takes: no number may be cut, and a name has at least NAME columns."""
        numbers = [max(len(str(n)) for n in column) for column in zip(*confusion["matrix"], strict=True)]
        heads = [len(REJECTED) if name == REJECTED else len(str(len(self.classes))) for name in confusion["columns"]]
        names = min(NAME, max((len(name) for name in confusion["rows"]), default=0))
        first = len(str(len(self.classes)))
        return sum(width + BORDER for width in (first, names, *map(max, numbers, heads))) + 1

    def _wrong(self) -> list[tuple[int, str, str]]:
        """Number, class and label of each confusion, the most frequent first."""
        pairs = self.pairs.items()
        found = [(n, truth, shown(label)) for (truth, label), n in pairs if not is_right(truth, label, self.classes)]
        return sorted(found, key=lambda item: (-item[0], *item[1:]))


def _count(pairs: Mapping[tuple[str, str | None], int], label: str | None) -> int:
    return sum(n for (_, found), n in pairs.items() if found == label)


def wilson(correct: int, images: int) -> list[float]:
    """The 95 % interval of an accuracy, in percent (Wilson 1927), which holds for few images and near 0 and 100 %."""
    z, p = 1.96, correct / images
    centre = (p + z * z / (2 * images)) / (1 + z * z / images)
    half = z * math.sqrt(p * (1 - p) / images + z * z / (4 * images**2)) / (1 + z * z / images)
    return [round(100 * max(centre - half, 0.0), 4), round(100 * min(centre + half, 1.0), 4)]


def _summary(document: dict[str, Any]) -> list[str]:
    lines = []
    if document["images"]:
        low, high = document["ci95"]
        rejected = f", {document['rejected']} rejected" if document["rejected"] else ""
        lines.append(
            f"accuracy {document['accuracy']:.1f} % (95 % interval {low:.1f} to {high:.1f}): "
            f"{document['correct']} of {document['images']} images{rejected}"
        )
    other = document["other_classes"]
    if other["images"]:
        names = ", ".join([*other["classes"][:NAMED], *(["..."] if len(other["classes"]) > NAMED else [])])
        answers = f"{other['none']} none, " if "none" in other else ""
        counts = "in the accuracy as none" if "none" in other else "not in the accuracy"
        lines.append(
            f"of classes that the support lacks ({names}): {counted(other['images'], 'image')}, "
            f"{answers}{other['rejected']} rejected, {counts}"
        )
    if document["unlabelled"]:
        lines.append(f"without a class: {counted(document['unlabelled'], 'query image')}, not in the accuracy")
    return lines
