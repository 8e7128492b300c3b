"""A close look at a data set: counts, images that cannot be read, repeated pictures, odd sizes.

Two files show the same picture when their decoded pixels are equal, whatever their format or metadata.
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from metadiff_cli.data.cache import in_order
from metadiff_cli.data.folders import Dataset, Split
from metadiff_cli.data.images import BITS, DEPTHS, load_rgb
from metadiff_cli.errors import DataError

TINY = 16  # pixels of the shorter side: the smallest size that an encoder takes
LONG = 4.0  # ratio of the sides above which the central square shows less than a quarter of the image

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Look:
    """One image: the digest of its pixels, its size and kind, or the reason why it cannot be read.

    `plain` says that it has a single colour; `bits` how many bits of a file with more than 8 are in use.
    """

    split: str
    cls: str
    path: str
    digest: bytes = b""
    width: int = 0
    height: int = 0
    plain: bool = False
    bits: int | None = None
    reason: str = ""


@dataclass
class Report:
    """The findings: `counts` of readable images by split and class, groups of paths that show one picture, odd images.

    `corrupt` and `odd` have pairs of path and reason.
    """

    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    corrupt: list[tuple[str, str]] = field(default_factory=list)
    within_class: list[list[str]] = field(default_factory=list)
    across_classes: list[list[str]] = field(default_factory=list)
    across_splits: list[list[str]] = field(default_factory=list)
    odd: list[tuple[str, str]] = field(default_factory=list)

    @property
    def empty(self) -> list[str]:
        """Classes without a readable image, as split/class."""
        return [f"{split}/{cls}" for split, classes in self.counts.items() for cls, n in classes.items() if n == 0]

    @property
    def images(self) -> int:
        """Number of readable images."""
        return sum(n for classes in self.counts.values() for n in classes.values())


def verify(dataset: Dataset, *, workers: int | None = None, progress: Progress = lambda done, total: None) -> Report:
    """Decode every image of every split once, at full size, and report what is odd or broken."""
    total = sum(len(split.labels) for split in dataset.splits.values())
    counts = {name: dict.fromkeys(split.classes, 0) for name, split in dataset.splits.items()}
    report = Report(counts, list(dataset.unreadable))
    groups: dict[bytes, list[Look]] = defaultdict(list)
    for done, look in enumerate(_looks(dataset, workers), start=1):
        progress(done, total)
        if look.reason:
            report.corrupt.append((look.path, look.reason))
            continue
        report.counts[look.split][look.cls] += 1
        groups[look.digest].append(look)
        report.odd += [(look.path, odd) for odd in _oddities(look)]
    for group in groups.values():
        _file_duplicates(report, group)
    return report


def _looks(dataset: Dataset, workers: int | None) -> Iterator[Look]:
    for split in dataset.splits.values():
        if split.pixels is None:
            rows = range(len(split.paths))
            yield from in_order(rows, partial(_look, split), workers)
        else:
            yield from (_described(split, i, np.asarray(pixels)) for i, pixels in enumerate(split.pixels))


def _look(split: Split, i: int) -> Look:
    path = split.paths[i]
    try:
        image = load_rgb(Path(path))
    except DataError as error:
        return Look(split.name, split.classes[split.labels[i]], path, reason=error.message.removeprefix(f"{path}: "))
    return _described(split, i, np.asarray(image), image.info.get(BITS))


def _described(split: Split, i: int, pixels: np.ndarray, bits: int | None = None) -> Look:
    height, width = pixels.shape[:2]
    digest = hashlib.sha256(f"{width}x{height}".encode() + pixels.tobytes()).digest()
    plain = bool((pixels == pixels[0, 0]).all())
    return Look(split.name, split.classes[split.labels[i]], split.paths[i], digest, width, height, plain, bits)


def _oddities(look: Look) -> Iterator[str]:
    short, long = sorted((look.width, look.height))
    if short < TINY:
        yield f"tiny: {look.width} x {look.height} pixels"
    if long > LONG * short:
        yield f"long: {look.width} x {look.height} pixels, only the central square is seen"
    if look.bits is not None and look.bits < max(DEPTHS):
        yield f"greyscale of more than 8 bits, of which {look.bits} are in use: white is {2**look.bits - 1}"
    if look.plain and long > 1:
        yield "one colour all over"


def _file_duplicates(report: Report, group: list[Look]) -> None:
    """File a group of equal pictures once, under the worst of: in several splits, in several classes, repeated."""
    if len(group) < 2:
        return
    paths = [look.path for look in group]
    if len({look.split for look in group}) > 1:
        report.across_splits.append(paths)
    elif len({look.cls for look in group}) > 1:
        report.across_classes.append(paths)
    else:
        report.within_class.append(paths)
