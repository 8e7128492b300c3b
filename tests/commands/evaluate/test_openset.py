"""`evaluate --open-set`: how well images of no class are rejected."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.worlds import Page, Result, validate

CLI = Callable[..., Result]


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
