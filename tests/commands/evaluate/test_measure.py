"""Methods by name, and the result document."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from metadiff_cli.commands.completions import CONTROLS
from metadiff_cli.commands.evaluate.measure import parse_controls, rounded
from metadiff_cli.errors import ConfigError
from tests.worlds import Result

CLI = Callable[..., Result]


def test_every_control_is_measured(cli: CLI, checkpoint: Path) -> None:
    result = cli("evaluate", "-c", checkpoint, "--query", "3", "--episodes", "4", "--controls", ",".join(CONTROLS),
                 "--transductive", "--json")  # fmt: skip
    assert result.code == 0, result.err
    document = json.loads(result.out)
    assert set(document["methods"]) == {"metadiff", *CONTROLS} and document["protocol"] == "transductive"
    assert all("paired_to_inductive" in m for name, m in document["methods"].items() if name != "inductive")


def test_halves_have_all_episodes_together(cli: CLI, checkpoint: Path) -> None:
    result = cli("evaluate", "-c", checkpoint, "--way", "2", "--query", "3", "--episodes", "5", "--controls", "",
                 "--halves", "--open-set", "--json")  # fmt: skip
    assert result.code == 0, result.err
    document = json.loads(result.out)
    assert document["halves"] and document["open_set"]["episodes"] == 5 and list(document["methods"]) == ["metadiff"]


def test_names_of_controls() -> None:
    assert parse_controls(" prototype,, a.safetensors ") == ["prototype", "a.safetensors"]
    with pytest.raises(ConfigError, match="unknown control 'magic'"):
        parse_controls("magic")


def test_numbers_are_rounded_at_every_depth() -> None:
    assert rounded({"a": [1.23456789, 2], "b": {"c": "x", "d": None}}) == {"a": [1.2346, 2], "b": {"c": "x", "d": None}}
