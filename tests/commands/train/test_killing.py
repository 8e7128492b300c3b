"""Real processes, killed by `kill -9` at random moments and at the moment of writing: they go on and end the same.

They are forked from a process that has torch imported already, which is most of the time of such a small run.
"""

import contextlib
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest

from metadiff_cli.files import LEFTOVER
from tests.worlds import SMALL

KILLS = 5  # a third of them waits for a file that is being written
ARGUMENTS = ["metatrain", "--preset", "glyphs-5w1s", "--threads", "1", *SMALL]
COMPARED = ("checkpoint.safetensors", "encoder.safetensors", "state.safetensors", "metrics.csv")
Started = Callable[..., ForkServerProcess]


def command(arguments: list[str], cache: str, log: str, slow: float) -> None:
    """What a process does: the command line, with a disk that takes `slow` seconds to sync a file."""
    from metadiff_cli.app import run
    from tests.worlds import hasty

    os.environ["METADIFF_CACHE_DIR"] = cache
    sync = os.fsync
    os.fsync = lambda handle: (time.sleep(slow), sync(handle))[1]
    with (
        Path(log).open("a", encoding="utf-8") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
        hasty(),
    ):
        code = run(arguments)
    os._exit(code)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Started:
    """start(out, cache): a process that begins a run there, or goes on with it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "metadiff_cli.commands.train.run", "tests.worlds"])
    log = tmp_path_factory.mktemp("logs") / "log.txt"

    def begin(out: Path, cache: Path, slow: float = 0.0, more: tuple[str, ...] = ()) -> ForkServerProcess:
        arguments = [*ARGUMENTS, *more, "--out", str(out), "--resume"]
        process = context.Process(target=command, args=(arguments, str(cache), str(log), slow))
        process.start()
        return process

    return begin


def ended(process: ForkServerProcess) -> int:
    process.join(120)
    assert process.exitcode is not None, "it does not end"
    return process.exitcode


@pytest.fixture(scope="module")
def whole(start: Started, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A run that nobody stopped, and the seconds that it took."""
    out = tmp_path_factory.mktemp("whole")
    began = time.monotonic()
    assert ended(start(out / "run", out / "cache")) == 0
    return out / "run", time.monotonic() - began


def same(out: Path, whole: Path) -> bool:
    return all((out / name).read_bytes() == (whole / name).read_bytes() for name in COMPARED)


def half_written(*folders: Path) -> list[Path]:
    """Files that are being written, or were when their writer was killed."""
    return [path for folder in folders for path in folder.rglob(".*") if LEFTOVER.fullmatch(path.name)]


def wait_for_a_write(process: ForkServerProcess, *folders: Path) -> None:
    while process.is_alive() and not half_written(*folders):
        time.sleep(0.001)


def test_killed_again_and_again_it_ends_with_the_same_bytes(
    start: Started, whole: tuple[Path, float], tmp_path: Path
) -> None:
    """Whenever a run gets to its end between the kills it is compared, and the next one begins with an empty cache."""
    expected, seconds = whole
    draw = random.Random(0)
    kills, torn, rounds = 0, 0, 0
    while kills < KILLS:
        out, cache = tmp_path / f"run{rounds}", tmp_path / f"cache{rounds}"
        writing = kills % 3 == 1
        process = start(out, cache, slow=0.05 if writing else 0.0)
        began = time.monotonic()
        time.sleep(draw.uniform(0, seconds / 2))
        if writing:
            wait_for_a_write(process, out)
        process.kill()
        if ended(process) == -signal.SIGKILL:
            kills, torn = kills + 1, torn + bool(half_written(out, cache))
            continue
        assert process.exitcode == 0 and same(out, expected)
        seconds, rounds = min(seconds, time.monotonic() - began), rounds + 1
    assert torn >= 1  # the moment of writing was among them
    assert ended(start(out, cache)) == 0
    assert same(out, expected) and not half_written(out)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_from_outside(
    start: Started, whole: tuple[Path, float], tmp_path: Path, number: int, code: int
) -> None:
    process = start(tmp_path / "run", tmp_path / "cache", slow=0.05)
    while process.is_alive() and not (tmp_path / "run" / "encoder-state.safetensors").exists():
        time.sleep(0.005)
    assert process.pid is not None
    os.kill(process.pid, number)
    assert ended(process) == code and not half_written(tmp_path)
    assert ended(start(tmp_path / "run", tmp_path / "cache")) == 0
    assert same(tmp_path / "run", whole[0])


def test_two_processes_that_fill_one_cache(start: Started, whole: tuple[Path, float], tmp_path: Path) -> None:
    processes = [start(tmp_path / name, tmp_path / "cache") for name in ("one", "two")]
    assert [ended(process) for process in processes] == [0, 0]
    assert all(same(tmp_path / name, whole[0]) for name in ("one", "two"))
    assert not half_written(tmp_path)


def test_one_run_directory_for_two_processes(start: Started, tmp_path: Path) -> None:
    first = start(tmp_path / "run", tmp_path / "cache", slow=0.05)
    while not (tmp_path / "run" / "config.yaml").exists():
        time.sleep(0.005)
    assert ended(start(tmp_path / "run", tmp_path / "cache")) == 2
    first.kill()
    assert ended(first) == -signal.SIGKILL
    assert ended(start(tmp_path / "run", tmp_path / "cache")) == 0  # the lock went with the process that held it
