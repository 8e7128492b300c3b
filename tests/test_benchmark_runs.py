"""The benchmarks run at their smallest sizes; how fast things are is no matter of a test."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NAMES = [
    "training",
    "memory",
    "sampling",
    "evaluation",
    "extraction",
    "pretraining",
    "adapt",
    "large",
    "large-bank",
    "soak",
]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.benchmarks", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=dict(os.environ))


@pytest.mark.slow
def test_every_benchmark_runs_and_tells_its_ratios(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the plot needs matplotlib, a development dependency")
    plot = tmp_path / "memory.svg"
    done = run("--tiny", "--json", "--images", "6", "--plot", str(plot))
    assert done.returncode == 0, done.stderr
    assert plot.read_text(encoding="utf-8").lstrip().startswith("<?xml")
    document = json.loads(done.stdout)
    assert document["schema"] == "metadiff.benchmarks/1" and document["sizes"]["images"] == 6
    assert list(document["results"]) == NAMES and document["machine"]["cores"]
    for result in document["results"].values():
        assert result["rows"] and result["ratios"]
        assert all(ratio["value"] >= 0 or "growth" in ratio["name"] for ratio in result["ratios"])
    lost = {ratio["name"]: ratio for ratio in document["results"]["soak"]["ratios"]}
    assert all(ratio["reached"] for name, ratio in lost.items() if "MB" not in name)  # a few runs say little of memory
    difference = document["results"]["evaluation"]["notes"][0]
    assert difference.endswith(": 0.00 points")  # both ways of evaluating give the same


def test_one_benchmark_as_a_table() -> None:
    done = run("evaluation", "--tiny")
    assert done.returncode == 0, done.stderr
    assert "Evaluation on cached features" in done.stdout and "evaluate / one task at a time" in done.stdout


def test_an_unknown_benchmark_is_refused() -> None:
    done = run("speed")
    assert done.returncode == 2 and "training" in done.stderr
