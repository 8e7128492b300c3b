"""`adapt --suggest`: which query images are named, where, and which never."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from metadiff_cli.commands.adapt import suggestions
from metadiff_cli.commands.adapt.output import Outcome
from metadiff_cli.commands.adapt.suggestions import Suggestions
from tests.worlds import Result, paint, validate

CLI = Callable[..., Result]
BOTH = ["-S", "support", "-Q", "query"]


@pytest.fixture
def place(photos: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The photos as the working folder, with a broken query image and a copy of a support image."""
    monkeypatch.chdir(photos)
    (photos / "query" / "broken.png").write_bytes(b"x")
    shutil.copy("support/red/0.png", "query/twin.png")
    for i in range(3):
        paint(photos / "query" / f"odd-{i}.png", (200, 120, 120), seed=50 + i)
    return photos


def test_json_names_readable_images_that_have_no_label(cli: CLI, place: Path, checkpoint: Path) -> None:
    document = validate(cli("adapt", *BOTH, "-c", checkpoint, "--json", "--suggest", "20"), "metadiff.adapt/1")
    paths = [row["path"] for row in document["suggested"]]
    known = {row["path"]: row["top"] for row in document["predictions"]}
    assert 1 <= len(paths) == len(set(paths)) and set(paths) <= set(known) - {"query/twin.png"}
    assert all(row["top"] == known[row["path"]][:2] for row in document["suggested"])
    fewer = validate(cli("adapt", *BOTH, "-c", checkpoint, "--json", "--suggest", "2"), "metadiff.adapt/1")
    assert fewer["suggested"] == document["suggested"][:2]
    assert "suggested" not in validate(cli("adapt", *BOTH, "-c", checkpoint, "--json"), "metadiff.adapt/1")


def test_rows_for_a_program_stay_alone_on_stdout(cli: CLI, place: Path, checkpoint: Path) -> None:
    for format in ("csv", "jsonl"):
        plain = cli("adapt", *BOTH, "-c", checkpoint, "--format", format)
        result = cli("adapt", *BOTH, "-c", checkpoint, "--format", format, "--suggest", "2", "--quiet")
        assert result.out == plain.out and result.err.count("worth labelling next: query/") == 2
    table = cli("adapt", *BOTH, "-c", checkpoint, "--suggest", "2")
    assert "worth labelling next: 2 images" in table.out and "worth labelling" not in table.err


def test_a_saved_classifier_suggests_the_same(cli: CLI, place: Path, checkpoint: Path) -> None:
    first = validate(
        cli("adapt", *BOTH, "-c", checkpoint, "--json", "--suggest", "3", "--save", "a"), "metadiff.adapt/1"
    )
    saved = ["--classifier", "a", "-Q", "query", "--suggest", "3", "--json"]
    assert validate(cli("adapt", *saved), "metadiff.adapt/1")["suggested"] == first["suggested"]


def test_a_moved_image_is_named_where_it_is_now(cli: CLI, place: Path, checkpoint: Path) -> None:
    moving = ["--sort-into", "sorted", "--move", "--suggest", "3"]
    document = validate(cli("adapt", *BOTH, "-c", checkpoint, "--json", *moving), "metadiff.adapt/1")
    assert all(row["path"].startswith("sorted") and Path(row["path"]).is_file() for row in document["suggested"])


def test_images_that_all_have_a_label(cli: CLI, place: Path, checkpoint: Path) -> None:
    result = cli("adapt", "-S", "support", "-Q", "query/twin.png", "-c", checkpoint, "--suggest", "3")
    assert result.code == 0 and "no query image is worth labelling" in result.err


def test_of_many_images_the_most_uncertain_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suggestions, "MOST", 5)
    seen = Suggestions(None, 3)  # type: ignore[arg-type]
    for i in range(40):
        p = 0.5 + i / 100
        seen.add(Outcome(str(i), (("a", p),)), torch.zeros(4), [p, 1 - p])
        assert len(seen.seen) <= 10
    assert {str(i) for i in range(5)} <= {outcome.path for _, outcome, _ in seen.seen}
