"""The field's data sets in their layouts on disk, as tiny trees with real class names."""

import pickle
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from metadiff_cli.data.benchmarks import LAYOUTS, load_pickle, open_dataset, split_lists
from metadiff_cli.errors import DataError

SPLITS = ("train", "val", "test")


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def names_in(value: Any) -> set[str]:
    """All class names of a split list, whichever way it is nested."""
    if isinstance(value, dict):
        return {f"{key}/{name}" for key, inner in value.items() for name in names_in(inner)}
    return {"/".join(item) if isinstance(item, list) else item for item in value}


# classes of train, val and test as the papers give them
SIZES = {
    "mini-imagenet": (64, 16, 20),
    "tiered-imagenet": (351, 97, 160),
    "cub": (100, 50, 50),
    "cifar-fs": (64, 16, 20),
    "fc100": (12, 4, 4),  # superclasses
}


@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_published_splits_are_disjoint(name: str) -> None:
    parts = [names_in(split_lists(name)[split]) for split in SPLITS]
    assert not any(a & b for a, b in pairwise([*parts, parts[0]]))
    if name in SIZES:
        assert tuple(len(part) for part in parts) == SIZES[name]


@pytest.mark.parametrize("name", ["mini-imagenet", "tiered-imagenet"])
@pytest.mark.parametrize("nested", [True, False])
def test_imagenet_class_folders(tmp_path: Path, name: str, nested: bool) -> None:
    lists = split_lists(name)
    for split in SPLITS:
        touch(tmp_path, *(f"{split}/{c}/1.png" if nested else f"{c}/1.png" for c in lists[split]))
    dataset = open_dataset(tmp_path, layout=name)
    assert {s: set(part.classes) for s, part in dataset.splits.items()} == {s: set(lists[s]) for s in SPLITS}
    assert dataset.notes == ()


def test_two_of_three_split_folders_need_no_note(tmp_path: Path) -> None:
    lists = split_lists("mini-imagenet")
    touch(tmp_path, *(f"{split}/{c}/1.png" for split in ("train", "val") for c in lists[split]))
    dataset = open_dataset(tmp_path, layout="mini-imagenet")
    assert list(dataset.splits) == ["train", "val"] and dataset.notes == ()


def test_missing_and_foreign_classes_are_noted(tmp_path: Path) -> None:
    lists = split_lists("mini-imagenet")
    touch(tmp_path, *(f"{lists[split][0]}/1.png" for split in SPLITS), "unicorn/1.png")
    notes = " ".join(open_dataset(tmp_path, layout="mini-imagenet").notes)
    assert "97 of the 100 classes" in notes and "1 folders" in notes


def test_own_split_folders_are_taken_at_their_word(tmp_path: Path) -> None:
    touch(tmp_path, "train/dog/1.png", "test/cat/1.png")
    dataset = open_dataset(tmp_path, layout="mini-imagenet")
    assert dataset.splits["train"].classes == ("dog",) and "own" in dataset.notes[0]


def test_a_folder_without_any_of_the_classes(tmp_path: Path) -> None:
    touch(tmp_path, "dog/1.png")
    for name in ("mini-imagenet", "tiered-imagenet", "cub", "omniglot"):
        with pytest.raises(DataError, match=f"none of the classes of {name}"):
            open_dataset(tmp_path, layout=name)


@pytest.mark.parametrize("layout", ["mini-imagenet", "auto"])
def test_mini_imagenet_lists(tmp_path: Path, layout: str) -> None:
    touch(tmp_path, *(f"images/{c}{i}.jpg" for c in "ab" for i in range(2)))
    lines = "filename,label\nb0.jpg,n2\na0.jpg,n1\na1.jpg,n1\n"
    (tmp_path / "train.csv").write_text(lines, encoding="utf-8-sig")
    (tmp_path / "test.csv").write_text("filename,label\nb1.jpg,n2\n")
    dataset = open_dataset(tmp_path, layout=layout)
    train = dataset.splits["train"]
    assert list(dataset.splits) == ["train", "test"] and train.classes == ("n1", "n2")
    assert [(Path(p).name, i) for p, i in zip(train.paths, train.labels, strict=True)] == [
        ("b0.jpg", 1),
        ("a0.jpg", 0),
        ("a1.jpg", 0),
    ]
    assert "no val.csv" in dataset.notes


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"filename,label\n", "lists no images"), (b"filename,label\ngone.jpg,n1\n", "the first is gone.jpg"),
     (b"\xff\xfe\x00", "cannot be read")],
)  # fmt: skip
def test_bad_lists(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "train.csv").write_bytes(content)
    with pytest.raises(DataError, match=message):
        open_dataset(tmp_path, layout="mini-imagenet")


@pytest.mark.parametrize("prefix", ["", "omniglot-py/"])
@pytest.mark.parametrize("layout", ["omniglot", "auto"])
def test_omniglot(tmp_path: Path, prefix: str, layout: str) -> None:
    wanted = {split: _some_characters(split) for split in SPLITS}
    for folders in wanted.values():
        touch(tmp_path, *(f"{prefix}images_{part}/{name}/01.png" for part, name in folders))
    dataset = open_dataset(tmp_path, layout=layout)
    found = {split: set(part.classes) for split, part in dataset.splits.items()}
    assert found == {split: {name for _, name in folders} for split, folders in wanted.items()}
    assert any("classes of omniglot are missing" in note for note in dataset.notes)


