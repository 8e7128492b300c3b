"""Where query images come from, and the paths that the output shows."""

import io
import os
import sys
from pathlib import Path

import pytest
from PIL import Image

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
    assert find_queries(["q"]).skipped == {".txt": 1}


def test_globs_and_names_that_look_like_globs(here: Path) -> None:
    assert shown("q/*.png", "[x].png") == ["q/b.png", "[x].png"]
    assert shown("q/**/*.webp") == ["q/deep 🐟/лес/c.webp"]
    assert shown("q/*.tif", "q") == ["q/*.tif", *shown("q")]  # an error among the others


def test_a_folder_with_brackets_is_no_pattern(here: Path) -> None:
    """Neither on its own nor where a pattern follows."""
    (here / "photos [2019]" / "[1]").mkdir(parents=True)
    (here / "photos [2019]" / "[1]" / "a.jpg").touch()
    for given in ("photos [2019]", "photos [2019]/*/*.jpg", "photos [2019]/[1]/*.jpg", "photos [2019]/**/*.jpg"):
        assert shown(given) == ["photos [2019]/[1]/a.jpg"]


def test_a_glob_goes_round_no_loop(here: Path) -> None:
    (here / "q" / "again").symlink_to(here / "q")
    (here / "other").symlink_to(here / "q" / "deep 🐟")
    assert shown("q/**/*.webp") == ["q/deep 🐟/лес/c.webp"]
    assert shown("q/../q/**/*.png") == ["q/../q/b.png"]
    assert shown("*/лес/*.webp", "q/*/лес/*.webp") == ["other/лес/c.webp", "q/deep 🐟/лес/c.webp"]  # no loop: both stay


def test_a_recursive_glob_ends_where_links_lead_back_up(here: Path) -> None:
    """Two of them in one folder double the ways at each level, and `glob` takes all time and memory."""
    for name in ("one", "two"):
        (here / "q" / "deep 🐟" / name).symlink_to(here)
    assert shown("q/**/*.jpg") == ["q/a.jpg"] and shown("q/**") == shown("q") and shown("**/*.jpg") == ["q/a.jpg"]
    assert shown("./q/*/**/*.webp") == ["./q/deep 🐟/лес/c.webp"] and shown("q/**/лес") == ["q/deep 🐟/лес/c.webp"]


@pytest.mark.parametrize(
    ("given", "root", "left"),
    [
        ("q", "q/deep 🐟", ["q/a.jpg", "q/b.png"]),  # everything below, whatever the folders are called
        (".", "q", ["./[x].png"]),
        ("q", ".", ["q/a.jpg", "q/b.png", "q/deep 🐟/лес/c.webp"]),
        ("q", "q", ["q/a.jpg", "q/b.png"]),  # there is a class "deep 🐟"
        ("q/**/*", "q", ["q/a.jpg", "q/b.png"]),
        (os.path.join("..", "{here}", "q"), "q", ["a.jpg", "b.png"]),
    ],
)
def test_what_an_earlier_run_sorted_is_no_query(here: Path, given: str, root: str, left: list[str]) -> None:
    given = given.format(here=here.name)
    found = find_queries([given]).outside(Path(root), ["deep 🐟", "_rejected"], [given])
    assert [item.path.removeprefix(f"../{here.name}/q/") for item in found.items] == left


def test_only_sorted_images_are_said_to_be_that(here: Path) -> None:
    with pytest.raises(DataError, match="all 1 query images are left out"):
        find_queries(["q/deep 🐟"]).outside(Path("q"), ["deep 🐟"], ["q/deep 🐟"])


def test_an_image_is_taken_once(here: Path) -> None:
    assert shown("q/b.png", "q", "./q/b.png") == ["q/b.png", "q/a.jpg", "q/deep 🐟/лес/c.webp"]


def feed(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))


