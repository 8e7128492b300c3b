"""Tables on a terminal of 80 columns: names stay whole, numbers stay on one line."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from metadiff_cli.commands.evaluate.table import show_result
from metadiff_cli.config.load import preset_names
from metadiff_cli.console import Screen
from metadiff_cli.data.benchmarks import KNOWN
from metadiff_cli.data.folders import SPLITS
from tests.worlds import Result, paint

CLI = Callable[..., Result]


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metadiff_cli.console.WIDE", 80)


def cells(shown: str) -> list[list[str]]:
    """The cells of each line of a table, without blanks."""
    assert all(len(line) <= 80 for line in shown.splitlines() if line.startswith("│"))
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines() if line.startswith("│")]


@pytest.mark.parametrize(("command", "names"), [("presets", preset_names()), ("data", list(KNOWN))])
def test_names_stay_whole(cli: CLI, command: str, names: list[str]) -> None:
    assert set(names) <= {row[0] for row in cells(cli(command, "list").out)}


def test_numbers_of_methods_with_long_names_stay_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    paired = {"difference": -12.34, "ci95": 10.25}
    method = {
        "accuracy": 100.0,
        "ci95": 10.25,
        "ece": 12.3,
        "paired_to_prototype": paired,
        "paired_to_analytic": paired,
    }
    names = (
        "metadiff",
        "label-propagation",
        "metadiff-a-denoiser-of-a-very-long-name-12",
        "maml of my best run so far",
    )
    document = {
        "way": 20, "shot": 5, "query": 15, "split": "train", "episodes": 10000, "protocol": "transductive",
        "denoiser": "analytic", "methods": dict.fromkeys(names, method),
    }  # fmt: skip
    show_result(document, Screen())
    rows = [row for row in cells(capsys.readouterr().out) if row[1]]
    assert [row[1:] for row in rows] == [["100.00 ± 10.25", "-12.34 ± 10.25", "-12.34 ± 10.25", "12.3"]] * len(names)


def test_an_open_set_title_is_one_line(cli: CLI, checkpoint: Path) -> None:
    shown = cli("evaluate", "-c", checkpoint, "--query", "2", "--episodes", "2", "--controls", "", "--open-set").out
    assert re.search(r"^3 unknown classes beside 5 known ones, .* 2 episodes$", shown, re.M)


def test_every_key_of_the_configuration_is_one_line(cli: CLI) -> None:
    lines = cli("config", "show", "--origin", "--set", "seed=3").out.splitlines()
    assert any(re.fullmatch(r"seed = 3 +--set", line) for line in lines)
    assert any(re.fullmatch(r"baselines\.frozen\.validation_episodes = 600 +default", line) for line in lines)


def test_the_splits_of_a_data_set_are_readable(cli: CLI, tmp_path: Path) -> None:
    for split in SPLITS:
        for c in range(2):
            paint(tmp_path / split / f"{split}-{'x' * 90}{c}" / "1.png", (9, 9, 9 * c), seed=c)
    shown = cli("data", "verify", tmp_path).out
    assert [row[:3] for row in cells(shown)] == [[split, "2", "2"] for split in SPLITS]
