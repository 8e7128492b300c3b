"""`adapt --classifier F` with --forget, --relabel and --rename: as if the images had been given that way at once."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.worlds import COLOURS, Result, paint

CLI = Callable[..., Result]
SUPPORT = {"blue": 3, "green": 2, "grey": 4, "red": 1}  # images per class in `photos`


@pytest.fixture
def file(cli: CLI, photos: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A saved classifier of the colours, in the folder of the photos, which becomes the working folder."""
    monkeypatch.chdir(photos)
    return saved(cli, photos / "c.safetensors", "-S", photos / "support", "-c", checkpoint)


def saved(cli: CLI, file: Path, *arguments: str | Path) -> Path:
    """The classifier that `adapt` writes without a query."""
    result = cli("adapt", *arguments, "--save", file)
    assert result.code == 0 and result.out == "", result.err
    return file


def predictions(cli: CLI, *arguments: str | Path) -> list[dict[str, Any]]:
    result = cli("adapt", "-Q", "query", "--json", *arguments)
    assert result.code == 0, result.err
    found: list[dict[str, Any]] = json.loads(result.out)["predictions"]
    return found


@pytest.mark.parametrize("given", ["renamed.png", "blue/1.png"])
def test_forgetting_equals_a_classifier_made_without_it(
    cli: CLI, photos: Path, file: Path, checkpoint: Path, given: str
) -> None:
    """The image is known by its pixels, whatever its name, or by the name that the classifier keeps."""
    (photos / "support" / "blue" / "1.png").rename(photos / "renamed.png")
    without = saved(cli, photos / "without.safetensors", "-S", photos / "support", "-c", checkpoint)
    edited = saved(cli, photos / "edited.safetensors", "--classifier", file, "--forget", given)
    assert edited.read_bytes() == without.read_bytes() != file.read_bytes()


def test_relabelling_equals_a_classifier_made_with_that_label(
    cli: CLI, photos: Path, file: Path, checkpoint: Path
) -> None:
    """Also where that makes a class and empties another one; a CSV in a folder of its own, by file and by name."""
    (photos / "lists").mkdir()
    (photos / "lists" / "fix.csv").write_text("path,label\n../support/red/0.png,crimson\ngrey/3.png,blue\n")
    edited = cli("adapt", "--classifier", file, "--relabel", "lists/fix.csv", "--save", "edited.safetensors")
    assert edited.code == 0, edited.err
    assert "relabelled: red/0.png to crimson, grey/3.png to blue" in edited.err
    assert "class 'red' has no image left, and is gone" in edited.err
    (photos / "support" / "red").rename(photos / "support" / "crimson")
    (photos / "support" / "grey" / "3.png").rename(photos / "support" / "blue" / "3.png")
    other = saved(cli, photos / "other.safetensors", "-S", photos / "support", "-c", checkpoint)
    assert (photos / "edited.safetensors").read_bytes() == other.read_bytes()


def test_renaming_changes_no_probability(cli: CLI, file: Path) -> None:
    before = predictions(cli, "--classifier", file, "--top-k", "4")
    swapped = {"red": "green", "green": "red", "blue": "ein Blau", "grey": "grey"}
    texts = [f"{old}={new}" for old, new in swapped.items() if old != new]
    after = predictions(
        cli, "--classifier", file, "--top-k", "4", *(word for text in texts for word in ("--rename", text))
    )
    for p, q in zip(before, after, strict=True):
        assert {swapped[t["label"]]: pytest.approx(t["confidence"], abs=2e-6) for t in p["top"]} == {
            t["label"]: t["confidence"] for t in q["top"]
        }


def test_all_together_and_in_order(cli: CLI, photos: Path, file: Path) -> None:
    """Forget, relabel, rename, then add: the new names are those that --support adds to. The file is replaced."""
    paint(photos / "more" / "navy" / "1.png", COLOURS["blue"], seed=77)
    (photos / "fix.csv").write_text("path,label\ngrey/0.png,blue\n")
    result = cli(
        "adapt", "--classifier", file, "--forget", "green", "--forget", "blue/0.png", "--relabel", "fix.csv",
        "--rename", "blue=navy", "-S", "more", "-Q", "query", "--save", file, "--overwrite", "--json",
    )  # fmt: skip
    assert result.code == 0, result.err
    assert json.loads(result.out)["support"] == {"grey": 3, "navy": 4, "red": 1}
    names = json.loads(cli("inspect", file, "--json").out)["support"]
    assert sorted(names) == sorted([*(f"grey/{i}.png" for i in (1, 2, 3)), "navy/0.png", "navy/1.png", "navy/1.png",
                                    "navy/2.png", "red/0.png"])  # fmt: skip