LISTED = "q/a.jpg\r\n\n q \n[x].png"
AS_BYTES = {
    "lines": LISTED.encode(),
    "a mark": b"\xef\xbb\xbf" + LISTED.encode(),
    "UTF-16": LISTED.encode("utf-16"),
    "UTF-16, big endian": b"\xfe\xff" + LISTED.encode("utf-16-be"),
    "NUL": b"q/a.jpg\0 q \0[x].png\0",
}


@pytest.mark.parametrize("data", AS_BYTES.values(), ids=AS_BYTES)
def test_stdin(here: Path, monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    feed(monkeypatch, data)
    assert shown("-") == ["q/a.jpg", " q ", "[x].png"]


def test_stdin_as_text(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(LISTED))
    assert shown("-") == ["q/a.jpg", " q ", "[x].png"]


def test_stdin_takes_names_that_are_no_text(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    feed(monkeypatch, b"caf\xe9.jpg\0new\nline.png")
    assert [os.fsencode(path) for path in shown("-", null=True)] == [b"caf\xe9.jpg", b"new\nline.png"]


def test_stdin_that_cannot_be_meant(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    feed(monkeypatch, b"q/a.jpg\nq/b.png\n")
    with pytest.raises(DataError, match="end with line breaks: leave out -0"):
        shown("-", null=True)
    monkeypatch.setattr(sys, "stdin", None)  # as `<&-` leaves it
    with pytest.raises(DataError, match="standard input is closed"):
        shown("-")


def test_what_cannot_be_looked_at_is_an_error_among_the_others(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = ["x" * 300 + ".jpg", "q/a.jpg/b.jpg", "x" * 300]
    feed(monkeypatch, "\n".join([*odd, "q/a.jpg"]).encode())
    assert shown("-") == [*odd, "q/a.jpg"]
    assert shown(odd[0], "q/a.jpg") == [odd[0], "q/a.jpg"]


def test_labels_are_the_first_folders_or_the_column(here: Path) -> None:
    (here / "list.csv").write_text("path,label\nq/a.jpg,cat\n[x].png,\n")
    assert [item.label for item in find_queries(["q"]).items] == [None, None, "deep 🐟"]
    assert [(i.path, i.label) for i in find_queries(["./list.csv"]).items] == [
        ("./q/a.jpg", "cat"),
        ("./[x].png", None),
    ]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("empty", "--query empty: there are no images"),
        ("qq", r"--query qq does not exist: did you mean q\?"),
        ("q/*.tif", r"--query q/\*\.tif matches no file"),
        ("list.txt", r"list\.txt is not an image: .*--query - < list\.txt"),
    ],
)
def test_nothing_found(here: Path, given: str, words: str) -> None:
    (here / "empty").mkdir()
    (here / "list.txt").write_text("q/a.jpg\n")
    with pytest.raises(DataError, match=words):
        find_queries([given])
    with pytest.raises(DataError, match="--unlabeled empty"):
        find_queries(["empty"], option="--unlabeled")
    with pytest.raises(DataError, match=r"none of the 2 images of --query exists; the first is no\.png"):
        find_queries(["no.png", "nor.png"])


def test_a_file_that_is_named_is_tried_whatever_it_is_called(here: Path) -> None:
    (here / "scan").touch()
    assert shown("scan") == ["scan"]
    found = find_queries(["q/b.png"], more=["scan", "q/notes.txt", "q/a.jpg"])  # as the shell expands *
    assert [item.path for item in found.items] == ["q/b.png", "q/a.jpg"] and found.skipped == {"": 1, ".txt": 1}
    Image.new("RGB", (4, 4)).save(here / "scan", "PNG")
    assert [item.path for item in find_queries(["q/b.png"], more=["scan"]).items] == ["q/b.png", "scan"]


def test_a_pipe_is_no_image(here: Path) -> None:
    os.mkfifo(here / "pipe.png")
    assert find_queries(["pipe.png", "q"]).skipped == {".png": 1, ".txt": 1}
