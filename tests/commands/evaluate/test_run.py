"""`metadiff evaluate` from its options to its tables, gates and report."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.worlds import Page, Result

CLI = Callable[..., Result]
QUICK = ["--query", "3", "--episodes", "4", "--controls", "prototype"]


def test_tables_of_all_methods(cli: CLI, checkpoint: Path) -> None:
    shown = cli("evaluate", "-c", checkpoint, *QUICK, "--way", "3", "--open-set", "--verbose")
    assert shown.code == 0, shown.err
    assert "3-way 1-shot, 3 queries per class, test classes, 4 episodes, inductive" in shown.out
    assert "prototype" in shown.out and "AUROC of the known score" in shown.out
    assert "episodes per second" in shown.err


def test_a_gate_ends_with_5_after_the_results(cli: CLI, checkpoint: Path) -> None:
    assert cli("evaluate", "-c", checkpoint, *QUICK, "--fail-under", "0").code == 0
    failed = cli("evaluate", "-c", checkpoint, *QUICK, "--fail-under", "100", "--json")
    assert failed.code == 5 and "below --fail-under 100" in failed.err and json.loads(failed.out)["episodes"] == 4


def test_the_report_has_what_json_does_not_hold(cli: CLI, checkpoint: Path, tmp_path: Path) -> None:
    result = cli("evaluate", "-c", checkpoint, *QUICK, "--report", tmp_path / "e.html", "--json")
    assert result.code == 0 and f"report written: {tmp_path / 'e.html'}" in result.err
    assert "pictures" not in json.loads(result.out)
    assert "From noise to weights" in Page(tmp_path / "e.html").text


@pytest.mark.parametrize(
    ("options", "word"),
    [(["--open-set", "--imbalance", "1"], "--imbalance"), (["--halves", "--controls", "x.safetensors"], "--halves")],
)
def test_options_that_do_not_go_together(cli: CLI, checkpoint: Path, options: list[str], word: str) -> None:
    result = cli("evaluate", "-c", checkpoint, *options)
    assert result.code == 2 and word in result.err and result.out == ""
