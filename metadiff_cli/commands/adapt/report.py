"""`adapt --report`: one self-contained page with the support, the predictions and the confusions, for a browser.

The page is made from the templates in `pages/`. Names of classes and files may be hostile: Jinja escapes them, the
script compares numbers and sets `textContent`, and a Content-Security-Policy forbids the page to load anything. It is
written while it is rendered, so its thumbnails are never in memory together. The same results give the same bytes.
"""

import base64
import io
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from metadiff_cli.commands.adapt.labelled import is_right
from metadiff_cli.commands.adapt.offenders import SUSPECTS, confused_pairs
from metadiff_cli.commands.adapt.output import Outcome, shown
from metadiff_cli.commands.pages.page import write_page
from metadiff_cli.core.checkpoints.facts import NONE
from metadiff_cli.core.evaluation.mistakes import Mistake
from metadiff_cli.data.cache import decode_images, no_progress

THUMBNAIL = 128  # pixels per side, of the central square that the classifier sees
QUALITY = 60
RUNNERS_UP = 2
REJECTED = -1  # stands for the class of a rejected image


@dataclass(frozen=True)
class AdaptReport:
    """Everything that the page shows. `support` holds the image paths of each class; a saved classifier has none.

    `facts` are shown as name and value. `notes` are sentences that a reader must not miss. `support_check` says how
    well the classes can be told apart, and `suspects` are the support images that look mislabelled. `mistakes` are the
    images of known class that were taken for another: query images with `--labelled`, else held-out support images.
    `suggested` are the images to label next, None where nobody asked. `broken_support` lists path and reason.
    `confusion[i][j]` is the number of labelled images of class i that were predicted as class j.
    """

    classes: Sequence[str]
    support: Mapping[str, Sequence[str]]
    outcomes: Sequence[Outcome]
    facts: Mapping[str, object] = field(default_factory=dict)
    notes: Sequence[str] = ()
    support_check: Sequence[str] = ()
    suspects: Sequence[Mistake] = ()
    mistakes: Sequence[Mistake] = ()
    suggested: Sequence[Outcome] | None = None
    broken_support: Sequence[tuple[str, str]] = ()
    confusion: Sequence[Sequence[int]] | None = None


def write_report(
    path: Path,
    report: AdaptReport,
    *,
    title: str = "metadiff: what these images show",
    workers: int | None = None,
    progress: Callable[[int, int], None] = no_progress,
) -> None:
    """Write the page atomically. Raises MetaDiffError when the file cannot be written.

    `progress` is called with the number of thumbnails made, and of all thumbnails.
    """
    readable = [outcome for outcome in report.outcomes if outcome.readable]
    pairs = [(pair, _beside(report, pair.mistakes)) for pair in confused_pairs(report.mistakes)]
    suspects, suggested = _beside(report, report.suspects[:SUSPECTS]), report.suggested or ()
    compared = [*suspects, *(figure for _, figures in pairs for figure in figures)]
    pictures = sum(len(figure.paths) for figure in compared) + len(suggested)
    total = pictures + len(readable) + sum(len(images) for images in report.support.values())
    thumbnails = _Thumbnails(workers, progress, total)
    labelled = Counter(outcome.label for outcome in readable)
    write_page(
        path, "adapt.html", title=title, report=report, thumb=THUMBNAIL,
        tiles_facts=_tiles(report, readable),
        rejected=labelled[None],
        names=[shown(name) for name in report.classes],
        labelled=[labelled[name] for name in report.classes],
        labelled_truth=any(outcome.truth is not None for outcome in readable),
        rows=lambda: _class_rows(report, readable, thumbnails),
        cards=lambda: _cards(report, readable, thumbnails),
        suspects=partial(_pictured, suspects, thumbnails),
        more_suspects=len(report.suspects) - len(suspects),
        pairs=[(pair, partial(_pictured, figures, thumbnails)) for pair, figures in pairs],
        suggested=lambda: zip(suggested, thumbnails.of([outcome.path for outcome in suggested]), strict=True),
        listed=[(file, name) for name, paths in report.support.items() for path in paths if (file := _listed(path))],
        path_of=_listed, percent=_percent,
        confusion=_confusion_rows(report),
        broken=[*report.broken_support, *((o.path, o.reason) for o in report.outcomes if not o.readable)],
    )  # fmt: skip


@dataclass(frozen=True)
class _Card:
    """A query image as the template shows it. `number` is the position of its label in the classes, or REJECTED."""

    outcome: Outcome
    thumbnail: str
    number: int
    wrong: bool

    @property
    def name(self) -> str:
        return Path(self.outcome.path).name

    @property
    def title(self) -> str:
        return "rejected" if self.outcome.label is None else shown(self.outcome.label)

    @property
    def truth(self) -> str:
        return shown(self.outcome.truth)

    @property
    def kind(self) -> str:
        """What marks the card of an image without a class."""
        return "rejected" if self.outcome.rejected else "none" if self.outcome.label == NONE else ""

    @property
    def runners(self) -> Sequence[tuple[str, float]]:
        """The runners-up; of a rejected image, the most probable class comes first."""
        return [
            (shown(name), p) for name, p in self.outcome.ranking[0 if self.outcome.rejected else 1 : 1 + RUNNERS_UP]
        ]


