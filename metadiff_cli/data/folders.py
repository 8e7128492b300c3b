"""Folders of images -> splits of classes: which files belong to which class of which split. No pixels are read here."""

import difflib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from metadiff_cli.data.images import IMAGE_SUFFIXES
from metadiff_cli.errors import ConfigError, DataError, suggest

SPLITS = ("train", "val", "test")
IGNORED = frozenset({"__MACOSX", "Thumbs.db", "desktop.ini"})
MAX_DEPTH, MAX_WAYS = 64, 64  # of folders in folders, and of links that lead to one of them
FEWEST_TO_SPLIT = 6  # classes: two for each split


@dataclass(frozen=True)
class Split:
    """Labelled images: `paths[i]` shows class `classes[labels[i]]`. `pixels` (n, H, W, 3) where they are no files."""

    name: str
    classes: tuple[str, ...]
    paths: tuple[str, ...]
    labels: tuple[int, ...]
    root: str
    pixels: np.ndarray | None = None


@dataclass(frozen=True)
class Dataset:
    """Splits by name, what a person should be told about them, and the number of files that are no images."""

    name: str
    root: str
    splits: dict[str, Split]
    notes: tuple[str, ...] = ()
    skipped: int = 0


Progress = Callable[[int, int | None], None]


def no_progress(done: int, total: int | None) -> None:
    """Report nothing."""


@dataclass
class Scan:
    """Of a walk through folders: files that are no images, and folders that cannot be listed (None: they raise).

    `progress` is told the number of images found so far after every class. A class without images raises, unless
    `keep_empty`.
    """

    skipped: int = 0
    keep_empty: bool = False
    unreadable: list[tuple[Path, str]] | None = None
    progress: Progress = field(default=no_progress, repr=False)
    found: int = 0

    def add(self, images: int) -> None:
        """Count further images."""
        self.found += images
        self.progress(self.found, None)


def open_dataset(
    root: Path, *, layout: str = "auto", seed: int = 0, keep_empty: bool = False, progress: Progress = no_progress
) -> Dataset:
    """Find the splits below `root`. Raises DataError with the next step when there is nothing to use.

    `layout` is "auto", "folder" or a known benchmark (data/benchmarks.py). "auto" knows the benchmarks whose folders
    could not be classes, and takes everything else as class folders. Class folders without images are an error, unless
    `keep_empty`. `progress` is told the images found so far; how
    many there will be is not known.
    """
    from metadiff_cli.data.benchmarks import LAYOUTS, open_detected  # they build on the functions below

    openers: dict[str, Callable[[Path, int, Scan], Dataset]] = {"auto": open_detected, "folder": open_folder, **LAYOUTS}
    if layout not in openers:
        raise ConfigError(
            f"unknown layout '{layout}'", hint=f"{suggest(layout, openers)}choose one of {', '.join(openers)}"
        )
    check_folder(root)
    return openers[layout](root, seed, Scan(keep_empty=keep_empty, progress=progress))


def check_folder(root: Path) -> None:
    """Raise DataError unless `root` is a folder."""
    if not root.exists():
        raise DataError(
            f"folder {root} does not exist",
            hint=f"{suggestion(root)}give a folder that holds one folder of images per class",
        )
    if not root.is_dir():
        raise DataError(f"{root} is a file, not a folder", hint="give the folder that holds the class folders")


def suggestion(path: Path) -> str:
    """A question that names what lies beside `path` under a similar name, where something does."""
    with suppress(OSError):
        close = difflib.get_close_matches(path.name, [other.name for other in path.parent.iterdir()], n=1)
        if close:
            return f"did you mean {path.parent / close[0]}? "
    return ""