def test_what_cannot_be_corrected_says_why(cli: CLI, photos: Path, file: Path) -> None:
    (photos / "new.csv").write_text("path,label\nquery/red.png,red\n")
    (photos / "both.csv").write_text("path,label\nred/0.png,red\nsupport/red/0.png,blue\n")
    (photos / "none.csv").write_text("path,label\nred/0.png,\n")
    kept = file.read_bytes()
    for arguments, code, words in [
        (["--forget", "0.png"], 3, ["10 images: blue/0.png", "did you mean", "inspect"]),
        (["--forget", "query/red.png"], 3, ["not in the support", "by its pixels"]),
        (["--forget", "red", "--forget", "green", "--forget", "blue", "--forget", "grey"], 3, ["no image"]),
        (["--forget", "red", "--forget", "green", "--forget", "blue"], 3, ["one class only, 'grey'"]),
        (["--forget", "red/0.png", "--relabel", "both.csv"], 3, ["line 2", "--support"]),
        (["--relabel", "new.csv"], 3, ["line 2", "query/red.png is not in the support", "--support"]),
        (["--relabel", "both.csv"], 3, ["two labels, 'red' and 'blue'"]),
        (["--relabel", "none.csv"], 3, ["no label"]),
        (["--relabel", "gone.csv"], 3, ["gone.csv cannot be read"]),
        (["--rename", "rde=pink"], 3, ["no class 'rde'", "did you mean 'red'?"]),
        (["--rename", "red=blue"], 3, ["2 classes would be called 'blue'", "--relabel"]),
        (["--rename", "red"], 2, ["OLD=NEW"]),
        (["--rename", "red= "], 2, ["OLD=NEW"]),
        (["--rename", "red=a", "--rename", "red=b"], 2, ["two names"]),
    ]:
        result = cli("adapt", "--classifier", file, *arguments, "--save", file, "--overwrite")
        assert result.code == code and all(word in result.err for word in words), (arguments, result.err)
    assert file.read_bytes() == kept


@pytest.mark.parametrize("arguments", [["--forget", "red/0.png"], ["--relabel", "a.csv"], ["--rename", "red=pink"]])
def test_corrections_are_of_a_saved_classifier(cli: CLI, photos: Path, arguments: list[str]) -> None:
    result = cli("adapt", "-S", photos / "support", "-Q", photos / "query", *arguments)
    assert result.code == 2 and f"{arguments[0]} corrects a saved classifier" in result.err
    assert "--classifier FILE" in result.err and "move the images" in result.err


def test_without_a_query_a_classifier_is_saved_and_nothing_else(cli: CLI, photos: Path) -> None:
    support = photos / "support"
    for arguments, words in [
        ([], "give --query"),
        ([photos / "query" / "red.png", "--save", "new.safetensors"], "need --query before them"),
        (["--save", "new.safetensors", "--json"], "--json has no effect"),
        (["--save", "new.safetensors", "--top-k", "2"], "--top-k has no effect"),
        (["--save", "new.safetensors", "--report", "new.html"], "--report has no effect"),
        (["--save", "new.safetensors", "--transductive"], "--transductive has no effect"),
    ]:
        result = cli("adapt", "-S", support, *arguments)
        assert result.code == 2 and words in result.err, (arguments, result.err)


def test_a_picture_of_the_pool_that_is_forgotten_guides_again(
    cli: CLI, photos: Path, file: Path, checkpoint: Path
) -> None:
    shutil.copy(photos / "support" / "blue" / "1.png", photos / "query")
    pooled = saved(cli, photos / "p.safetensors", "-S", "support", "-c", checkpoint, "--unlabeled", "query")
    edited = saved(cli, photos / "e.safetensors", "--classifier", pooled, "--forget", "blue/1.png")
    (photos / "support" / "blue" / "1.png").unlink()
    without = saved(cli, photos / "w.safetensors", "-S", "support", "-c", checkpoint, "--unlabeled", "query")
    assert edited.read_bytes() == without.read_bytes()
