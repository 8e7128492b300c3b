"""The data sets of the field: what they are, how to get them, and how to read them as they lie on disk.

Class splits are those of the literature (data/splits/*.json).
"""

import codecs
import csv
import io
import json
import pickle
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from metadiff_cli.data.folders import (
    SPLITS,
    Dataset,
    Split,
    dataset_of,
    from_folders,
    open_folder,
    scan_classes,
    split_folders,
)
from metadiff_cli.data.scan import (
    Progress,
    Scan,
    check_folder,
    class_name,
    is_image,
    no_progress,
    reason_of,
    subfolders,
)
from metadiff_cli.errors import ConfigError, DataError, suggest

MAX_BATCH = 500_000_000  # bytes; the larger part of CIFAR-100 has 156 million
CIFAR_FOLDER, OMNIGLOT_FOLDER = "cifar-100-python", "omniglot-py"
IMAGENET = "ImageNet's terms of access: non-commercial research and education"
UNSTATED = "none stated by its authors"

Opener = Callable[[Path, int, Scan], Dataset]  # (root, seed, scan) -> the data set; raises DataError


@dataclass(frozen=True)
class Known:
    """A known data set. `download` says that torchvision can get it; `archives` what `--from-archive` takes."""

    name: str
    what: str
    licence: str
    home: str
    splits: str
    download: bool = False
    archives: str = ""


KNOWN = {
    "glyphs": Known(
        "glyphs", "handwriting-like characters, drawn by a seeded generator", "MIT, as this package",
        "drawn, nothing to download", "by class, any number",
    ),
    "omniglot": Known(
        "omniglot", "handwritten characters of 50 alphabets", "MIT", "https://github.com/brendenlake/omniglot",
        "Vinyals et al. 2016", True, "images_background.zip and images_evaluation.zip",
    ),
    "cifar-fs": Known(
        "cifar-fs", "CIFAR-100, split by class; 32 x 32", UNSTATED, "https://www.cs.toronto.edu/~kriz/cifar.html",
        "Bertinetto et al. 2019", True, "cifar-100-python.tar.gz",
    ),
    "fc100": Known(
        "fc100", "CIFAR-100, split by superclass; 32 x 32", UNSTATED, "https://www.cs.toronto.edu/~kriz/cifar.html",
        "Oreshkin et al. 2018", True, "cifar-100-python.tar.gz",
    ),
    "mini-imagenet": Known(
        "mini-imagenet", "100 classes of ImageNet photos", IMAGENET, "https://www.image-net.org",
        "Ravi & Larochelle 2017", archives="images/ with train.csv, val.csv, test.csv; or class folders by WordNet id",
    ),
    "tiered-imagenet": Known(
        "tiered-imagenet", "608 classes of ImageNet photos, split by superclass", IMAGENET, "https://www.image-net.org",
        "Ren et al. 2018", archives="class folders by WordNet id, in train/, val/, test/ or together",
    ),
    "cub": Known(
        "cub", "photos of 200 kinds of birds", UNSTATED,
        "https://www.vision.caltech.edu/datasets/cub_200_2011/", "Chen et al. 2019", archives="CUB_200_2011.tgz",
    ),
}  # fmt: skip


def known(name: str) -> Known:
    """The data set of that name. Raises ConfigError with a suggestion if there is none."""
    if name in KNOWN:
        return KNOWN[name]
    if name in ("cifar-100", "cifar100"):
        raise ConfigError(f"'{name}' has two class splits", hint="choose cifar-fs or fc100; they share the download")
    raise ConfigError(f"unknown data set '{name}'", hint=f"{suggest(name, KNOWN)}`metadiff data list` shows all")


def open_dataset(
    root: Path, *, layout: str = "auto", seed: int = 0, keep_empty: bool = False, progress: Progress = no_progress
) -> Dataset:
    """Find the splits of the data set below `root`.

    `layout` is "folder", a name of LAYOUTS, or "auto", which recognises the benchmarks whose folders could not be
    classes and takes everything else as class folders. `seed` splits class folders that are not split. `progress` is
    told the number of images found so far; how many there will be is not known. Raises DataError if there is nothing to
    use, also for a class folder without images unless `keep_empty`; ConfigError for an unknown layout.
    """
    openers: dict[str, Opener] = {"auto": open_detected, "folder": open_folder, **LAYOUTS}
    if layout not in openers:
        raise ConfigError(
            f"unknown layout '{layout}'", hint=f"{suggest(layout, openers)}choose one of {', '.join(openers)}"
        )
    check_folder(root)
    try:
        return openers[layout](root, seed, Scan(keep_empty=keep_empty, progress=progress))
    except OSError as error:
        where = error.filename or root
        raise DataError(f"{where} cannot be read ({reason_of(error)})", hint="check its permissions") from error


