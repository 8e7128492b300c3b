"""The data sets of a training: one or several with base classes, and further ones for validation alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from metadiff_cli.config.schema import Config, is_pretrained
from metadiff_cli.data.cache import DecodedSplit
from metadiff_cli.data.folders import Dataset, all_classes, require_split
from metadiff_cli.data.open import Reporter, Source, find_data, open_source
from metadiff_cli.errors import ConfigError

Decode = Callable[[], DecodedSplit]


@dataclass(frozen=True)
class Data:
    """The folders of --data and --val-data. Without any, the data set is in its usual place."""

    base: Sequence[Path] = ()
    validation: Sequence[Path] = ()

    @property
    def first(self) -> Path | None:
        """The first folder with base classes."""
        return self.base[0] if self.base else None


def folders_of(data: Data, config: Config) -> list[Path]:
    """All folders that are read. Raises DataError when that of the configuration is not there."""
    return [find_data(config, data.first), *data.base[1:], *data.validation]


def check_data(data: Data, config: Config, method: str, encoder: Path | None, *, report: bool = False) -> None:
    """Raise ConfigError for several data sets where one is needed; `encoder` is the file of a trained one."""
    if method != "metadiff" and (len(data.base) > 1 or data.validation):
        raise ConfigError(f"--method {method} takes one --data, and no --val-data", hint="leave out the others")
    if report and data.validation:
        raise ConfigError("--report shows one data set, and --val-data gives several", hint="leave out one of the two")
    if len(data.base) < 2:
        return
    if config.data.layout == "glyphs":
        raise ConfigError(f"{config.name} draws its images", hint="leave out --data, or give another --preset")
    if encoder is None and not is_pretrained(config.encoder):
        raise ConfigError(
            "an encoder is trained on one --data, and several need one that comes trained",
            hint="add --encoder FILE, or one of lite0, torchvision:MODEL and timm:MODEL",
        )


def open_sources(
    config: Config, data: Data, reporter: Reporter, in_turn: Callable[[Decode], DecodedSplit] = lambda decode: decode()
) -> list[Source]:
    """Find all data sets, that of the first --data first; each has a name of its own.

    Of a folder without splits all classes are base classes where there is --val-data, and validation classes where it
    is given as one. Of a --val-data with splits the validation classes are taken. Raises DataError when there is no
    such data set, or one lacks the split.
    """
    folder = config.model_copy(update={"data": config.data.model_copy(update={"layout": "auto"})})
    base = [open_source(config, data.first, reporter, in_turn)]
    base += [open_source(folder, place, reporter, in_turn) for place in data.base[1:]]
    for source in base:
        if source.dataset.drawn and data.validation:
            source.dataset = _only(source.dataset, "train", "all")
            reporter.note(f"{source.dataset.name}: all {_count(source, 'train')} classes are base classes")
        require_split(source.dataset, "train")
    validation = [open_source(folder, place, reporter, in_turn) for place in data.validation]
    for source in validation:
        source.dataset = _only(source.dataset, "val", "all" if source.dataset.drawn else "val")
        reporter.note(f"{source.dataset.name}: {_count(source, 'val')} validation classes")
    return _named([*base, *validation])


def _only(dataset: Dataset, name: str, taken: str) -> Dataset:
    """The data set with one split alone: the one that is `taken`, or "all" classes, under a `name`."""
    split = all_classes(dataset) if taken == "all" else require_split(dataset, taken)
    return replace(dataset, splits={name: replace(split, name=name)})


def _count(source: Source, split: str) -> int:
    return len(source.dataset.splits[split].classes)


def _named(sources: list[Source]) -> list[Source]:
    """The same, with a number after a name that an earlier one has."""
    taken: set[str] = set()
    for source in sources:
        name = source.dataset.name
        numbered = (f"{name}-{i}" for i in range(2, len(sources) + 2))
        unused = next(candidate for candidate in (name, *numbered) if candidate not in taken)
        taken.add(unused)
        if unused != name:
            source.dataset = replace(source.dataset, name=unused)
    return sources
