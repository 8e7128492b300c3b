"""The benchmarks run at their smallest sizes; how fast things are is no matter of a test.

Some start many processes, and are run by hand: `python -m tests.benchmarks adapt memory flat soak`.
"""

import json
from typing import Any

import pytest

from tests.benchmarks.__main__ import BENCHMARKS, main

TINY = ["--tiny", "--images", "6"]


def measured(name: str, capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, Any]:
    """The result of one benchmark in the JSON document."""
    assert main([name, *TINY, "--json", *more]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "metadiff.benchmarks/1" and document["sizes"]["images"] == 6
    assert list(document["results"]) == [name] and document["machine"]["cores"]
    result: dict[str, Any] = document["results"][name]
    assert result["rows"] and result["ratios"]
    assert all(ratio["value"] >= 0 or "growth" in ratio["name"] for ratio in result["ratios"])
    return result


@pytest.mark.parametrize("name", sorted({*BENCHMARKS} - {"adapt", "memory", "flat", "evaluation", "soak"}))
def test_a_benchmark_runs_and_tells_its_ratios(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    measured(name, capsys)


def test_both_ways_of_evaluating_give_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert measured("evaluation", capsys)["notes"][0].endswith(": 0.00 points")


def test_one_benchmark_as_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sampling", "--tiny"]) == 0
    out = capsys.readouterr().out
    assert "Sampling" in out or "sampl" in out, out


def test_an_unknown_benchmark_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["speed"])
    assert caught.value.code == 2 and "training" in capsys.readouterr().err