def _listed(path: str) -> str:
    """The absolute path of an image for a CSV file; empty for a name that is not UTF-8, which no CSV file can hold."""
    absolute = os.path.abspath(path)
    return absolute if absolute.encode(errors="ignore").decode() == absolute else ""


def _percent(share: float) -> str:
    if share in (0, 1):
        return f"{100 * share:.0f} %"
    return "> 99 %" if share > 0.99 else "< 1 %" if share < 0.01 else f"{100 * share:.0f} %"


@dataclass(frozen=True)
class _ClassRow:
    """A class of the support: its images as (path, data URI), the number and mean confidence of images labelled so."""

    name: str
    images: list[tuple[str, str]]
    labelled: int
    confidence: float


@dataclass(frozen=True)
class _ConfusionRow:
    """A true class: for each predicted class the number of images, and their share of the row."""

    index: int
    name: str
    cells: list[tuple[int, float]]


@dataclass
class _Thumbnails:
    """Data URIs of images, counted over the whole page."""

    workers: int | None
    progress: Callable[[int, int], None]
    total: int
    done: int = 0

    def of(self, paths: Sequence[str]) -> Iterator[str]:
        """The data URI of each file in order; empty for a file that can no longer be read."""
        for _, pixels in decode_images([Path(path) for path in paths], THUMBNAIL, workers=self.workers):
            self.done += 1
            self.progress(self.done, self.total)
            yield "" if isinstance(pixels, str) else _data_uri(pixels)


def _data_uri(pixels: np.ndarray) -> str:
    Image.init()
    kind = "WEBP" if "WEBP" in Image.SAVE else "JPEG"  # WebP takes half the size, but a Pillow may be built without it
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, quality=QUALITY)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _cards(report: AdaptReport, readable: Sequence[Outcome], thumbnails: _Thumbnails) -> Iterator[_Card]:
    number = {name: i for i, name in enumerate(report.classes)}
    uris = thumbnails.of([outcome.path for outcome in readable])
    for outcome, uri in zip(readable, uris, strict=True):
        truth, label = outcome.truth, outcome.label
        wrong = truth is not None and label is not None and not is_right(truth, label, report.classes)
        yield _Card(outcome, uri, REJECTED if label is None else number[label], wrong)


@dataclass(frozen=True)
class _Figure:
    """A mistake beside a support image of the class that it looks like, where there is one."""

    mistake: Mistake
    paths: tuple[str, ...]


def _beside(report: AdaptReport, mistakes: Sequence[Mistake]) -> list[_Figure]:
    return [_Figure(m, (m.path, *report.support.get(m.looks_like, ())[:1])) for m in mistakes]


def _pictured(figures: Sequence[_Figure], thumbnails: _Thumbnails) -> Iterator[tuple[Mistake, list[str]]]:
    """Each mistake with the data URIs of its pictures."""
    uris = thumbnails.of([path for figure in figures for path in figure.paths])
    for figure in figures:
        yield figure.mistake, [next(uris) for _ in figure.paths]


def _class_rows(report: AdaptReport, readable: Sequence[Outcome], thumbnails: _Thumbnails) -> Iterator[_ClassRow]:
    for name in report.classes:
        paths = report.support.get(name, ())
        images = list(zip(paths, thumbnails.of(paths), strict=True))
        sure = [outcome.confidence for outcome in readable if outcome.label == name]
        yield _ClassRow(shown(name), images, len(sure), sum(sure) / max(1, len(sure)))


def _confusion_rows(report: AdaptReport) -> list[_ConfusionRow]:
    if report.confusion is None:
        return []
    rows = []
    for i, (name, counts) in enumerate(zip(report.classes, report.confusion, strict=True)):
        total = max(1, sum(counts))
        rows.append(_ConfusionRow(i, shown(name), [(count, count / total) for count in counts]))
    return rows


def _tiles(report: AdaptReport, readable: Sequence[Outcome]) -> list[tuple[str, str]]:
    """The numbers at the head of the page."""
    rejected = sum(outcome.rejected for outcome in readable)
    broken = len(report.outcomes) - len(readable) + len(report.broken_support)
    tiles = [("Classes", f"{sum(name != NONE for name in report.classes)}")]
    if report.support:
        tiles.append(("Support", f"{sum(len(images) for images in report.support.values()):,}"))
    none = sum(outcome.label == NONE for outcome in readable)
    tiles.append(("Labelled", f"{len(readable) - rejected - none:,}"))
    if readable:
        median = float(np.median([outcome.confidence for outcome in readable]))
        tiles.append(("Median confidence", f"{100 * median:.0f} %"))
    known = [outcome for outcome in readable if outcome.truth is not None and not outcome.rejected]
    if known:
        correct = sum(is_right(str(outcome.truth), outcome.label, report.classes) for outcome in known)
        tiles.append(("Accuracy", f"{100 * correct / len(known):.1f} %"))
    further = (("None", none), ("Rejected", rejected), ("Unreadable", broken))
    tiles += [(name, f"{count:,}") for name, count in further if count]
    return tiles
