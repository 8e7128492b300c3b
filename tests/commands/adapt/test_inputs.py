"""Where query images come from, and the paths that the output shows."""

import io
import os
import sys
from pathlib import Path

import pytest

from metadiff_cli.commands.adapt.inputs import find_queries
from metadiff_cli.errors import DataError


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """q/ with nested images, as the working directory sees it."""
    for name in ("q/b.png", "q/a.jpg", "q/deep 🐟/лес/c.webp", "q/notes.txt", "[x].png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def shown(*given: str, null: bool = False) -> list[str]:
    return [item.path for item in find_queries(given, null=null).items]


def test_paths_are_as_given_joined_with_the_relative_path(here: Path) -> None:
    inside = ["a.jpg", "b.png", "deep 🐟/лес/c.webp"]
    for given in ("q", "q/", "./q", str(here / "q"), "../" + here.name + "/q"):
        assert shown(given) == [os.path.join(given, name) for name in inside]
    assert find_queries(["q"]).skipped == 1


def test_globs_and_names_that_look_like_globs(here: Path) -> None:
    assert shown("q/*.png", "[x].png") == ["q/b.png", "[x].png"]
    assert shown("q/**/*.webp") == ["q/deep 🐟/лес/c.webp"]
    assert shown("q/*.tif") == ["q/*.tif"]  # found missing when it is read


def test_a_glob_goes_round_no_loop(here: Path) -> None:
    (here / "q" / "again").symlink_to(here / "q")
    (here / "other").symlink_to(here / "q" / "deep 🐟")
    assert shown("q/**/*.webp") == ["q/deep 🐟/лес/c.webp"]
    assert shown("q/../q/**/*.png") == ["q/../q/b.png"]
    assert shown("*/лес/*.webp", "q/*/лес/*.webp") == ["other/лес/c.webp", "q/deep 🐟/лес/c.webp"]  # no loop: both stay


def test_what_an_earlier_run_sorted_is_no_query(here: Path) -> None:
    assert [item.path for item in find_queries(["q"], outside=Path("q/deep 🐟")).items] == ["q/a.jpg", "q/b.png"]


def test_an_image_is_taken_once(here: Path) -> None:
    assert shown("q/b.png", "q", "./q/b.png") == ["q/b.png", "q/a.jpg", "q/deep 🐟/лес/c.webp"]


@pytest.mark.parametrize(("text", "null"), [("q/a.jpg\r\n\n q \n[x].png", False), ("q/a.jpg\0 q \0[x].png\0", True)])
def test_stdin(here: Path, monkeypatch: pytest.MonkeyPatch, text: str, null: bool) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    assert shown("-", null=null) == ["q/a.jpg", " q ", "[x].png"]


def test_stdin_takes_names_that_are_no_text(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9.jpg\0new\nline.png"), encoding="utf-8"))
    assert [os.fsencode(path) for path in shown("-", null=True)] == [b"caf\xe9.jpg", b"new\nline.png"]


def test_labels_are_the_first_folders_or_the_column(here: Path) -> None:
    (here / "list.csv").write_text("path,label\nq/a.jpg,cat\n[x].png,\n")
    assert [item.label for item in find_queries(["q"]).items] == [None, None, "deep 🐟"]
    assert [(i.path, i.label) for i in find_queries(["./list.csv"]).items] == [
        ("./q/a.jpg", "cat"),
        ("./[x].png", None),
    ]


def test_nothing_found(here: Path) -> None:
    (here / "empty").mkdir()
    with pytest.raises(DataError, match="no query images"):
        find_queries(["empty"])


def test_a_pipe_is_no_image(here: Path) -> None:
    os.mkfifo(here / "pipe.png")
    assert find_queries(["pipe.png", "q"]).skipped == 2
