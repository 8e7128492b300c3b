"""Sorting images into folders: nothing is overwritten or lost, and any class has a folder."""

import errno
import os
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metadiff_cli.data.sort import REJECTED, Sorter, folder_names


def file(path: Path, content: str = "x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def contents(root: Path) -> dict[str, str]:
    return {str(p.relative_to(root)): p.read_text() for p in sorted(root.rglob("*")) if p.is_file()}


def refuse_links(source: Path, target: Path) -> None:
    raise OSError(errno.EXDEV, "Invalid cross-device link")


def test_copies_stand_beside_what_is_there(tmp_path: Path) -> None:
    sorter = Sorter(tmp_path / "out", ["a"])
    file(tmp_path / "out" / "a" / "1.jpg", "old")
    first, second = file(tmp_path / "in" / "1.jpg", "new"), file(tmp_path / "in" / "deep" / "1.jpg", "newer")
    assert sorter.place(first, "a").new and sorter.place(second, "a").new
    assert contents(tmp_path / "out") == {"a/1.jpg": "old", "a/1 (2).jpg": "new", "a/1 (3).jpg": "newer"}
    assert first.exists() and second.exists()


@pytest.mark.parametrize("move", [False, True])
def test_identical_content_is_left(tmp_path: Path, move: bool) -> None:
    sorter = Sorter(tmp_path / "out", ["a"], move=move)
    file(tmp_path / "out" / "a" / "1.jpg", "same")
    image = file(tmp_path / "in" / "1.jpg", "same")
    placed = sorter.place(image, "a")
    assert (placed.path, placed.new) == (tmp_path / "out" / "a" / "1.jpg", False)
    assert image.exists() and contents(tmp_path / "out") == {"a/1.jpg": "same"}
    assert not sorter.place(placed.path, "a").new and placed.path.exists()  # onto itself


def test_move_keeps_the_content_and_the_time(tmp_path: Path) -> None:
    image = file(tmp_path / "in" / "1.jpg", "content")
    os.utime(image, (1_000_000, 1_000_000))
    placed = Sorter(tmp_path / "out", ["a"], move=True).place(image, None)
    assert placed.path == tmp_path / "out" / REJECTED / "1.jpg"
    assert not image.exists() and placed.path.read_text() == "content" and placed.path.stat().st_mtime == 1_000_000


def test_move_across_file_systems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", refuse_links)
    image = file(tmp_path / "in" / "1.jpg", "content")
    placed = Sorter(tmp_path / "out", ["a"], move=True).place(image, "a")
    assert not image.exists() and placed.path.read_text() == "content"


def test_moving_a_link_brings_the_picture_and_leaves_the_original(tmp_path: Path) -> None:
    original = file(tmp_path / "album" / "1.jpg", "content")
    link = tmp_path / "in.jpg"
    link.symlink_to("album/1.jpg")
    placed = Sorter(tmp_path / "out", ["a"], move=True).place(link, "a")
    assert placed.path.read_text() == "content" and not placed.path.is_symlink()
    assert original.exists() and not os.path.lexists(link)


@pytest.mark.parametrize("links", [True, False])
def test_two_runs_at_the_same_time_make_one_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    """Also where a file system has no hard links, and a copy takes its time."""
    if not links:
        monkeypatch.setattr(os, "link", refuse_links)
    images = [file(tmp_path / "in" / f"{i}.jpg", f"content {i}") for i in range(20)]
    begin = threading.Barrier(4)

    def run() -> None:
        sorter = Sorter(tmp_path / "out", ["a"])
        begin.wait()
        for image in images:
            sorter.place(image, "a")

    runs = [threading.Thread(target=run) for _ in range(4)]
    for thread in runs:
        thread.start()
    for thread in runs:
        thread.join()
    assert contents(tmp_path / "out") == {f"a/{i}.jpg": f"content {i}" for i in sorted(range(20), key=str)}


def test_an_image_that_cannot_be_removed_is_not_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = file(tmp_path / "in" / "1.jpg")
    unlink = Path.unlink

    def refuse(path: Path, missing_ok: bool = False) -> None:
        if path == image:
            raise PermissionError(errno.EACCES, "Permission denied")
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(PermissionError):
        Sorter(tmp_path / "out", ["a"], move=True).place(image, "a")
    assert image.exists() and contents(tmp_path / "out") == {}


def test_a_failed_copy_leaves_nothing(tmp_path: Path) -> None:
    sorter = Sorter(tmp_path / "out", ["a"], move=True)
    with pytest.raises(FileNotFoundError):
        sorter.place(tmp_path / "gone.jpg", "a")
    assert contents(tmp_path / "out") == {}


@settings(deadline=None)
@given(st.lists(st.text(max_size=150), unique=True, max_size=6))
def test_every_class_has_a_folder_of_its_own(classes: list[str]) -> None:
    names = folder_names(classes)
    assert len({name.casefold() for name in names.values()}) == len(classes) + 1
    for name in names.values():
        assert name and name not in (".", "..") and not set(name) & set('/\\:*?"<>|\0\n')
        assert not name.startswith(".") and not name.endswith((" ", ".")) and len(name.encode()) < 200


def test_names_that_are_safe_stay_as_they_are() -> None:
    names = folder_names(["red fish 🐟", "лес", "AC/DC", "ac_dc", "..", "con", REJECTED])
    assert list(names.values()) == [
        REJECTED, "red fish 🐟", "лес", "AC_DC", "ac_dc (2)", "_", "_con", f"{REJECTED} (2)",
    ]  # fmt: skip