def split_lists(name: str) -> dict[str, Any]:
    """The published class lists of a benchmark, by split."""
    lists: dict[str, Any] = json.loads((Path(__file__).parent / "splits" / f"{name}.json").read_text(encoding="utf-8"))
    return lists


def open_detected(root: Path, seed: int, scan: Scan) -> Dataset:
    """Read a benchmark that its folders and files identify, or else class folders."""
    csv_files = any((root / f"{name}.csv").is_file() for name in SPLITS) and (root / "images").is_dir()
    drawings = any((root / inner).is_dir() for inner in (OMNIGLOT_FOLDER, "images_background", "images_evaluation"))
    found = "mini-imagenet" if csv_files else "omniglot" if drawings else None
    if (root / "CUB_200_2011" / "images").is_dir():
        found = "cub"
    if found is None:
        return open_folder(root, seed, scan)
    scan.notes.append(f"{root} is read as {found}")
    return LAYOUTS[found](root, seed, scan)


def open_mini_imagenet(root: Path, seed: int, scan: Scan) -> Dataset:
    """Read images/ with train.csv, val.csv, test.csv (Ravi & Larochelle 2017), or class folders by WordNet id."""
    if any((root / f"{name}.csv").is_file() for name in SPLITS):
        return _from_csv(root, scan)
    return _from_lists(root, "mini-imagenet", scan)


def open_tiered_imagenet(root: Path, seed: int, scan: Scan) -> Dataset:
    """Read class folders by WordNet id, in train/, val/, test/ or together (Ren et al. 2018)."""
    return _from_lists(root, "tiered-imagenet", scan)


def open_cub(root: Path, seed: int, scan: Scan) -> Dataset:
    """Read CUB_200_2011/images/<class>/, split as Chen et al. 2019 do."""
    inner = next((root / i for i in ("CUB_200_2011/images", "images") if (root / i).is_dir()), root)
    return _from_lists(inner, "cub", scan)


def open_omniglot(root: Path, seed: int, scan: Scan) -> Dataset:
    """Read omniglot-py/images_{background,evaluation}/<alphabet>/<character>/, split as Vinyals et al. 2016 do."""
    base = root / OMNIGLOT_FOLDER if (root / OMNIGLOT_FOLDER).is_dir() else root
    places: dict[str, dict[str, Path]] = {
        split: {
            f"{alphabet}/{character}": base / f"images_{part}" / alphabet / character
            for part, alphabets in parts.items()
            for alphabet, characters in alphabets.items()
            for character in characters
        }
        for split, parts in split_lists("omniglot").items()
    }
    return _known_folders(base, "omniglot", places, scan)


def open_cifar_fs(root: Path, seed: int, scan: Scan) -> Dataset:
    """Read CIFAR-100 as torchvision lays it out, with the class split of CIFAR-FS (Bertinetto et al. 2019)."""
    wanted = {split: [fine for _, fine in pairs] for split, pairs in split_lists("cifar-fs").items()}
    return _cifar(root, "cifar-fs", lambda data: wanted)


def open_fc100(root: Path, seed: int, scan: Scan) -> Dataset:
    """Read CIFAR-100 as torchvision lays it out, split by superclass (Oreshkin et al. 2018)."""
    lists = split_lists("fc100")

    def wanted(data: "Cifar") -> dict[str, list[str]]:
        return {
            split: [fine for fine in data.fine_names if data.parents.get(fine) in coarse]
            for split, coarse in lists.items()
        }

    return _cifar(root, "fc100", wanted)


LAYOUTS: dict[str, Opener] = {
    "mini-imagenet": open_mini_imagenet,
    "tiered-imagenet": open_tiered_imagenet,
    "cub": open_cub,
    "omniglot": open_omniglot,
    "cifar-fs": open_cifar_fs,
    "fc100": open_fc100,
}


