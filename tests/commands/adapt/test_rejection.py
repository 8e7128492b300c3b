"""`adapt --reject auto`, and the same in Python."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from metadiff_cli import FewShotClassifier
from metadiff_cli.core.checkpoints.file import load_checkpoint, save_checkpoint
from tests.worlds import Page, Result, validate

CLI = Callable[..., Result]


@pytest.fixture(scope="module")
def old(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that has no threshold, because there were no validation classes."""
    path = tmp_path_factory.mktemp("old") / "old.safetensors"
    stored = load_checkpoint(checkpoint)
    tuning = {**stored.header["tuning"], "rejection": None}
    save_checkpoint(path, "model", stored.tensors, {**stored.header, "tuning": tuning})
    return path


def rejecting(cli: CLI, photos: Path, *more: str | Path) -> dict[str, Any]:
    return validate(cli("adapt", "-Q", photos / "query", "--reject", "auto", "--json", *more), "metadiff.adapt/1")


def test_margins_decide_and_a_saved_classifier_decides_the_same(cli: CLI, photos: Path, checkpoint: Path) -> None:
    file = photos / "mine.safetensors"
    document = rejecting(cli, photos, "-S", photos / "support", "-c", checkpoint, "--save", file)
    assert document["rejection"]["false_rejection_rate"] == 0.05
    for prediction in document["predictions"]:
        assert prediction["rejected"] == (prediction["margin"] < 0) == (prediction["label"] is None)
    again = rejecting(cli, photos, "--classifier", file)
    assert again["predictions"] == document["predictions"] and again["rejection"] == document["rejection"]
    plain = cli("adapt", "-S", photos / "support", "-Q", photos / "query", "-c", checkpoint, "--json")
    assert json.loads(plain.out)["rejection"] is None and "margin" not in json.loads(plain.out)["predictions"][0]


def test_both_ways_of_rejecting_go_together(cli: CLI, photos: Path, checkpoint: Path) -> None:
    more = ("-S", photos / "support", "-c", checkpoint, "--reject-below", "1")
    assert all(p["rejected"] for p in rejecting(cli, photos, *more)["predictions"])
    page = photos / "r.html"
    result = cli("adapt", "-Q", photos / "query", "--reject", "auto", *more, "--report", page, "--format", "csv")
    assert result.out.count(",true,") == 4 and "rejected: 4 query images" in result.err
    text = Page(page).text
    assert "rejected as none of the classes" in text and "rejected below confidence" in text


def test_python_decides_the_same(cli: CLI, photos: Path, checkpoint: Path) -> None:
    paths = sorted((photos / "support").glob("*/*.png"))
    classifier = FewShotClassifier(checkpoint).fit(paths, [path.parent.name for path in paths])
    predictions = rejecting(cli, photos, "-S", photos / "support", "-c", checkpoint)["predictions"]
    queries = [p["path"] for p in predictions]
    np.testing.assert_allclose(classifier.known_margin(queries), [p["margin"] for p in predictions], atol=1e-3)
    assert classifier.is_known(queries).tolist() == [not p["rejected"] for p in predictions]
    assert classifier.is_known([]).tolist() == []


def test_a_checkpoint_without_a_threshold_names_the_next_step(cli: CLI, photos: Path, old: Path) -> None:
    result = cli("adapt", "-S", photos / "support", "-Q", photos / "query", "-c", old, "--reject", "auto", "--json")
    assert result.code == 4 and "no threshold" in result.err and "--reject-below" in result.err
    assert "support:" not in result.err  # it is said before the images are read


def test_only_auto_is_a_word(cli: CLI, photos: Path, checkpoint: Path) -> None:
    result = cli("adapt", "-S", photos / "support", "-Q", photos / "query", "-c", checkpoint, "--reject", "0.5")
    assert result.code == 2 and "--reject-below" in result.err