def open_folder(root: Path, seed: int, scan: Scan) -> Dataset:
    """root/{train,val,test}/<class>/* where the only children are such splits, else root/<class>/* split by class."""
    children, name = subfolders(root), root.resolve().name  # "." has no name of its own
    if children and all(child.name in SPLITS for child in children):
        splits = {child.name: scan_classes(child, name=child.name, scan=scan) for child in children}
        return Dataset(name, str(root), _ordered(splits), skipped=scan.skipped)
    whole = scan_classes(root, name="all", scan=scan)
    splits, note = split_by_class(whole, seed)
    return Dataset(name, str(root), splits, (note,), scan.skipped)


def scan_images(root: Path) -> list[Path]:
    """All images below a folder, in sorted order. Raises DataError when there is none."""
    check_folder(root)
    found = list(walk_images(root, Scan()))
    if not found:
        raise DataError(f"{root} has no images", hint=f"expected files such as {', '.join(sorted(IMAGE_SUFFIXES))}")
    return found


def scan_classes(root: Path, *, name: str = "support", scan: Scan | None = None) -> Split:
    """One class per folder below `root`. Raises DataError for no classes, an empty class, images outside of classes."""
    check_folder(root)
    scan = scan if scan is not None else Scan()
    folders = subfolders(root)
    if not folders:
        what = "has images but no class folders" if _has_loose_images(root) else "has no class folders"
        raise DataError(f"{root} {what}", hint="make one folder per class: DIR/cat/1.jpg, DIR/dog/1.jpg")
    return from_folders({folder.name: folder for folder in folders}, name=name, root=root, scan=scan)


def from_folders(folders: dict[str, Path], *, name: str, root: Path, scan: Scan) -> Split:
    """A split from class name -> folder, classes in sorted order."""
    classes, paths, labels = tuple(sorted(folders)), [], []
    for label, cls in enumerate(classes):
        found = list(walk_images(folders[cls], scan))
        if not found and not scan.keep_empty:
            locked = [why for path, why in scan.unreadable or () if path.is_relative_to(folders[cls])]
            why = f": its folder {locked[0]}" if locked else ""
            raise DataError(
                f"class '{cls}' in {root} has no images{why}", hint="add images to its folder, or remove it"
            )
        scan.add(len(found))
        paths += [str(path) for path in found]
        labels += [label] * len(found)
    return Split(name, classes, tuple(paths), tuple(labels), str(root))


def walk_images(folder: Path, scan: Scan) -> Iterator[Path]:
    """Images below a folder in sorted order; links are followed, but into no folder twice on one way down."""
    yield from _walk(folder, scan, (), Counter())


def _walk(
    folder: Path, scan: Scan, above: tuple[tuple[int, int], ...], ways: Counter[tuple[int, int]]
) -> Iterator[Path]:
    try:
        with _readable(folder):
            status = folder.stat()
        entries = _entries(folder)
    except DataError as error:
        if scan.unreadable is None:
            raise
        scan.unreadable.append((folder, error.message.removeprefix(f"{folder} ")))
        return
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        return  # a symbolic link that leads back up
    _check_walk(folder, len(above), ways, identity)
    for path in entries:
        if _is_dir(path):
            yield from _walk(path, scan, (*above, identity), ways)
        elif is_image(path) and not _is_special(path):
            yield path
        elif scan.unreadable is not None and (reason := _locked(path)):
            scan.unreadable.append((path, reason))
        else:
            scan.skipped += 1


def subfolders(root: Path) -> list[Path]:
    """Visible folders directly below `root`, sorted by name."""
    return [path for path in _entries(root) if _is_dir(path)]


def _check_walk(folder: Path, depth: int, ways: Counter[tuple[int, int]], identity: tuple[int, int]) -> None:
    """Links between folders multiply the ways through them: a few dozen would keep a walk busy for ever."""
    ways[identity] += 1
    if ways[identity] > MAX_WAYS:
        raise DataError(f"{folder} is reached in more than {MAX_WAYS} ways", hint="remove the links that lead there")
    if depth >= MAX_DEPTH:
        raise DataError(f"{folder} is more than {MAX_DEPTH} folders deep", hint="move the images further up")


