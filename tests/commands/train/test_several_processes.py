"""The command line in two processes: as one run, and what becomes of it when one of them dies."""

import csv
import json
import signal
import subprocess
import time
from pathlib import Path

import pytest

from metadiff_cli.config.load import preset_names
from tests.processes import SECONDS, begin, end, torchrun
from tests.worlds import SMALL, invoke

COMMAND = ["-m", "metadiff_cli"]


def test_metatrain_by_torchrun_is_the_run_of_one_process(
    small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("METADIFF_CACHE_DIR", str(tmp_path / "cache"))  # images and features are made by both
    encoder, out = small_run / "encoder.safetensors", tmp_path / "run"
    done = torchrun(["metatrain", "--preset", "glyphs-5w1s", "--encoder", encoder, "--out", out, "--json", *SMALL])
    assert done.returncode == 0, done.stderr
    result, expected = json.loads(done.stdout), json.loads((small_run / "result.json").read_text())
    assert losses(out) == pytest.approx(losses(small_run), abs=1e-4)
    prototypes = [document["methods"]["prototype"]["accuracy"] for document in (result, expected)]
    assert prototypes[0] == prototypes[1]
    assert result["methods"]["metadiff"]["accuracy"] == pytest.approx(
        expected["methods"]["metadiff"]["accuracy"], abs=1
    )
    assert done.stderr.count("step 3/6") == 1
    assert json.loads((out / "manifest.json").read_text())["processes"] == 2


def losses(run: Path) -> list[float]:
    with (run / "metrics.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def test_what_runs_in_one_process_is_refused(checkpoint: Path) -> None:
    results = end(begin([*COMMAND, "evaluate", "-c", checkpoint]))
    assert [code for code, _, _ in results] == [2, 2]
    errors = "".join(error for _, _, error in results)
    assert errors.count("error:") == 1 and "evaluate runs in one process" in errors and "without torchrun" in errors


def test_an_error_is_told_once(tmp_path: Path) -> None:
    assert "photos" in preset_names()
    results = end(begin([*COMMAND, "metatrain", "--preset", "photos", "--data", tmp_path, "--out", tmp_path / "run"]))
    assert {code for code, _, _ in results} == {3}
    assert sum(error.count("error:") for _, _, error in results) == 1


def test_a_run_whose_process_died_goes_on_in_another_number(tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = ["pretrain", "--preset", "glyphs-5w1s", "--out", out, *SMALL, "--set", "pretrain.epochs=10"]
    processes = begin([*COMMAND, *command])
    state = out / "encoder-state.safetensors"
    wait_for(state, processes)
    processes[1].kill()
    (code, _, error), (killed, _, _) = end(processes)
    assert (code, killed) == (1, -signal.SIGKILL)
    assert "error: another process of this run has ended (rank 0 of 2" in error
    assert "--resume" in error and "torchrun --nproc-per-node 2" in error
    went_on = invoke(*command, "--resume")
    assert went_on.code == 0 and "going on after epoch" in went_on.err
    assert "epoch 10/10" in went_on.err


def test_a_signal_to_one_process_stops_all_after_the_same_step(tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = ["pretrain", "--preset", "glyphs-5w1s", "--out", out, *SMALL, "--set", "pretrain.epochs=4000"]
    processes = begin([*COMMAND, *command])
    wait_for(out / "encoder-state.safetensors", processes)
    processes[1].send_signal(signal.SIGTERM)
    results = end(processes)
    assert [code for code, _, _ in results] == [143, 143]
    assert sum(error.count("error: terminated") for _, _, error in results) == 1


def wait_for(path: Path, processes: list[subprocess.Popen[str]]) -> None:
    """Until a file is there."""
    limit = time.monotonic() + SECONDS
    while not path.exists():
        assert time.monotonic() < limit and all(process.poll() is None for process in processes)
        time.sleep(0.05)
