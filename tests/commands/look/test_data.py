"""`metadiff data list` and `verify`."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from metadiff_cli.data.benchmarks import KNOWN
from tests.worlds import Result, paint, validate

CLI = Callable[..., Result]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """train/ and test/ with two classes of three images each, all different and readable."""
    for s, split in enumerate(("train", "test")):
        for c in range(2):
            for i in range(3):
                paint(
                    tmp_path / "set" / split / f"{split}{c}" / f"{i}.png", (60 * c, 90, 200), seed=100 * s + 10 * c + i
                )
    return tmp_path / "set"


def report(cli: CLI, folder: Path, code: int = 0) -> dict[str, object]:
    result = cli("data", "verify", folder, "--json")
    assert result.code == code, result.err
    document: dict[str, object] = json.loads(result.out)
    return document


def test_list(cli: CLI) -> None:
    table = cli("data", "list")
    assert table.code == 0 and all(name in table.out for name in KNOWN)
    listed = {row["name"]: row for row in json.loads(cli("data", "list", "--json").out)["data"]}
    assert set(listed) == set(KNOWN) and listed["omniglot"]["licence"] == "MIT" and not listed["omniglot"]["here"]


def test_a_sound_folder(cli: CLI, folder: Path) -> None:
    document = report(cli, folder)
    assert document["splits"] == {"train": {"train0": 3, "train1": 3}, "test": {"test0": 3, "test1": 3}}
    assert document["corrupt"] == document["odd"] == document["empty_classes"] == []
    assert not any(document["duplicates"].values())  # type: ignore[attr-defined]
    shown = cli("data", "verify", folder)
    assert shown.code == 0 and "12 readable images" in shown.out


def test_corrupt_images_and_classes_are_exit_code_3(cli: CLI, folder: Path) -> None:
    whole = (folder / "train" / "train0" / "0.png").read_bytes()
    (folder / "train" / "train0" / "0.png").write_bytes(whole[:60])
    for path in (folder / "test" / "test1").iterdir():
        path.write_bytes(b"text")
    document = report(cli, folder, code=3)
    assert len(document["corrupt"]) == 4 and document["empty_classes"] == ["test/test1"]  # type: ignore[arg-type]
    assert document["splits"]["train"] == {"train0": 2, "train1": 3}  # type: ignore[index]
    shown = cli("data", "verify", folder)
    assert shown.code == 3 and "0.png" in shown.out and "test/test1" in shown.out and "try:" in shown.err


def test_an_empty_class_folder_is_a_finding_like_others(cli: CLI, folder: Path) -> None:
    for path in (folder / "train" / "train1").iterdir():
        path.unlink()
    document = report(cli, folder, code=3)
    assert document["empty_classes"] == ["train/train1"] and document["splits"]["train"]["train1"] == 0  # type: ignore[index]
    shown = cli("data", "verify", folder)
    assert "train/train1" in shown.out and "1 class without a readable image" in shown.err


def test_repeated_pictures_by_what_they_harm(cli: CLI, folder: Path) -> None:
    train = folder / "train"
    Image.open(train / "train0" / "0.png").save(train / "train0" / "same.bmp")  # another format, the same picture
    shutil.copy(train / "train0" / "1.png", train / "train1" / "other.png")
    shutil.copy(train / "train0" / "2.png", folder / "test" / "test0" / "leak.png")
    found = report(cli, folder)["duplicates"]
    names = {kind: [[Path(p).name for p in group] for group in groups] for kind, groups in found.items()}  # type: ignore[attr-defined]
    assert names == {
        "within_class": [["0.png", "same.bmp"]],
        "across_classes": [["1.png", "other.png"]],
        "across_splits": [["2.png", "leak.png"]],
    }


def test_tiny_long_and_plain_images_are_odd(cli: CLI, folder: Path) -> None:
    paint(folder / "train" / "train0" / "tiny.png", (9, 9, 9), seed=1, size=8)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (20, 200, 3), dtype=np.uint8)).save(folder / "train" / "train0" / "long.png")
    Image.new("RGB", (40, 40), (1, 2, 3)).save(folder / "train" / "train0" / "plain.png")
    odd = {Path(o["path"]).name: o["what"] for o in report(cli, folder)["odd"]}  # type: ignore[attr-defined]
    assert set(odd) == {"tiny.png", "long.png", "plain.png"}
    assert "8 x 8" in odd["tiny.png"] and "200 x 20" in odd["long.png"] and "one colour" in odd["plain.png"]


def test_a_folder_that_is_not_there(cli: CLI, tmp_path: Path) -> None:
    assert cli("data", "verify", tmp_path / "nowhere").code == 3
    assert cli("data", "prepare", "omniglt").code == 2


def test_glyphs_need_no_preparation(cli: CLI, tmp_path: Path) -> None:
    assert "nothing to prepare" in cli("data", "prepare", "glyphs").out
    assert validate(cli("data", "prepare", "glyphs", "--json"), "metadiff.data-prepare/1")["folder"] is None
    for option in ("--root", "--from-archive"):
        result = cli("data", "prepare", "glyphs", option, tmp_path)
        assert result.code == 2 and option in result.err and result.out == ""


def test_an_archive_for_a_data_set_that_is_there_is_refused(cli: CLI, tmp_path: Path) -> None:
    paint(tmp_path / "root" / "cub" / "a.png", (1, 2, 3), seed=0)
    (tmp_path / "cub.zip").touch()
    result = cli("data", "prepare", "cub", "--root", tmp_path / "root", "--from-archive", tmp_path / "cub.zip")
    assert result.code == 2 and "there already" in result.err and "--from-archive" in result.err


def test_what_is_left_out_or_not_what_it_seems(cli: CLI, folder: Path) -> None:
    train = folder / "train" / "train0"
    (train / "pointer.jpg").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    (train / "empty.png").touch()
    (train / "notes.txt").write_text("text")
    (train / "movie.mp4").write_bytes(b"1")
    Image.fromarray(np.arange(1600, dtype=np.uint16).reshape(40, 40)).save(train / "deep.png")
    document = report(cli, folder, code=3)
    assert document["skipped_files"] == 2 and document["skipped_extensions"] == {".txt": 1, ".mp4": 1}
    reasons = {Path(c["path"]).name: c["reason"] for c in document["corrupt"]}  # type: ignore[attr-defined]
    assert "git-lfs" in reasons["pointer.jpg"] and "empty" in reasons["empty.png"]
    (odd,) = document["odd"]  # type: ignore[misc]
    assert Path(odd["path"]).name == "deep.png" and "greyscale of more than 8 bits" in odd["what"]
    shown = cli("data", "verify", folder).out
    assert ".txt" in shown and ".mp4" in shown and "deep.png: greyscale" in shown
