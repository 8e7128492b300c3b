"""`adapt --reject auto`, `evaluate --open-set`, and the same in Python."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from metadiff_cli import FewShotClassifier
from metadiff_cli.core.checkpoints.file import load_checkpoint, read_header, save_checkpoint
from tests.worlds import Page, Result, validate

CLI = Callable[..., Result]


@pytest.fixture(scope="module")
def old(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of before there was a threshold."""
    path = tmp_path_factory.mktemp("old") / "old.safetensors"
    stored = load_checkpoint(checkpoint)
    tuning = {key: value for key, value in stored.header["tuning"].items() if key != "rejection"}
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
    adapt = ("adapt", "-S", photos / "support", "-Q", photos / "query", "--reject", "auto", "--json")
    for failed in (cli(*adapt, "-c", old), cli("evaluate", "-c", old, "--open-set", "--episodes", "3")):
        assert failed.code == 4 and "--reject-below" in failed.err


def test_only_auto_is_a_word(cli: CLI, photos: Path, checkpoint: Path) -> None:
    result = cli("adapt", "-S", photos / "support", "-Q", photos / "query", "-c", checkpoint, "--reject", "0.5")
    assert result.code == 2 and "--reject-below" in result.err


@pytest.mark.parametrize("more", [[], ["--halves", "--way", "2"], ["--transductive"]])
def test_open_set_is_measured(cli: CLI, checkpoint: Path, tmp_path: Path, more: list[str]) -> None:
    page = tmp_path / "e.html"
    document = validate(
        cli("evaluate", "-c", checkpoint, "--open-set", "--episodes", "9", "--query", "3", "--json", "--report", page,
            *more), "metadiff.evaluate/1",
    )  # fmt: skip
    found = document["open_set"]
    assert found["episodes"] == 9 and found["unknown_classes"] == (2 if more[:1] == ["--halves"] else 3)
    difference = found["auroc"]["mean"] - found["auroc_confidence"]["mean"]
    assert found["paired_to_confidence"]["difference"] == pytest.approx(difference, abs=1e-3)
    text = Page(page).text
    assert "Images of no class" in text and f"{found['auroc']['mean']:.2f} ± {found['auroc']['ci95']:.2f}" in text


def test_open_set_as_a_table_and_what_it_does_not_go_with(cli: CLI, checkpoint: Path) -> None:
    common = ("evaluate", "-c", checkpoint, "--open-set", "--episodes", "3", "--query", "3")
    shown = cli(*common)
    assert shown.code == 0 and "rejected of unknown queries" in shown.out
    assert cli(*common, "--imbalance", "1").code == 2
    assert cli(*common, "--way", "8").code == 3


def test_the_page_of_a_training_has_its_curves(cli: CLI, tmp_path: Path) -> None:
    from tests.worlds import SMALL

    page = tmp_path / "m.html"
    result = cli("metatrain", "--preset", "glyphs-5w1s", "--out", tmp_path / "run", "--seed", "5", "--report", page,
                 "--json", *SMALL)  # fmt: skip
    assert result.code == 0, result.err
    assert "pictures" not in json.loads(result.out) and "pictures" not in read_header(
        tmp_path / "run" / "checkpoint.safetensors"
    )
    text = Page(page).text
    for words in (
        "Training loss",
        "Gain over the analytic",
        "Pretraining: training loss",
        "From noise to weights",
    ):
        assert words in text