def _from_lists(root: Path, name: str, scan: Scan) -> Dataset:
    """Class folders of the published lists, in split folders or together (other folders may lie beside).

    Split folders that hold none of the published classes are read with the classes that they have.
    """
    lists: dict[str, list[str]] = split_lists(name)
    inside = split_folders(root, among_others=True)
    parents = inside or dict.fromkeys(SPLITS, root)
    places = {split: {cls: parent / cls for cls in lists[split]} for split, parent in parents.items()}
    if inside and not any(folder.is_dir() for found in places.values() for folder in found.values()):
        splits = {split: scan_classes(folder, name=split, scan=scan) for split, folder in inside.items()}
        scan.notes.append(f"the classes of {root} do not have the names of {name}: its own split folders are used")
        return dataset_of(name, root, splits, scan)
    used = {folder for found in places.values() for folder in found.values()}
    unused = sum(folder not in used for parent in dict.fromkeys(parents.values()) for folder in subfolders(parent))
    if unused:
        scan.notes.append(f"{unused} folders are not among the classes of {name} here and are left out")
    return _known_folders(root, name, places, scan)


def _known_folders(root: Path, name: str, places: Mapping[str, Mapping[str, Path]], scan: Scan) -> Dataset:
    """The splits of the published classes whose folders exist; `places` has a folder per split and class."""
    folders = {s: {cls: place for cls, place in found.items() if place.is_dir()} for s, found in places.items()}
    wanted, there = (sum(map(len, by_split.values())) for by_split in (places, folders))
    if there == 0:
        raise DataError(
            f"{root} has none of the classes of {name}", hint="give its folder, or --set data.layout=folder"
        )
    if there < wanted:
        scan.notes.append(f"{wanted - there} of the {wanted} classes of {name} are missing")
    splits = {s: from_folders(found.items(), name=s, root=root, scan=scan) for s, found in folders.items() if found}
    return dataset_of(name, root, splits, scan)


def _from_csv(root: Path, scan: Scan) -> Dataset:
    """images/ and lists of `filename,label`."""
    files = {name: root / f"{name}.csv" for name in SPLITS}
    splits = {name: _csv_split(root, path, name) for name, path in files.items() if path.is_file()}
    if missing := [name for name in SPLITS if name not in splits]:
        scan.notes.append(f"no {', '.join(missing)}.csv")
    return dataset_of("mini-imagenet", root, splits, scan)