def _some_characters(split: str) -> list[tuple[str, str]]:
    """Two characters of the first alphabet of each part: (part, "Alphabet/characterNN")."""
    parts = split_lists("omniglot")[split]
    first = {part: next(iter(alphabets.items())) for part, alphabets in parts.items() if alphabets}
    return [(part, f"{alphabet}/{c}") for part, (alphabet, characters) in first.items() for c in characters[:2]]


@pytest.mark.parametrize("inner", ["CUB_200_2011/images/", "images/", ""])
def test_cub(tmp_path: Path, inner: str) -> None:
    lists = split_lists("cub")
    touch(tmp_path, *(f"{inner}{c}/1.jpg" for split in SPLITS for c in lists[split]))
    dataset = open_dataset(tmp_path, layout="cub")
    assert {s: set(part.classes) for s, part in dataset.splits.items()} == {s: set(lists[s]) for s in SPLITS}


def cifar_tree(root: Path) -> Path:
    """CIFAR-100 with two images a class and part; the first pixel of an image is its fine class."""
    pairs = sorted({tuple(pair) for split in SPLITS for pair in split_lists("cifar-fs")[split]}, key=lambda p: p[1])
    fine_names, coarse_names = [fine for _, fine in pairs], sorted({coarse for coarse, _ in pairs})
    fine = np.tile(np.arange(100), 2)
    coarse = [coarse_names.index(pairs[f][0]) for f in fine]
    data = np.zeros((200, 3072), dtype=np.uint8)
    data[:, 0] = fine
    data[:, 1024] = 200  # the green channel begins here
    folder = root / "cifar-100-python"
    folder.mkdir()
    batch = {"data": data, "fine_labels": fine.tolist(), "coarse_labels": coarse}
    for part in ("train", "test"):
        (folder / part).write_bytes(pickle.dumps(batch, protocol=2))
    meta = {"fine_label_names": fine_names, "coarse_label_names": coarse_names}
    (folder / "meta").write_bytes(pickle.dumps(meta, protocol=2))
    return root


@pytest.mark.parametrize(("layout", "sizes"), [("cifar-fs", [64, 16, 20]), ("fc100", [60, 20, 20])])
@pytest.mark.parametrize("inside", [False, True])
def test_cifar(tmp_path: Path, layout: str, sizes: list[int], inside: bool) -> None:
    root = cifar_tree(tmp_path)
    dataset = open_dataset(root / "cifar-100-python" if inside else root, layout=layout)
    assert [len(split.classes) for split in dataset.splits.values()] == sizes
    meta = load_pickle(root / "cifar-100-python" / "meta")["fine_label_names"]
    for split in dataset.splits.values():
        assert split.pixels is not None and split.pixels.shape == (4 * len(split.classes), 32, 32, 3)
        assert [meta[i] for i in split.pixels[:, 0, 0, 0]] == [split.classes[label] for label in split.labels]
        assert set(split.pixels[:, 0, 0, 1].tolist()) == {200}
        assert len(set(split.paths)) == len(split.paths) == len(split.labels)


def test_fc100_keeps_superclasses_apart(tmp_path: Path) -> None:
    dataset = open_dataset(cifar_tree(tmp_path), layout="fc100")
    parent = {fine: coarse for split in SPLITS for coarse, fine in split_lists("cifar-fs")[split]}
    found = {split: {parent[c] for c in part.classes} for split, part in dataset.splits.items()}
    assert found == {split: set(split_lists("fc100")[split]) for split in SPLITS}


def test_cifar_files_that_are_missing_or_odd(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file train, test, meta"):
        open_dataset(tmp_path, layout="cifar-fs")
    root = cifar_tree(tmp_path)
    train = root / "cifar-100-python" / "train"
    whole = train.read_bytes()
    short = {"data": np.zeros((1, 3072), dtype=np.uint8), "fine_labels": [], "coarse_labels": []}
    for content in (b"", whole[:-100], b"words", pickle.dumps([1]), pickle.dumps({"data": 1}), pickle.dumps(short)):
        train.write_bytes(content)
        with pytest.raises(DataError, match="cifar-100-python"):
            open_dataset(root, layout="cifar-fs")


class Malicious:
    """A pickle that would write a file while it is read."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.target,))


class Evaluated:
    def __reduce__(self) -> tuple[Any, ...]:
        return (eval, ("1 + 1",))


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_malicious_pickle_is_refused(tmp_path: Path, protocol: int) -> None:
    root, target = cifar_tree(tmp_path), tmp_path / "pwned"
    for payload in (Malicious(target), {"data": Evaluated()}):
        (root / "cifar-100-python" / "train").write_bytes(pickle.dumps(payload, protocol=protocol))
        with pytest.raises(DataError, match="which no image batch needs"):
            open_dataset(root, layout="cifar-fs")
    assert not target.exists()


class OldArray:
    """An array as Python 2 and old versions of numpy pickled it: 0 and 1 in place of booleans, bytes as text."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    def __reduce__(self) -> tuple[Any, ...]:
        reconstruct, arguments, _ = self.values.__reduce__()
        state = (1, self.values.shape, OldType(), False, self.values.tobytes())
        return (reconstruct, arguments, state)


class OldType:
    def __reduce__(self) -> tuple[Any, ...]:
        return (np.dtype, ("u1", 0, 1), (3, "|", None, None, None, -1, -1, 0))


def test_old_pickles_are_read_without_a_warning(tmp_path: Path) -> None:
    values = np.arange(12, dtype=np.uint8).reshape(3, 4)
    path = tmp_path / "batch"
    path.write_bytes(pickle.dumps({"data": OldArray(values)}, protocol=2).replace(b"numpy._core", b"numpy.core"))
    read = load_pickle(path)["data"]
    assert read.dtype == np.uint8 and np.array_equal(read, values)
