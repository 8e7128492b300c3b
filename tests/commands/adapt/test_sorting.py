"""`adapt --sort-into`: what is moved, what stays, and how a run ends that could not sort."""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from metadiff_cli.data import sort
from tests.processes import cli_as_plain_user
from tests.worlds import Result, paint

CLI = Callable[..., Result]


@pytest.fixture
def place(photos: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The photos as the working folder."""
    monkeypatch.chdir(photos)
    return photos


def sort_json(cli: CLI, checkpoint: Path, *arguments: str | Path) -> tuple[dict[str, Any], str]:
    result = cli("adapt", "-S", "support", "-c", checkpoint, "--json", *arguments)
    assert result.code == 0, result.err
    return json.loads(result.out), result.err


def test_a_support_image_is_never_moved(cli: CLI, place: Path, checkpoint: Path) -> None:
    """Not by its own path, nor by a link to it, a second name of it, or when it cannot be read."""
    images = sorted((place / "support").rglob("*.png"))
    (place / "query" / "link.png").symlink_to("../support/red/0.png")
    os.link(images[0], place / "query" / "second.png")
    (place / "support" / "blue" / "broken.png").write_bytes(b"no image")
    document, err = sort_json(cli, checkpoint, "-Q", ".", "--sort-into", "sorted", "--move")
    assert all(path.is_file() for path in images) and (place / "support" / "blue" / "broken.png").is_file()
    assert (place / "query" / "link.png").is_symlink() and (place / "query" / "second.png").is_file()
    assert "left in place, because they are support images: 12 images" in err
    moved = [p for p in document["predictions"] if "sorted_to" in p]
    assert sorted(Path(p["path"]).name for p in moved) == ["blue.png", "green.png", "grey.png", "red.png"]
    assert not any(Path(p["path"]).exists() for p in moved)


@pytest.mark.parametrize(
    ("here", "query", "root"), [(".", "query", "."), (".", "query", "query"), ("query", ".", "sorted")]
)
def test_a_query_may_be_beside_above_or_in_the_sorted_images(
    cli: CLI, place: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, here: str, query: str, root: str
) -> None:
    monkeypatch.chdir(place / here)
    given = ["adapt", "-S", place / "support", "-c", checkpoint, "--json", "-Q", query, "--sort-into", root]
    first, again = cli(*given), cli(*given)
    assert [result.code for result in (first, again)] == [0, 0], again.err
    assert len([p for p in json.loads(first.out)["predictions"] if "sorted_to" in p]) == 4
    assert len(json.loads(again.out)["predictions"]) == 4  # what was sorted is no query
    assert "0 images copied" in again.err and "a copy was there already: 4 images" in again.err


def fail(number: int, times: int = 100) -> Callable[..., None]:
    """A copy that fails the first so many times."""
    left = [times]

    def copy(source: Path, path: Path, *, new: bool) -> None:
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(number, os.strerror(number))
        shutil.copyfile(source, path)

    return copy


@pytest.mark.parametrize(
    ("number", "times", "code", "words"),
    [
        (errno.EIO, 1, 0, "cannot be sorted into sorted"),
        (errno.EIO, 100, 1, "no image could be sorted into sorted"),
        (errno.ENOSPC, 1, 1, "1 image could not be sorted: the disk of sorted is full"),
    ],
)
def test_what_cannot_be_sorted(
    cli: CLI, place: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, number: int, times: int, code: int,
    words: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(sort, "copy_file", fail(number, times))
    result = cli("adapt", "-S", "support", "-Q", "query", "-c", checkpoint, "--sort-into", "sorted", "--json")
    assert result.code == code and words in result.err, result.err
    assert len(json.loads(result.out)["predictions"]) == 4  # which are not lost


def test_a_report_that_cannot_be_written_is_a_failure(
    cli: CLI, place: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, **more: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr("metadiff_cli.commands.pages.page.atomic", full)
    result = cli("adapt", "-S", "support", "-Q", "query", "-c", checkpoint, "--report", "r.html", "--json")
    assert result.code == 1 and "report r.html cannot be written (No space left on device)" in result.err
    assert len(json.loads(result.out)["predictions"]) == 4


def test_photos_with_the_permissions_that_people_have(place: Path, checkpoint: Path) -> None:
    """Read-only files are sorted; what cannot be looked at, in query and support, is an error among the others."""
    for path in (place / "query").iterdir():
        path.chmod(0o444)
    for folder in ("query/locked", "support/blue/locked"):
        paint(place / folder / "1.png", (9, 9, 9), seed=7)
        (place / folder).chmod(0o444)  # its names can be read, its files cannot
    (place / "closed" / "album").mkdir(parents=True)
    (place / "query" / "album").symlink_to("../closed/album")
    (place / "closed").chmod(0)
    (place / "query" / "shut").mkdir(mode=0)
    given = ["adapt", "-S", "support", "-c", checkpoint, "--sort-into", "sorted", "--json", "-Q", "query", "-Q", "-"]
    result = cli_as_plain_user(given, place, stdin="x" * 300 + ".png\n")
    for folder in ("closed", "query/locked", "support/blue/locked", "query/shut"):
        (place / folder).chmod(0o755)
    assert result.code == 0, result.err
    document = json.loads(result.out)
    assert len(document["predictions"]) == 4 and "4 images copied" in result.err
    assert all(os.stat(p["sorted_to"]).st_mode & 0o777 == 0o444 for p in document["predictions"])
    reasons = {error["path"]: error["reason"] for error in document["errors"]}
    assert reasons == {
        "support/blue/locked/1.png": "Permission denied",
        "query/locked/1.png": "Permission denied",
        "query/album": "Permission denied",
        "query/shut": "Permission denied",
        "x" * 300 + ".png": "File name too long",
    }
    assert document["support"]["blue"] == 3


def test_a_class_that_cannot_be_read_ends_the_run(
    cli: CLI, place: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    iterdir = Path.iterdir

    def locked(path: Path) -> Iterator[Path]:
        if path.name == "red":
            raise PermissionError(errno.EACCES, "Permission denied")
        return iterdir(path)

    monkeypatch.setattr(Path, "iterdir", locked)
    result = cli("adapt", "-S", "support", "-Q", "query", "-c", checkpoint)
    assert result.code == 3 and "class 'red'" in result.err and "Permission denied" in result.err
