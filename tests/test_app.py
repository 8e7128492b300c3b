"""The command line as a process: closed streams, readers that go, a full output."""

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from metadiff_cli import app

COMMAND = f"{sys.executable} -m metadiff_cli"


def shell(text: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """What bash does with a command line."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    return subprocess.run(["bash", "-c", text], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("closed", ["<&-", "2>&-", "<&- 2>&-"])
def test_a_closed_stream_stops_nothing(closed: str, tmp_path: Path) -> None:
    done = shell(f"{COMMAND} presets list --json {closed}", tmp_path)
    assert done.returncode == 0 and "glyphs-5w1s" in done.stdout and "Traceback" not in done.stderr
    failed = shell(f"{COMMAND} presets show no-such-thing {closed}", tmp_path)
    assert failed.returncode == 2 and "Traceback" not in failed.stderr


def test_results_that_have_no_place_to_go_are_an_error(tmp_path: Path) -> None:
    done = shell(f"{COMMAND} presets list >&-", tmp_path)
    assert done.returncode == 1 and "standard output is closed" in done.stderr
    silent = shell(f"{COMMAND} presets list >&- 2>&- <&-", tmp_path)
    assert (silent.returncode, silent.stdout, silent.stderr) == (1, "", "")
    full = shell(f"{COMMAND} presets list > /dev/full", tmp_path)
    assert full.returncode == 1 and "No space left on device" in full.stderr


@pytest.mark.parametrize("command", ["presets list", "presets list --json", "--help", "config show", "inspect"])
def test_a_reader_that_has_seen_enough_is_no_failure(command: str, tmp_path: Path) -> None:
    done = shell(f"{COMMAND} {command} | head -1; echo ${{PIPESTATUS[0]}}", tmp_path)
    assert done.stdout.splitlines()[-1] == "0" and done.stderr == ""
    gone = shell(f"(sleep 0.1; exec {COMMAND} {command}) | true; echo ${{PIPESTATUS[0]}}", tmp_path)
    assert gone.stdout == "0\n" and gone.stderr == ""


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("Tried to allocate 2 GiB")])
def test_a_lack_of_memory_is_told_as_what_it_is(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: object) -> None:
        raise error

    monkeypatch.setattr(app, "app", fail)
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        assert app.run(["pretrain"]) == 1
    assert "error: out of memory" in err.getvalue() and "--batch-size" in err.getvalue()
