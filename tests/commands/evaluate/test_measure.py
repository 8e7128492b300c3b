"""Methods by name, and the result document."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from metadiff_cli.commands.completions import CONTROLS
from metadiff_cli.commands.evaluate.measure import parse_controls, rounded, with_enough
from metadiff_cli.console import Screen
from metadiff_cli.core.encoders.bank import FeatureBank, every_other
from metadiff_cli.core.evaluation.evaluate import Protocol
from metadiff_cli.errors import ConfigError, DataError
from tests.worlds import IMAGES, Result, bank_of

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


def test_rows_keep_their_places_when_classes_are_left_out() -> None:
    whole = bank_of(5, seed=0)
    chosen = ~(((whole.labels == 1) | (whole.labels == 4)) & (np.arange(len(whole.labels)) % IMAGES > 2))
    uneven = FeatureBank(whole.features[chosen], whole.labels[chosen], whole.classes)
    kept, names = with_enough(uneven, Protocol(way=2, shot=1, query=15), Screen(quiet=True))
    assert names == ["1", "4"] and kept.classes == ("0", "2", "3")
    before = uneven.class_indices()
    assert [rows.tolist() for rows in kept.class_indices()] == [before[c].tolist() for c in (0, 2, 3)]
    assert every_other(kept, 1).classes == ("2",) and len(every_other(kept, 1).labels) == IMAGES
    assert with_enough(uneven, Protocol(way=5, query=2), Screen(quiet=True))[0] is uneven
    with pytest.raises(DataError, match="with 30 queries"):  # an unbalanced class may get twice as many
        with_enough(uneven, Protocol(way=2, imbalance=1.0), Screen(quiet=True))
