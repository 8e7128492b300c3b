"""`evaluate --compare`: only a drop beyond both intervals is a drop."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from metadiff_cli.commands.evaluate.compare import Result as Earlier
from metadiff_cli.commands.evaluate.compare import check_comparable, check_no_drop, compared, read_result
from metadiff_cli.core.evaluation.evaluate import Protocol
from metadiff_cli.errors import ConfigError, GateError
from tests.worlds import Result

CLI = Callable[..., Result]
RESULT: dict[str, Any] = {
    "schema": "metadiff.evaluate/1", "way": 5, "shot": 1, "query": 15, "split": "test", "protocol": "inductive",
    "imbalance": None, "halves": False, "methods": {"metadiff": {"accuracy": 80.0, "ci95": 0.5}},
}  # fmt: skip


def result(accuracy: float, ci95: float) -> dict[str, Any]:
    changed = copy.deepcopy(RESULT)
    changed["methods"]["metadiff"] = {"accuracy": accuracy, "ci95": ci95}
    return changed


@pytest.mark.parametrize(
    ("accuracy", "ci95", "dropped"),
    [(80, 0.5, False), (90, 0.1, False), (79.2, 0.5, False), (78.9, 0.5, True), (79.2, 0.2, True), (10, 95, False)],
)
def test_a_drop_is_one_when_the_intervals_lie_apart(accuracy: float, ci95: float, dropped: bool) -> None:
    new = result(accuracy, ci95)
    new["compared"] = compared(new, Earlier(Path("old.json"), RESULT))
    assert new["compared"]["dropped"] == dropped
    if dropped:
        with pytest.raises(GateError, match="dropped by"):
            check_no_drop(new)
    else:
        check_no_drop(new)


def check(document: dict[str, Any]) -> None:
    check_comparable(Earlier(Path("old.json"), document), Protocol(), "test", halves=False)


@pytest.mark.parametrize("key", ["way", "shot", "query", "split", "protocol", "imbalance", "halves"])
def test_other_measurements_do_not_compare(key: str) -> None:
    check(RESULT)
    with pytest.raises(ConfigError, match=key):
        check({**RESULT, key: 99})


def test_a_result_without_its_episodes_does_not_compare() -> None:
    check({key: value for key, value in RESULT.items() if key not in ("imbalance", "halves")})
    with pytest.raises(ConfigError, match="way None there, 5 here"):
        check({key: value for key, value in RESULT.items() if key != "way"})


BAD = ["", "[]", "{}", "[" * 100_000, '{"schema": "metadiff.adapt/1"}', '{"schema": "metadiff.evaluate/1"}',
       json.dumps({**RESULT, "methods": {"metadiff": {"accuracy": "x", "ci95": 1}}})]  # fmt: skip


@pytest.mark.parametrize("text", BAD)
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ConfigError, match=r"x\.json"):
        read_result(tmp_path / "x.json")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="none"):
        read_result(tmp_path / "none.json")


def test_the_command(cli: CLI, small_run: Path, checkpoint: Path, tmp_path: Path) -> None:
    arguments = ["evaluate", "-c", checkpoint, "--episodes", "20", "--query", "5", "--controls", ""]
    same = cli(*arguments, "--compare", small_run / "result.json")
    assert same.code == 0 and "+0.00 points" in same.out, same.err
    better = json.loads((small_run / "result.json").read_text())
    better["methods"]["metadiff"] |= {"accuracy": 200.0, "ci95": 0.0}  # beyond any interval
    (tmp_path / "better.json").write_text(json.dumps(better))
    dropped = cli(*arguments, "--compare", tmp_path / "better.json", "--json")
    assert dropped.code == 5 and "dropped by" in dropped.err
    assert json.loads(dropped.out)["compared"]["dropped"] is True
    other = cli(*arguments, "--shot", "2", "--compare", small_run / "result.json")
    assert other.code == 2 and "shot" in other.err and other.out == ""
