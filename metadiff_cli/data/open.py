"""Opens the data set that a configuration names: finds or draws it, and decodes its splits when they are asked for."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from metadiff_cli.config.schema import Config
from metadiff_cli.data.benchmarks import KNOWN, open_dataset
from metadiff_cli.data.cache import DecodedSplit, decode_split
from metadiff_cli.data.folders import Dataset, Split, require_split
from metadiff_cli.data.glyphs import glyph_dataset
from metadiff_cli.data.scan import check_folder
from metadiff_cli.errors import ConfigError, DataError
from metadiff_cli.files import cache_dir, data_dir

BROKEN_SHOWN = 5  # broken images that are named; the others are counted


class Reporter(Protocol):
    """Who hears of the progress: a screen, or nobody."""

    def progress(self, label: str) -> AbstractContextManager[Callable[[int, int | None], None]]:
        """Yield `advance(done, total)` for a piece of work."""

    def note(self, text: str) -> None:
        """Take a line that is good to know."""

    def warn(self, text: str) -> None:
        """Take a line about something that is wrong but does not stop the run."""


def _at_once(decode: Callable[[], DecodedSplit]) -> DecodedSplit:
    return decode()


@dataclass
class Source:
    """A data set that was found; each of its splits is decoded when it is first asked for.

    Where several processes share a cache, `in_turn` lets one of them decode before the others.
    """

    dataset: Dataset
    config: Config
    reporter: Reporter
    in_turn: Callable[[Callable[[], DecodedSplit]], DecodedSplit] = _at_once
    decoded: dict[tuple[str, int], DecodedSplit] = field(default_factory=dict)

    def has(self, name: str) -> bool:
        """Whether the data set has the split `name`."""
        return name in self.dataset.splits

    def split(self, name: str, size: int | None = None) -> DecodedSplit:
        """The split `name` (or "all") decoded to `size` pixels, by default those of the configuration.

        Comes from the cache when it is there. Raises DataError when the data set has no such split.
        """
        size = size or self.config.data.size
        if (name, size) not in self.decoded:
            self.decoded[name, size] = self._decode(require_split(self.dataset, name), size)
        return self.decoded[name, size]

    def _decode(self, split: Split, size: int) -> DecodedSplit:
        workers = self.config.runtime.num_workers
        with self.reporter.progress(f"reading {split.name} images") as advance:
            decoded = self.in_turn(
                lambda: decode_split(split, size, cache_dir() / "images", workers=workers, progress=advance)
            )
        for note in decoded.notes:
            self.reporter.note(note)
        for path, reason in decoded.broken[:BROKEN_SHOWN]:
            self.reporter.warn(f"skipped {path}: {reason}")
        if decoded.broken:
            self.reporter.warn(f"{len(decoded.broken)} of {len(split.paths)} {split.name} images could not be read")
        return decoded


def open_source(
    config: Config,
    data: Path | None,
    reporter: Reporter,
    in_turn: Callable[[Callable[[], DecodedSplit]], DecodedSplit] = _at_once,
) -> Source:
    """Find the data set of the configuration, in the folder `data` if given; glyphs are drawn, not found.

    Raises DataError when there is none.
    """
    if config.data.layout == "glyphs":
        with reporter.progress("drawing glyphs") as advance:
            g = config.data.glyphs
            dataset = glyph_dataset(
                train=g.train, val=g.val, test=g.test, images_per_class=g.images_per_class,
                size=config.data.size, seed=config.seed, progress=advance,
            )  # fmt: skip
    else:
        root = find_data(config, data)
        with reporter.progress("finding images") as advance:
            dataset = open_dataset(root, layout=config.data.layout, seed=config.seed, progress=advance)
    for note in dataset.notes:
        reporter.note(note)
    return Source(dataset, config, reporter, in_turn)


def find_data(config: Config, given: Path | None) -> Path:
    """The folder of the data set; glyphs need none.

    Raises DataError when no folder was given and the data set is not in its usual place, ConfigError when one was given
    for glyphs.
    """
    name = config.data.name
    place = given or data_dir(name)
    if config.data.layout == "glyphs":
        if given is not None:
            hint = "leave out --data, or take a preset for images in folders, such as `folder`"
            raise ConfigError("--data has no effect: glyphs are drawn", hint=hint)
        return place
    if given is None and not place.exists():
        if name not in KNOWN:
            raise DataError("no data set was given", hint="give a folder of images with --data DIR, or a --preset")
        raise DataError(
            f"data set {name} is not in {place}",
            hint=f"give its folder with --data DIR, or put it there with `metadiff data prepare {name}`",
        )
    check_folder(place)
    return place
