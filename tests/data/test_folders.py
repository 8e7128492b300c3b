"""Which files belong to which class of which split."""

import os
import tempfile
import unicodedata
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metadiff_cli.data.benchmarks import open_dataset
from metadiff_cli.data.folders import (
    Dataset,
    Split,
    all_classes,
    require_split,
    scan_classes,
    scan_support,
    split_by_class,
)
from metadiff_cli.data.scan import Scan
from metadiff_cli.errors import DataError, MetaDiffError
from tests.processes import as_plain_user


def touch(root: Path, *names: str) -> Path:
    """Empty files: folders are read without looking into images."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def class_folders(root: Path, count: int, images: int = 2) -> Path:
    return touch(root, *(f"class{c:02d}/{i}.png" for c in range(count) for i in range(images)))


def labelled(split: Split) -> set[tuple[str, str]]:
    """Pairs of class and file name."""
    return {(split.classes[label], Path(p).name) for p, label in zip(split.paths, split.labels, strict=True)}


def test_split_folders(tmp_path: Path) -> None:
    touch(tmp_path, "train/a/1.png", "train/b/1.png", "val/c/1.JPG", "test/d/1.webp")
    dataset = open_dataset(tmp_path)
    assert {name: split.classes for name, split in dataset.splits.items()} == {
        "train": ("a", "b"),
        "val": ("c",),
        "test": ("d",),
    }
    assert (dataset.notes, dataset.skipped, dataset.name) == ((), {}, tmp_path.name)


def test_one_split_folder_is_enough(tmp_path: Path) -> None:
    dataset = open_dataset(touch(tmp_path, "val/a/1.png", ".DS_Store", "README.md"))
    assert list(dataset.splits) == ["val"]


def test_a_class_beside_train_makes_train_a_class(tmp_path: Path) -> None:
    dataset = open_dataset(touch(tmp_path, "train/x/1.png", "bus/1.png"))
    assert dataset.splits["test"].classes == ("bus", "train")


def test_scanning_tells_how_many_images_it_found(tmp_path: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    touch(tmp_path, "a/1.png", "a/2.png", "a/notes.txt", "b/1.png", "c/1.png")
    open_dataset(tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(2, None), (3, None), (4, None)]


def test_class_folders_are_split_by_class_and_it_is_said(tmp_path: Path) -> None:
    dataset = open_dataset(class_folders(tmp_path, 20), seed=3)
    assert [len(s.classes) for s in dataset.splits.values()] == [13, 3, 4]
    assert "20 classes" in dataset.notes[0] and "seed 3" in dataset.notes[0] and "13 / 3 / 4" in dataset.notes[0]


@pytest.mark.parametrize("count", [1, 5])
def test_few_classes_are_all_for_testing(tmp_path: Path, count: int) -> None:
    dataset = open_dataset(class_folders(tmp_path, count))
    assert list(dataset.splits) == ["test"] and len(dataset.splits["test"].classes) == count
    assert "too few" in dataset.notes[0]


def test_six_classes_give_two_to_each_split(tmp_path: Path) -> None:
    assert [len(s.classes) for s in open_dataset(class_folders(tmp_path, 6)).splits.values()] == [2, 2, 2]


@settings(deadline=None)  # a busy machine is no failure
@given(count=st.integers(1, 120), images=st.integers(1, 3), seed=st.integers(0, 2**32 - 1))
def test_split_by_class_is_a_partition_and_follows_the_seed(count: int, images: int, seed: int) -> None:
    labels = tuple(c for c in range(count) for _ in range(images))
    paths = tuple(f"{c}/{i}.png" for c in range(count) for i in range(images))
    whole = Split("all", tuple(f"class{c:03d}" for c in range(count)), paths, labels, "root")
    splits, _ = split_by_class(whole, seed)
    kept = [cls for split in splits.values() for cls in split.classes]
    assert sorted(kept) == list(whole.classes)
    assert sorted(path for split in splits.values() for path in split.paths) == sorted(paths)
    assert all(split.classes[label] == f"class{int(path.split('/')[0]):03d}"
               for split in splits.values() for path, label in zip(split.paths, split.labels, strict=True))  # fmt: skip
    assert split_by_class(whole, seed)[0] == splits
    if count >= 6:
        assert min(len(split.classes) for split in splits.values()) >= 2


def test_another_seed_gives_another_split(tmp_path: Path) -> None:
    class_folders(tmp_path, 30)
    drawn = {open_dataset(tmp_path, seed=seed).splits["train"].classes for seed in range(5)}
    assert len(drawn) > 1


def test_order_is_sorted_and_nested_folders_belong_to_their_class(tmp_path: Path) -> None:
    split = scan_classes(touch(tmp_path, "b/2.png", "b/1.png", "a/deep/er/3.png", "a/0.png"))
    assert split.classes == ("a", "b")
    assert [Path(path).relative_to(tmp_path).as_posix() for path in split.paths] == [
        "a/0.png",
        "a/deep/er/3.png",
        "b/1.png",
        "b/2.png",
    ]


def test_hidden_things_are_ignored_and_other_files_counted(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.png", "a/._1.png", "a/Thumbs.db", "a/notes.txt", "a/.cache/2.png")
    touch(tmp_path, "__MACOSX/a/1.png", ".git/b/1.png", "b/1.png", "b/movie.mp4")
    dataset = open_dataset(tmp_path)
    assert labelled(dataset.splits["test"]) == {("a", "1.png"), ("b", "1.png")}
    assert dataset.skipped == {".txt": 1, ".mp4": 1}


def test_class_names_are_any_unicode(tmp_path: Path) -> None:
    names = ("Vögel", "狐", "a b [c]", "🦊")
    assert set(scan_classes(touch(tmp_path, *(f"{name}/1.png" for name in names))).classes) == set(names)


def test_errors_name_the_folder_and_the_next_step(tmp_path: Path) -> None:
    touch(tmp_path, "file", "photos.zip", "flat/1.png", "classes/cat/1.png", "classes/dog/notes.txt")
    (tmp_path / "empty").mkdir()
    for name, message in {
        "gone": "does not exist",
        "file": "is a file",
        "photos.zip": "is an archive, not a folder",
        "flat": "has images but no class folders",
        "empty": "has no class folders",
        "classes": r"class 'dog' .* has no images \(left out, as they are not images: 1 \.txt\)",
    }.items():
        with pytest.raises(DataError, match=message) as caught:
            open_dataset(tmp_path / name)
        assert caught.value.hint


def test_unknown_layout_has_a_suggestion(tmp_path: Path) -> None:
    with pytest.raises(MetaDiffError, match="did you mean 'mini-imagenet'") as caught:
        open_dataset(tmp_path, layout="mini-imagnet")
    assert "mini-imagnet" in caught.value.message


def test_a_relative_root_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(class_folders(tmp_path, 2))
    assert open_dataset(Path(".")).name == tmp_path.name


def test_require_split_names_what_there_is(tmp_path: Path) -> None:
    dataset = open_dataset(touch(tmp_path, "train/a/1.png", "val/b/1.png"))
    assert require_split(dataset, "val").classes == ("b",)
    assert require_split(dataset, "all").classes == ("a", "b")
    with pytest.raises(DataError, match=r"no test classes .*train, val"):
        require_split(dataset, "test")


def test_all_classes_is_the_union(tmp_path: Path) -> None:
    class_folders(tmp_path, 10)
    dataset = open_dataset(tmp_path)
    union = all_classes(dataset)
    assert union.classes == tuple(f"class{c:02d}" for c in range(10))
    assert {p: union.classes[i] for p, i in zip(union.paths, union.labels, strict=True)} == {
        str(path): path.parent.name for path in tmp_path.rglob("*.png")
    }


def test_all_classes_keeps_pixels_beside_their_labels() -> None:
    def part(name: str, cls: str, value: int) -> Split:
        return Split(name, (cls,), (f"{cls}/0",), (0,), "r", np.full((1, 2, 2, 3), value, dtype=np.uint8))

    union = all_classes(Dataset("d", "r", {"train": part("train", "z", 9), "val": part("val", "a", 5)}))
    assert union.classes == ("a", "z") and union.labels == (1, 0)
    assert union.pixels is not None and union.pixels[:, 0, 0, 0].tolist() == [9, 5]


@pytest.mark.parametrize(
    "names",
    [("train", "valid", "test"), ("train", "validation", "test"), ("Train", "Val", "Test"), ("TRAIN", "VALID", "TEST"),
     ("training", "validation", "testing")],
)  # fmt: skip
def test_split_folders_have_their_names_in_any_case_and_synonyms(tmp_path: Path, names: tuple[str, ...]) -> None:
    touch(tmp_path, *(f"{name}/{cls}/1.png" for name, cls in zip(names, "abc", strict=True)))
    dataset = open_dataset(tmp_path)
    assert {name: split.classes for name, split in dataset.splits.items()} == {
        "train": ("a",), "val": ("b",), "test": ("c",)
    }  # fmt: skip
    assert f"{names[1]} is val" in dataset.notes[0]


def test_two_folders_of_one_split_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="two folders of val classes: val and validation"):
        open_dataset(touch(tmp_path, "train/a/1.png", "val/b/1.png", "validation/c/1.png"))


def test_an_ordinary_classification_data_set_is_split_by_class(tmp_path: Path) -> None:
    """Its train and test folders hold the same classes: what they split are images."""
    touch(tmp_path, *(f"{split}/class{c}/{split}.png" for split in ("train", "Test") for c in range(8)))
    dataset = open_dataset(tmp_path, seed=2)
    parts = [set(split.classes) for split in dataset.splits.values()]
    assert [len(part) for part in parts] == [4, 2, 2] and len(set.union(*parts)) == 8
    assert all(len(split.paths) == 2 * len(split.classes) for split in dataset.splits.values())
    assert any("train, Test hold the same classes" in note and "8 classes are split" in note for note in dataset.notes)
    only = open_dataset(touch(tmp_path / "few", "train/cat/1.png", "train/dog/2.png", "test/cat/3.png"))
    assert only.splits["test"].classes == ("cat", "dog") and len(only.splits["test"].paths) == 3


def test_a_class_in_two_splits_is_an_error_that_names_it(tmp_path: Path) -> None:
    touch(tmp_path, *(f"train/{c}/1.png" for c in "abcd"), *(f"test/{c}/1.png" for c in "dxyz"))
    with pytest.raises(DataError, match="such as 'd'") as caught:
        open_dataset(tmp_path)
    assert caught.value.hint is not None and "one of them" in caught.value.hint


def test_a_support_takes_the_train_folder_of_a_data_set(tmp_path: Path) -> None:
    touch(tmp_path, "Train/cat/1.png", "Train/dog/2.png", "Test/cat/3.png", "Test/dog/4.png")
    scan = Scan()
    split = scan_support(tmp_path, scan)
    assert labelled(split) == {("cat", "1.png"), ("dog", "2.png")}
    assert "the classes of Train are taken" in scan.notes[0]
    assert scan_support(touch(tmp_path / "plain", "train/1.png", "bus/2.png"), Scan()).classes == ("bus", "train")


def test_one_name_in_two_spellings_is_one_class(tmp_path: Path) -> None:
    """macOS writes accents as characters of their own."""
    for form in ("NFC", "NFD"):
        touch(tmp_path, f"{unicodedata.normalize(form, 'café')}/{form}.png", f"dog/{form}.png")
    dataset = open_dataset(tmp_path)
    assert dataset.splits["test"].classes == (unicodedata.normalize("NFC", "café"), "dog")
    assert len(dataset.splits["test"].paths) == 4


def test_names_that_are_no_text_are_classes_of_their_own(tmp_path: Path) -> None:
    for raw in (b"caf\xe9", b"caf\xe8"):
        folder = os.fsencode(tmp_path) + b"/" + raw
        os.mkdir(folder)
        Path(os.fsdecode(folder), "1.png").touch()
    classes = open_dataset(tmp_path).splits["test"].classes
    assert classes == ("caf\\xe8", "caf\\xe9") and all(name.encode() for name in classes)


def test_what_cannot_be_read_is_left_out_with_a_note() -> None:
    """A class that is locked, one that can be listed and not looked at, and a link into a locked folder."""

    def scan(root: Path) -> Dataset:
        return open_dataset(root)

    with tempfile.TemporaryDirectory() as place:
        root = touch(Path(place), "a/1.png", "b/1.png", "locked/1.png", "listed/1.png", "listed/sub/2.png")
        (root / "a" / "link.png").symlink_to(root / "locked" / "1.png")
        (root / "a" / "link").symlink_to(root / "locked" / "1.png")
        root.chmod(0o755)
        (root / "locked").chmod(0)
        (root / "listed").chmod(0o444)
        try:
            dataset = as_plain_user(partial(scan, root))
        finally:
            for name in ("locked", "listed"):
                (root / name).chmod(0o755)
        found = dataset.splits["test"]
        assert labelled(found) == {("a", "1.png"), ("a", "link.png"), ("b", "1.png"), ("listed", "1.png")}
        assert {Path(path).name for path, _ in dataset.unreadable} == {"locked", "link", "sub"}
        assert {reason for _, reason in dataset.unreadable} == {"Permission denied"}
        assert "left out, as they cannot be read" in dataset.notes[-1]
