"""Long and many runs: what a process keeps of memory and open files, and whether processes are in each other's way.

`adapt` and `evaluate` use the checkpoint that comes with the package.
"""

import contextlib
import gc
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.benchmarks.common import Ratio, Report, Sizes, write_images
from tests.benchmarks.learning import resident_megabytes

CLASSES, SHOTS, QUERIES, SIDE = 5, 2, 5, 64
EVERY = 0.25  # seconds between two looks at a training
KEPT = 10.0  # MB that may come and go
TRAINING = ["data.glyphs.train=12", "data.glyphs.val=8", "data.glyphs.test=8", "data.glyphs.images_per_class=12",
            "pretrain.epochs=1", "metatrain.batch=4", "metatrain.validate_every=100", "denoiser.width=32",
            "metatrain.validation_episodes=20", "evaluation.episodes=20", "evaluation.query=5"]  # fmt: skip
Look = tuple[float, int]  # MB, open files


def soak(sizes: Sizes) -> Report:
    """`adapt` again and again and a long `metatrain`, each in one process; then many processes on an empty cache."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        for c in range(CLASSES):
            write_images(place / "data" / f"class{c}", SHOTS + QUERIES, SIDE, seed=c)
        write_images(place / "query", QUERIES, SIDE, seed=99)
        rows, ratios = [], []
        for what, unit in (("adapt", f"{sizes.soak_runs} runs"), ("metatrain", f"{sizes.soak_steps} steps")):
            looks = _in_one_process(what, place, sizes)
            memory, files = (_growth([look[i] for look in looks]) for i in (0, 1))
            rows.append((f"{what}, {unit} in one process", len(looks), round(memory, 1), int(files)))
            ratios.append(Ratio(f"{what}: growth in MB", memory, most=KEPT))
            ratios.append(Ratio(f"{what}: growth in open files", files, most=0))
        for what, count in (("adapt", sizes.soak_processes), ("evaluate", sizes.soak_processes // 4)):
            failed, results = _at_once(_command(what, place), count, place / f"cache-{what}")
            rows.append((f"{what}, {count} processes at once", count, "", ""))
            ratios.append(Ratio(f"{what}: processes that failed", failed, most=0))
            ratios.append(Ratio(f"{what}: different results", results, most=1))
    return Report(
        "Long and many runs", ("what", "looks", "MB more", "open files more"), rows, ratios,
        ("growth: median of the last quarter of the looks minus median of the second quarter",),
    )  # fmt: skip


def _growth(values: Sequence[float]) -> float:
    quarter = max(1, len(values) // 4)
    return statistics.median(values[-quarter:]) - statistics.median(values[quarter : 2 * quarter])


def _command(what: str, place: Path) -> list[str]:
    data = str(place / "data")
    if what == "adapt":
        return ["adapt", "--support", data, "--query", str(place / "query"), "--views", "1", "--json"]
    return ["evaluate", "--data", data, "--split", "all", "--episodes", "20", "--query", "5", "--json"]


def _at_once(command: list[str], count: int, cache: Path) -> tuple[int, int]:
    """How many of `count` processes with one empty cache fail, and how many different results the others give."""
    environment = {**os.environ, "METADIFF_CACHE_DIR": str(cache)}
    line = [sys.executable, "-m", "metadiff_cli", *command]
    running = [subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
               for _ in range(count)]  # fmt: skip
    ended = [(*process.communicate(), process.returncode) for process in running]
    for _, err, code in ended:
        if code != 0:
            sys.stderr.write(err)
    return sum(code != 0 for *_, code in ended), len({_timeless(out) for out, _, code in ended if code == 0})


def _timeless(text: str) -> str:
    """A result document without its speed."""
    return json.dumps({key: value for key, value in json.loads(text).items() if key != "episodes_per_second"})


def _in_one_process(what: str, place: Path, sizes: Sizes) -> list[Look]:
    command = [sys.executable, "-m", "tests.benchmarks.soak", what, str(place), json.dumps(asdict(sizes))]
    environment = {**os.environ, "METADIFF_CACHE_DIR": str(place / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        raise RuntimeError(f"{what} again and again failed:\n{done.stderr}")
    return [(float(megabytes), int(files)) for megabytes, files in json.loads(done.stdout)]


def _look() -> Look:
    """Resident memory and open files of this process, the latter where the system tells them."""
    with contextlib.suppress(OSError):
        return resident_megabytes(peak=False), len(os.listdir("/proc/self/fd"))
    return resident_megabytes(peak=False), 0


def _adapting(place: Path, sizes: Sizes) -> list[Look]:
    """A look after each run."""
    looks = []
    for _ in range(sizes.soak_runs):
        _run(_command("adapt", place))
        gc.collect()
        looks.append(_look())
    return looks


def _training(place: Path, sizes: Sizes) -> list[Look]:
    """Looks at regular times while the denoiser is trained."""
    settings = [*TRAINING, f"metatrain.steps={sizes.soak_steps}"]
    command = ["metatrain", "--preset", "glyphs-5w1s", *(part for s in settings for part in ("--set", s)), "--out"]
    _run([*command, str(place / "warm"), "--set", "metatrain.steps=2"])  # decoding, encoder and features are kept
    looks, over = [_look()], threading.Event()

    def watch() -> None:
        while not over.wait(EVERY):
            looks.append(_look())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        _run([*command, str(place / "long")])
    finally:
        over.set()
        watcher.join()
    return looks


def _run(command: list[str]) -> None:
    """The command line in this process, its output thrown away."""
    from metadiff_cli.app import run

    err = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
        code = run(command)
    if code != 0:
        raise RuntimeError(err.getvalue())


WORKS: dict[str, Callable[[Path, Sizes], list[Look]]] = {"adapt": _adapting, "metatrain": _training}


def _child(what: str, place: Path, values: dict[str, Any]) -> list[Look]:
    sizes = Sizes(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})
    return WORKS[what](place, sizes)


if __name__ == "__main__":
    print(json.dumps(_child(sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3]))))
