"""`adapt --report`: one self-contained page with support, predictions and confusion, to be looked at in a browser.

The page is made from the templates in `pages/`. Names of classes and files are hostile text: Jinja escapes them, the
script compares numbers and sets `textContent`, and a Content-Security-Policy forbids every load. The page is written
as it is rendered, so thousands of thumbnails are never in memory together. Nothing in it depends on the time.
"""

import base64
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from metadiff_cli.commands.pages.page import write_page
from metadiff_cli.data.cache import decode_images, no_progress

THUMBNAIL = 128  # pixels a side: the central square, which is what the classifier sees
QUALITY = 60
RUNNERS_UP = 2
REJECTED = -1


@dataclass(frozen=True)
class QueryImage:
    """A query image and what became of it: probabilities (N,), or the reason why there are none.

    `twin` is a support image with the same content; `truth` the class that the image is known to show.
    """

    path: str
    probabilities: Sequence[float] | None
    reason: str = ""
    rejected: bool = False
    twin: str | None = None
    truth: str | None = None


@dataclass(frozen=True)
class Confusion:
    """`counts[i][j]` images of class i were labelled j; `source` is a sentence on which images these are."""

    counts: Sequence[Sequence[int]]
    source: str


@dataclass(frozen=True)
class AdaptReport:
    """Everything the page shows. `support` has the image paths of each class; it is empty for a saved classifier.

    `facts` are shown as name and value; `notes` are sentences a reader must not miss; `support_check` says how well
    the classes can be told apart; `broken_support` has path and reason.
    """

    classes: Sequence[str]
    support: Mapping[str, Sequence[str]]
    queries: Sequence[QueryImage]
    facts: Mapping[str, object] = field(default_factory=dict)
    notes: Sequence[str] = ()
    support_check: Sequence[str] = ()
    broken_support: Sequence[tuple[str, str]] = ()
    confusion: Confusion | None = None


def write_report(
    path: Path,
    report: AdaptReport,
    *,
    title: str = "metadiff: what these images show",
    workers: int | None = None,
    progress: Callable[[int, int], None] = no_progress,
) -> None:
    """Write the page atomically. Raises MetaDiffError when the file cannot be written.

    `progress` is called with the number of images whose thumbnail is made, and how many there will be.
    """
    readable = [query for query in report.queries if query.probabilities is not None]
    total = len(readable) + sum(len(images) for images in report.support.values())
    thumbnails = _Thumbnails(workers, progress, total)
    labels = [_label(query) for query in readable]
    write_page(
        path, "adapt.html", title=title, report=report, thumb=THUMBNAIL,
        tiles_facts=_tiles(report, readable), rejected=labels.count(REJECTED),
        labelled=[labels.count(i) for i in range(len(report.classes))],
        labelled_truth=any(query.truth is not None for query in readable),
        rows=lambda: _class_rows(report, readable, labels, thumbnails),
        cards=lambda: _cards(report, readable, thumbnails),
        confusion=_confusion_rows(report),
        broken=[*report.broken_support, *((q.path, q.reason) for q in report.queries if q.probabilities is None)],
    )  # fmt: skip


@dataclass(frozen=True)
class _Card:
    """One query image as the template shows it; `label` is a class number or REJECTED."""

    query: QueryImage
    thumbnail: str
    label: int
    title: str
    confidence: float
    runners: list[tuple[str, float]]

    @property
    def name(self) -> str:
        return Path(self.query.path).name

    @property
    def wrong(self) -> bool:
        return self.query.truth is not None and not self.query.rejected and self.title != self.query.truth

    @staticmethod
    def percent(share: float) -> str:
        if share in (0, 1):
            return f"{100 * share:.0f} %"
        return "> 99 %" if share > 0.99 else "< 1 %" if share < 0.01 else f"{100 * share:.0f} %"


@dataclass(frozen=True)
class _ClassRow:
    """One class of the support sheet: its images as (path, data URI), and what was given its label."""

    name: str
    images: list[tuple[str, str]]
    labelled: int
    confidence: float


@dataclass(frozen=True)
class _ConfusionRow:
    """One true class: the count and its share of the row for each predicted class."""

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
        """In order; empty for a file that cannot be read any more."""
        for _, pixels in decode_images([Path(path) for path in paths], THUMBNAIL, workers=self.workers):
            self.done += 1
            self.progress(self.done, self.total)
            yield "" if isinstance(pixels, str) else _data_uri(pixels)


def _data_uri(pixels: np.ndarray) -> str:
    Image.init()
    kind = "WEBP" if "WEBP" in Image.SAVE else "JPEG"  # half the size, but Pillow may be built without it
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, quality=QUALITY)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _label(query: QueryImage) -> int:
    assert query.probabilities is not None
    return REJECTED if query.rejected else _ranked(query.probabilities)[0]


def _ranked(probabilities: Sequence[float]) -> list[int]:
    """Class numbers from the most to the least probable, equal ones in their order."""
    return sorted(range(len(probabilities)), key=lambda i: (-probabilities[i], i))


def _cards(report: AdaptReport, readable: Sequence[QueryImage], thumbnails: _Thumbnails) -> Iterator[_Card]:
    uris = thumbnails.of([query.path for query in readable])
    for query, uri in zip(readable, uris, strict=True):
        assert query.probabilities is not None
        ranked = [(report.classes[i], query.probabilities[i]) for i in _ranked(query.probabilities)]
        title, runners = ranked[0][0], ranked[1 : 1 + RUNNERS_UP]
        if query.rejected:
            title, runners = "rejected", ranked[: 1 + RUNNERS_UP]
        yield _Card(query, uri, _label(query), title, ranked[0][1], runners)


def _class_rows(
    report: AdaptReport, readable: Sequence[QueryImage], labels: Sequence[int], thumbnails: _Thumbnails
) -> Iterator[_ClassRow]:
    for i, name in enumerate(report.classes):
        paths = report.support.get(name, ())
        sure = [max(q.probabilities or ()) for q, label in zip(readable, labels, strict=True) if label == i]
        images = list(zip(paths, thumbnails.of(paths), strict=True))
        yield _ClassRow(name, images, len(sure), sum(sure) / max(1, len(sure)))


def _confusion_rows(report: AdaptReport) -> list[_ConfusionRow]:
    if report.confusion is None:
        return []
    rows = []
    for i, (name, counts) in enumerate(zip(report.classes, report.confusion.counts, strict=True)):
        total = max(1, sum(counts))
        rows.append(_ConfusionRow(i, name, [(count, count / total) for count in counts]))
    return rows


def _tiles(report: AdaptReport, readable: Sequence[QueryImage]) -> list[tuple[str, str]]:
    """The numbers at the head of the page."""
    rejected = sum(query.rejected for query in readable)
    broken = len(report.queries) - len(readable) + len(report.broken_support)
    tiles = [("Classes", f"{len(report.classes)}")]
    if report.support:
        tiles.append(("Support", f"{sum(len(images) for images in report.support.values()):,}"))
    tiles.append(("Labelled", f"{len(readable) - rejected:,}"))
    if readable:
        median = float(np.median([max(q.probabilities or ()) for q in readable]))
        tiles.append(("Median confidence", f"{100 * median:.0f} %"))
    known = [query for query in readable if query.truth is not None and not query.rejected]
    if known:
        right = sum(report.classes[_label(q)] == q.truth for q in known)
        tiles.append(("Accuracy", f"{100 * right / len(known):.1f} %"))
    tiles += [(name, f"{count:,}") for name, count in (("Rejected", rejected), ("Unreadable", broken)) if count]
    return tiles
