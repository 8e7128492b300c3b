"""Paths on the command line."""

from pathlib import Path

import pytest
import typer

from metadiff_cli.commands.paths import path_option


def test_a_path_is_taken_as_it_is() -> None:
    for text in (".", "a b", "~backup", "a/~/b", "-"):
        assert path_option(text) == Path(text)


def test_the_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert path_option("~/x/y") == tmp_path / "x" / "y" and path_option("~") == tmp_path


def test_no_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", fail)
    with pytest.raises(typer.BadParameter, match="needs a home folder"):
        path_option("~/x")


def test_an_empty_path_is_refused() -> None:
    with pytest.raises(typer.BadParameter, match="the path is empty"):
        path_option("")