def _csv_split(root: Path, path: Path, name: str) -> Split:
    """A split from a list of `filename,label`; the files lie in images/. Raises DataError."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = [
                (row[0], class_name(row[1])) for row in csv.reader(file) if len(row) >= 2 and is_image(Path(row[0]))
            ]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read ({error})", hint="expected lines `filename,label` in UTF-8") from error
    if not rows:
        raise DataError(f"{path} lists no images", hint="expected lines `filename,label` below a header")
    folder = root / "images"
    absent = [file for file, _ in rows if not (folder / file).is_file()]
    if absent:
        raise DataError(f"{len(absent)} of {len(rows)} images of {path} are not in {folder}, the first is {absent[0]}",
                        hint="unpack all images into that folder")  # fmt: skip
    classes = tuple(sorted({label for _, label in rows}))
    labels = tuple(classes.index(label) for _, label in rows)
    return Split(name, classes, tuple(str(folder / file) for file, _ in rows), labels, str(root))


class Cifar:
    """Both parts of CIFAR-100: images (60000, 32, 32, 3), fine class of each, superclass of each fine class."""

    def __init__(self, folder: Path) -> None:
        """Raises DataError for files that do not hold CIFAR-100."""
        parts = [load_pickle(folder / part) for part in ("train", "test")]
        meta = load_pickle(folder / "meta")
        try:
            pixels = np.concatenate([np.asarray(part["data"], dtype=np.uint8) for part in parts])
            self.images = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
            self.fine = np.concatenate([np.asarray(part["fine_labels"], dtype=np.int64) for part in parts])
            self.fine_names = [str(name) for name in meta["fine_label_names"]]
            coarse = np.concatenate([np.asarray(part["coarse_labels"], dtype=np.int64) for part in parts])
            if not len(self.images) == len(self.fine) == len(coarse):
                raise ValueError(f"{len(self.images)} images, {len(self.fine)} labels")
            names = [str(name) for name in meta["coarse_label_names"]]
            self.parents = {
                self.fine_names[f]: names[c] for f, c in set(zip(self.fine.tolist(), coarse.tolist(), strict=True))
            }
        except (KeyError, ValueError, TypeError, IndexError) as error:
            raise DataError(
                f"{folder} does not hold CIFAR-100 ({error})", hint="unpack the Python version again"
            ) from error


def _cifar(root: Path, name: str, wanted: Callable[[Cifar], Mapping[str, list[str]]]) -> Dataset:
    folder = root / CIFAR_FOLDER if (root / CIFAR_FOLDER).is_dir() else root
    absent = [part for part in ("train", "test", "meta") if not (folder / part).is_file()]
    if absent:
        raise DataError(
            f"{folder} has no file {', '.join(absent)}", hint=f"unpack CIFAR-100 (Python) to {CIFAR_FOLDER}/"
        )
    data = Cifar(folder)
    splits = {split: _cifar_split(data, split, names, root) for split, names in wanted(data).items()}
    return Dataset(name, str(root), splits)


def _cifar_split(data: Cifar, split: str, names: list[str], root: Path) -> Split:
    classes = sorted(names)
    unknown = set(classes) - set(data.fine_names)
    if unknown:
        raise DataError(f"{root} has no class '{min(unknown)}'", hint="unpack CIFAR-100 (Python) again")
    label_of = {data.fine_names.index(cls): i for i, cls in enumerate(classes)}
    rows = np.flatnonzero(np.isin(data.fine, list(label_of)))
    rows = rows[np.argsort([label_of[int(f)] for f in data.fine[rows]], kind="stable")]
    labels = tuple(label_of[int(f)] for f in data.fine[rows])
    seen: Counter[int] = Counter()
    paths = []
    for label in labels:
        paths.append(f"{classes[label]}/{seen[label]:04d}")
        seen[label] += 1
    return Split(split, tuple(classes), tuple(paths), labels, str(root), data.images[rows])


def load_pickle(path: Path) -> dict[str, Any]:
    """A CIFAR batch, read by a restricted unpickler. Raises DataError for any other file."""
    try:
        if path.stat().st_size > MAX_BATCH:
            raise ValueError(f"more than {MAX_BATCH // 1_000_000} MB")
        data = _PlainUnpickler(io.BytesIO(path.read_bytes()), encoding="latin1").load()
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise DataError(
            f"{path} cannot be read as a CIFAR batch ({error})", hint="unpack CIFAR-100 (Python) again"
        ) from error
    if not isinstance(data, dict):
        raise DataError(f"{path} is no CIFAR batch", hint="unpack CIFAR-100 (Python) again")
    return data


class _PlainUnpickler(pickle._Unpickler):
    """Allows only what a dictionary of NumPy arrays needs: a pickle can otherwise run any code.

    It builds on the unpickler in Python. The one in C makes a table as long as the largest number that a file gives to
    an object, so that a dozen bytes can ask it for gigabytes.
    """

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in {("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct")}:
            return np.empty(0).__reduce__()[0]  # wherever this version of NumPy keeps it
        if (module, name) == ("numpy", "ndarray"):
            return np.ndarray
        if (module, name) == ("numpy", "dtype"):
            return _dtype
        if (module, name) == ("_codecs", "encode"):
            return _encode
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no image batch needs")


def _dtype(kind: Any, align: Any = False, copy: Any = False) -> Any:
    """`np.dtype`; old pickles have 0 and 1 where newer versions of NumPy insist on booleans."""
    made = np.dtype(kind, align=bool(align), copy=bool(copy))
    if made.kind not in "biuf":
        raise pickle.UnpicklingError(f"it asks for values of type {made}, which no image batch needs")
    return made


def _encode(text: Any, encoding: Any = "") -> bytes:
    """`codecs.encode` as NumPy's pickles use it; other codecs decompress, and may do worse."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it asks for the encoding {encoding!r:.40}, which no image batch needs")
    return codecs.encode(text, "latin1")
