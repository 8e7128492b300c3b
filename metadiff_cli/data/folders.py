"""From folders of images to splits of classes: which file belongs to which class of which split."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path

import numpy as np

from metadiff_cli.data.scan import Scan, check_folder, class_name, is_image, left_out, subfolders, walk_images
from metadiff_cli.errors import DataError

SPLITS = ("train", "val", "test")
SPLIT_NAMES = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test",
    "testing": "test",
}  # fmt: skip
FEWEST_TO_SPLIT = 6  # classes: two per split
SHOWN = 5  # names of one kind in a message


@dataclass(frozen=True)
class Split:
    """Labelled images: `paths[i]` shows class `classes[labels[i]]`; `root` is the folder that was given.

    Images that are not files have `pixels` (n, H, W, 3) uint8, and made-up paths.
    """

    name: str
    classes: tuple[str, ...]
    paths: tuple[str, ...]
    labels: tuple[int, ...]
    root: str
    pixels: np.ndarray | None = None


@dataclass(frozen=True)
class Dataset:
    """A data set: its splits by name, and `notes` for the user about them.

    `skipped` counts the files that are left out, as they are not images, by extension. `unreadable` has path and reason
    of files and folders that cannot be accessed. `drawn` says that the splits are not those of the data set, which has
    none: classes were drawn into them.
    """

    name: str
    root: str
    splits: dict[str, Split]
    notes: tuple[str, ...] = ()
    skipped: dict[str, int] = field(default_factory=dict)
    unreadable: tuple[tuple[str, str], ...] = ()
    drawn: bool = False


def dataset_of(name: str, root: Path, splits: dict[str, Split], scan: Scan) -> Dataset:
    """A data set with the findings of a walk; what cannot be accessed is a note as well."""
    notes = [*scan.notes]
    if scan.unreadable:
        lines = [f"{path} ({reason})" for path, reason in scan.unreadable]
        notes.append(f"left out, as they cannot be read: {shortened(lines)}")
    unreadable = tuple((str(path), reason) for path, reason in scan.unreadable)
    return Dataset(name, str(root), splits, tuple(notes), dict(scan.skipped), unreadable)


def open_folder(root: Path, seed: int, scan: Scan) -> Dataset:
    """Read the class folders in the split folders of `root`, or class folders that are split by class with `seed`.

    Split folders that hold the same classes split images, as those of ordinary classification do. Few-shot learning
    needs splits of classes: they are read together and split by class. Raises DataError.
    """
    name, folders = root.resolve().name, split_folders(root)  # "." has no name of its own
    if not folders:
        whole, why = scan_classes(root, name="all", scan=scan), f"no {', '.join(SPLITS)} folders"
        return _split_anew(name, root, whole, seed, scan, why)
    splits = {split: scan_classes(folder, name=split, scan=scan) for split, folder in folders.items()}
    if any(folder.name != split for split, folder in folders.items()):
        scan.notes.append(f"split folders: {', '.join(f'{f.name} is {split}' for split, f in folders.items())}")
    shared = _shared_classes(splits, root)
    if not shared:
        return dataset_of(name, root, splits, scan)
    same = f"{_listed(folders)} hold the same classes, so they split images; all images are taken"
    return _split_anew(name, root, all_classes(Dataset(name, str(root), splits)), seed, scan, same)


def split_folders(root: Path, *, among_others: bool = False) -> dict[str, Path]:
    """The folders of splits in `root`, by split; none if it holds other folders as well, unless `among_others`.

    Names count in any case, with the usual synonyms (SPLIT_NAMES). Raises DataError for two folders of one split, and
    if `root` cannot be listed.
    """
    children = subfolders(root)
    named = [child for child in children if child.name.lower() in SPLIT_NAMES]
    if len(named) < len(children) and not among_others:
        return {}
    found: dict[str, Path] = {}
    for child in named:
        split = SPLIT_NAMES[child.name.lower()]
        if split in found:
            raise DataError(
                f"{root} has two folders of {split} classes: {found[split].name} and {child.name}",
                hint="put their classes into one folder",
            )
        found[split] = child
    return {split: found[split] for split in SPLITS if split in found}


def scan_support(root: Path, scan: Scan) -> Split:
    """One class per folder below `root`. Of a data set with split folders, the classes of its train folder are taken.

    `scan.notes` says which folder was taken. Raises DataError as `scan_classes` does.
    """
    folders = split_folders(root)
    if not folders:
        return scan_classes(root, scan=scan)
    taken = folders.get("train") or next(iter(folders.values()))
    scan.notes.append(f"{root} is a data set with {_listed(folders)}: the classes of {taken.name} are taken")
    return scan_classes(taken, scan=scan)


def scan_classes(root: Path, *, name: str = "support", scan: Scan | None = None) -> Split:
    """A split with one class per folder below `root`. Folders whose names differ in spelling alone are one class.

    Raises DataError if there are no class folders, and for a class without images unless `scan.keep_empty`.
    """
    check_folder(root)
    scan = scan if scan is not None else Scan()
    folders = subfolders(root, scan)
    if not folders:
        loose = any(is_image(path) for path in root.iterdir())
        what = "has images but no class folders" if loose else "has no class folders"
        raise DataError(f"{root} {what}", hint="make one folder per class: DIR/cat/1.jpg, DIR/dog/1.jpg")
    return from_folders([(class_name(folder.name), folder) for folder in folders], name=name, root=root, scan=scan)


def from_folders(folders: Iterable[tuple[str, Path]], *, name: str, root: Path, scan: Scan) -> Split:
    """A split from pairs of class name and folder, classes in sorted order. Raises DataError as `scan_classes` does.

    A class whose folders cannot be accessed, and hold no other images, is left out.
    """
    images: dict[str, list[Path]] = {}
    others: Counter[str] = Counter()  # files of classes without images, which are not images
    for cls, folder in folders:
        unreadable, skipped = len(scan.unreadable), scan.skipped.copy()
        found = list(walk_images(folder, scan))
        scan.add(len(found))
        if found or len(scan.unreadable) == unreadable:
            images.setdefault(cls, []).extend(found)
            others += scan.skipped - skipped if not found else Counter()
    classes = tuple(sorted(images))
    empty = [cls for cls in classes if not images[cls]]
    if empty and not scan.keep_empty:
        raise DataError(
            f"class '{empty[0]}' in {root} has no images{f' ({left_out(others)})' if others else ''}",
            hint="add images to its folder, or remove it",
        )
    if not classes:
        path, reason = scan.unreadable[0]
        raise DataError(f"no class folder of {root} can be read: {path} ({reason})", hint="check the permissions")
    paths = tuple(str(path) for cls in classes for path in images[cls])
    labels = tuple(label for label, cls in enumerate(classes) for _ in images[cls])
    return Split(name, classes, paths, labels, str(root))


def shortened(lines: Sequence[str]) -> str:
    """The first SHOWN of some lines, and how many more there are."""
    more = f"; and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
    return "; ".join(lines[:SHOWN]) + more


def split_by_class(whole: Split, seed: int) -> tuple[dict[str, Split], str]:
    """Splits of 64, 16 and 20 % of the classes, drawn with the seed, and what to say of it.

    Fewer than FEWEST_TO_SPLIT classes are all test classes.
    """
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
    return splits, f"{count} classes are split by class with seed {seed} into {sizes}"


def take(whole: Split, name: str, chosen: Sequence[int]) -> Split:
    """A split called `name` of some classes of another one; `chosen` are their positions."""
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
    """The split `name`, or all classes for "all". Raises DataError that names the splits that exist."""
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


def _split_anew(name: str, root: Path, whole: Split, seed: int, scan: Scan, why: str) -> Dataset:
    splits, what = split_by_class(whole, seed)
    scan.notes.append(f"{why}: {what}")
    return replace(dataset_of(name, root, splits, scan), drawn=True)


def _shared_classes(splits: dict[str, Split], root: Path) -> bool:
    """Whether the splits share their classes. Raises DataError if they share some, and each has others of its own."""
    shared = False
    for first, second in combinations(splits.values(), 2):
        both = sorted({*first.classes} & {*second.classes})
        if both and len(both) < min(len(first.classes), len(second.classes)):
            raise DataError(
                f"{root} has {len(both)} classes in {first.name} and in {second.name} as well, such as '{both[0]}'",
                hint="keep each class in one of them, as training on test classes makes every result too good",
            )
        shared = shared or bool(both)
    return shared


def _listed(folders: dict[str, Path]) -> str:
    return f"the folders {', '.join(folder.name for folder in folders.values())}"
