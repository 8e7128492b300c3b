"""`metadiff demo`: from an empty folder to a table and a report, with what comes with the package."""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from metadiff_cli import files
from metadiff_cli.files import DEMO
from tests.worlds import Page, Result, small_model

CLI = Callable[..., Result]
KINDS = ["cup", "fish", "key", "leaf"]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_pictures_are_few_and_small_and_say_whose_they_are() -> None:
    pictures = sorted(DEMO.rglob("*.jpg"))
    assert [len(list((DEMO / "imgs" / kind).iterdir())) for kind in KINDS] == [3] * 4
    assert sorted(path.name for path in (DEMO / "query").iterdir()) == [f"{k}-{i}.jpg" for k in KINDS for i in (1, 2)]
    assert len(pictures) == 20 and sum(path.stat().st_size for path in pictures) < 200_000
    assert (
        "drawn for this project" in (DEMO / "LICENCE.txt").read_text() and "MIT" in (DEMO / "LICENCE.txt").read_text()
    )


def test_a_table_a_report_and_the_command_to_repeat(cli: CLI, place: Path) -> None:
    """All of the eight images get the right label, and so they do from the command that is shown."""
    first = cli("demo")
    assert first.code == 0, first.err
    assert (
        "copied 20 pictures to metadiff-demo: imgs" in first.err
        and "report written: metadiff-demo/report.html" in first.err
    )
    assert Page(place / "metadiff-demo" / "report.html").text.count("fish") > 3
    (line,) = [line.removeprefix("$ ") for line in first.err.splitlines() if line.startswith("$ ")]
    program, *arguments = shlex.split(line)
    again = cli(*arguments, "--json")
    assert program == "metadiff" and again.code == 0, again.err
    right = [(f"{kind}-{i}.jpg", kind) for kind in KINDS for i in (1, 2)]
    assert [(Path(p["path"]).name, p["label"]) for p in json.loads(again.out)["predictions"]] == right
    assert re.findall(r"(\w+-\d\.jpg)\W+(\w+)", first.out) == right


def test_again_in_the_same_folder(cli: CLI, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures that are missing come back, those of a person stay and count; a browser opens when it is asked for."""
    monkeypatch.setattr(files, "PACKAGED", small_model(place / "untrained.safetensors"))  # a fast one
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda page: opened.append(page))
    assert cli("demo", "--out", "my first", "--quiet").err == ""
    folder = place / "my first"
    before = written(folder)
    (folder / "query" / "fish-1.jpg").rename(folder / "imgs" / "fish" / "mine.jpg")
    second = cli("demo", "--out", "my first", "--open")
    assert second.code == 0 and "copied 1 picture to my first" in second.err, second.err
    assert written(folder).keys() == {*before, Path("imgs/fish/mine.jpg")}
    assert "fish-1.jpg is also in the support" in second.err and "--support 'my first/imgs'" in second.err
    assert opened == [(folder / "report.html").as_uri()] and "no browser was found" in second.err


@pytest.mark.parametrize("taken", ["imgs/cup/2.jpg", "report.html"])
def test_nothing_of_a_person_is_replaced(cli: CLI, place: Path, taken: str) -> None:
    file = place / "metadiff-demo" / taken
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    result = cli("demo")
    assert result.code == 2 and taken in result.err and written(place) == {file.relative_to(place): b"mine"}


def test_a_file_in_the_place_of_the_folder_is_refused(cli: CLI, place: Path) -> None:
    (place / "metadiff-demo").write_text("mine")
    result = cli("demo")
    assert result.code == 2 and "not a folder" in result.err and written(place) == {Path("metadiff-demo"): b"mine"}