def _is_dir(path: Path) -> bool:
    return os.path.isdir(path)  # unlike Path.is_dir, false for a path that cannot be looked at


def _locked(path: Path) -> str:
    """Why a path cannot be looked at, such as a link into a folder without permission; empty if it can."""
    try:
        path.stat()
    except OSError as error:
        return "" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
    return ""


def _entries(folder: Path) -> list[Path]:
    """What is visible directly in a folder, sorted by name."""
    with _readable(folder):
        return sorted((p for p in folder.iterdir() if not _ignored(p.name)), key=lambda p: p.name)


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"{folder} cannot be read ({error.strerror})", hint="check its permissions") from error


def _has_loose_images(root: Path) -> bool:
    return any(is_image(path) for path in _entries(root))


def _is_special(path: Path) -> bool:
    """A pipe, socket or device: reading one could wait for ever. A dangling link is none: it is reported as broken."""
    return os.path.exists(path) and not os.path.isfile(path)


def is_image(path: Path) -> bool:
    """Whether the file's extension is one of images."""
    return path.suffix.lower() in IMAGE_SUFFIXES


def _ignored(name: str) -> bool:
    return name.startswith(".") or name in IGNORED


def split_by_class(whole: Split, seed: int) -> tuple[dict[str, Split], str]:
    """64 : 16 : 20 % of the classes, drawn with the seed; few classes are all kept for testing."""
    count = len(whole.classes)
    if count < FEWEST_TO_SPLIT:
        what = "1 class is" if count == 1 else f"{count} classes are"
        return {"test": take(whole, "test", range(count))}, f"{what} too few to split: all are test classes"
    val, test = max(2, round(0.16 * count)), max(2, round(0.2 * count))
    order = np.random.default_rng(seed).permutation(count)
    parts = {"train": order[: count - val - test], "val": order[count - val - test : count - test]}
    parts["test"] = order[count - test :]
    splits = {name: take(whole, name, [int(c) for c in sorted(chosen)]) for name, chosen in parts.items()}
    sizes = " / ".join(str(len(split.classes)) for split in splits.values())
    return splits, f"no train, val, test folders: {count} classes are split by class with seed {seed} into {sizes}"


def take(whole: Split, name: str, chosen: Sequence[int]) -> Split:
    """The classes `chosen` of a split, as a split of its own."""
    position = {c: i for i, c in enumerate(chosen)}
    rows = [i for i, label in enumerate(whole.labels) if label in position]
    return Split(
        name,
        tuple(whole.classes[c] for c in chosen),
        tuple(whole.paths[i] for i in rows),
        tuple(position[whole.labels[i]] for i in rows),
        whole.root,
        None if whole.pixels is None else whole.pixels[rows],
    )


def all_classes(dataset: Dataset) -> Split:
    """The classes of all splits together."""
    parts = list(dataset.splits.values())
    classes = sorted({c for part in parts for c in part.classes})
    position = {c: i for i, c in enumerate(classes)}
    pixels = [part.pixels for part in parts if part.pixels is not None]
    return Split(
        "all",
        tuple(classes),
        tuple(path for part in parts for path in part.paths),
        tuple(position[part.classes[label]] for part in parts for label in part.labels),
        dataset.root,
        np.concatenate(pixels) if pixels else None,
    )


def require_split(dataset: Dataset, name: str) -> Split:
    """The split `name`, or "all". Raises DataError that names those that exist."""
    if name == "all":
        return all_classes(dataset)
    if name not in dataset.splits:
        there = ", ".join(dataset.splits)
        few = f"; from {FEWEST_TO_SPLIT} classes on a folder is split by itself"
        other = few if name == "train" else f", or give --split {next(iter(dataset.splits))}"
        raise DataError(
            f"{dataset.root} has no {name} classes (it has: {there})", hint=f"add a {name}/ folder of classes{other}"
        )
    return dataset.splits[name]


def _ordered(splits: dict[str, Split]) -> dict[str, Split]:
    return {name: splits[name] for name in SPLITS if name in splits}
