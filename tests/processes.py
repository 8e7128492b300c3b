"""Other processes: several that work together, as torchrun starts them, and one without the rights of root."""

import os
import pickle
import shutil
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest

from tests.worlds import Result

ROOT = Path(__file__).parent.parent
SECONDS = 600  # after which a test gives up
PLAIN = 65_534  # the user "nobody"
Made = TypeVar("Made")


def begin(command: Sequence[str | Path], count: int = 2) -> list[subprocess.Popen[str]]:
    """`count` processes of the interpreter with the arguments `command`, by the variables that torchrun sets."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count), **settings()}
    return [
        subprocess.Popen(
            [sys.executable, *map(str, command)], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count)},
        )
        for rank in range(count)
    ]  # fmt: skip


def end(processes: Sequence[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each."""
    try:
        texts = [process.communicate(timeout=SECONDS) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *text) for process, text in zip(processes, texts, strict=True)]


def torchrun(command: Sequence[str | Path], count: int = 2) -> subprocess.CompletedProcess[str]:
    """The command line, with few episodes to fit on as by `invoke`, by torchrun itself."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    return subprocess.run(
        [*launcher, "-m", "tests.hasty", *map(str, command)], cwd=ROOT, text=True, capture_output=True,
        timeout=SECONDS, env={**os.environ, **settings()},
    )  # fmt: skip


def settings() -> dict[str, str]:
    """The processes share the cores, and import what the tests do."""
    return {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def cli_as_plain_user(arguments: Sequence[str | Path], folder: Path, stdin: str = "") -> Result:
    """The command line in `folder` without root's rights, with which permissions mean nothing.

    Skips the test where root cannot give them up.
    """
    command = [sys.executable, "-m", "metadiff_cli", *map(str, arguments)]
    if os.geteuid() == 0:
        if not shutil.which("setpriv"):
            pytest.skip("as root, this test needs setpriv, to give up root's rights")
        command = ["setpriv", "--bounding-set=-all", *command]
    done = subprocess.run(
        command, cwd=folder, text=True, input=stdin, capture_output=True, timeout=SECONDS,
        env={**os.environ, **settings()},
    )  # fmt: skip
    return Result(done.returncode, done.stdout, done.stderr)


def as_plain_user(work: Callable[[], Made]) -> Made:
    """The result of `work` in a process without the rights of root, which permissions do not stop."""
    if not hasattr(os, "fork") or os.geteuid() != 0:
        return work()
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer versions of Python warn of forks beside threads
        child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(PLAIN)
            os.setuid(PLAIN)
            result: object = work()
        except BaseException as error:
            result = error
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(pickle.dumps(result))
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        found: Any = pickle.loads(pipe.read())
    os.waitpid(child, 0)
    if isinstance(found, BaseException):
        raise found
    return found  # type: ignore[no-any-return]


# what no `adapt` with the packaged encoder needs
HEAVY = {"torchvision", "timm", "sympy", "scipy", "pandas", "torch._dynamo", "torch._inductor", "onnx", "jinja2"}


def loaded_by(*arguments: str | Path) -> tuple[set[str], str]:
    """The modules that a whole command loads in a process of its own, and its stdout."""
    code = (
        "import sys\nfrom metadiff_cli.app import run\n"
        "code = run(sys.argv[1:])\nprint(*sys.modules, file=sys.stderr)\nraise SystemExit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.splitlines()[-1].split()), done.stdout
