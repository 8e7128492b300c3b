"""`metadiff doctor`: does everything that metadiff needs work here, and if not, what to do?

Torch and torchvision are imported inside the checks, because a failing import is what they look for.
"""

import importlib
import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from metadiff_cli import __version__
from metadiff_cli.commands.look.cache import KINDS, entries, in_units
from metadiff_cli.console import Screen, counted
from metadiff_cli.errors import MetaDiffError
from metadiff_cli.files import cache_dir, data_dir

LEAST_DISK = 5e9  # bytes: enough for mini-ImageNet decoded at 84 x 84, its features, and the states of a training
LEAST_PYTHON, LEAST_TORCH = (3, 11), (2, 6)
TOGETHER = "install the two together, from one index: pip install --force-reinstall torch torchvision"


@dataclass(frozen=True)
class Check:
    """One finding: `state` is ok, note (worth knowing) or fail; `advice` is what to do about it."""

    name: str
    state: str
    found: str
    advice: str = ""


def show(screen: Screen, *, as_json: bool) -> bool:
    """Print all checks, and return whether everything that is needed works."""
    checks = [check for find in CHECKS for check in _found(find)]
    failed = [check for check in checks if check.state == "fail"]
    if as_json:
        screen.json({"schema": "metadiff.doctor/1", "ok": not failed, "checks": [asdict(check) for check in checks]})
        return not failed
    screen.table("metadiff doctor", ("", "what", "found"), [(c.state, c.name, c.found) for c in checks], left=3)
    for check in checks:
        if check.advice:
            screen.text(f"{check.name}: {check.advice}")
    screen.text("everything that is needed works" if not failed else f"{len(failed)} of the checks failed")
    return not failed


def _found(find: Callable[[], Iterator[Check]]) -> Iterator[Check]:
    """The findings of one check; what it cannot get past, such as a wrong METADIFF_CACHE_DIR, is a finding too."""
    try:
        yield from find()
    except MetaDiffError as error:
        yield Check(find.__name__.strip("_"), "fail", error.message, error.hint or "")


def _python() -> Iterator[Check]:
    version = f"{platform.python_version()} ({platform.python_implementation()}, {platform.platform()})"
    if sys.version_info < LEAST_PYTHON:
        yield Check("python", "fail", version, "metadiff needs Python 3.11 or newer")
    else:
        yield Check("python", "ok", version)
    yield Check("metadiff", "ok", f"{__version__} ({Path(__file__).parents[2]})")


def _torch() -> Iterator[Check]:
    try:
        version = importlib.import_module("torch").__version__
    except (ImportError, OSError, RuntimeError) as error:
        yield Check("torch", "fail", _first_line(error), "install it: pip install torch torchvision")
        return
    numbers = tuple(int("".join(filter(str.isdigit, part)) or 0) for part in version.split("+")[0].split(".")[:2])
    if numbers < LEAST_TORCH:
        yield Check("torch", "fail", version, "metadiff needs 2.6 or newer: pip install --upgrade torch torchvision")
    else:
        yield Check("torch", "ok", version)


def _torchvision() -> Iterator[Check]:
    """Importing torchvision registers its compiled operators; this fails when it was built for another torch."""
    try:
        yield Check("torchvision", "ok", str(importlib.import_module("torchvision").__version__))
    except Exception as error:  # the advice is the same for every failure
        reason = _first_line(error)
        advice = TOGETHER
        if "torchvision::nms" in reason:
            advice = (
                f"this torchvision ({_installed('torchvision')}) was built for another torch than the one that is "
                f"installed ({_installed('torch')}), as happens with a CPU-only torch from another index; {TOGETHER}"
            )
        yield Check("torchvision", "fail", reason, advice)


def _packages() -> Iterator[Check]:
    names = ("numpy", "pillow", "safetensors", "pydantic", "typer", "rich")
    versions = {name: _installed(name) for name in names}
    missing = [name for name, version in versions.items() if version == "not installed"]
    found = ", ".join(f"{name} {version}" for name, version in versions.items())
    advice = f"pip install {' '.join(missing)}" if missing else ""
    yield Check("packages", "fail" if missing else "ok", found, advice)


def _devices() -> Iterator[Check]:
    torch = sys.modules.get("torch")
    if torch is None:
        return
    from metadiff_cli.core.device import has_fast_bf16, pick_device

    device = pick_device("auto")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    gpus += ["Apple GPU (mps)"] if torch.backends.mps.is_available() else []
    built = f"; torch is built for CUDA {torch.version.cuda}" if torch.version.cuda and not gpus else ""
    yield Check("devices", "ok", f"{', '.join(gpus) or 'no GPU'}; --device auto takes {device}{built}")
    fast = has_fast_bf16(device)
    yield Check("bf16", "ok", "fast here, training uses it" if fast else "not fast here, training uses fp32")


def _threads() -> Iterator[Check]:
    torch = sys.modules.get("torch")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if torch is None:
        yield Check("threads", "ok", f"{cores} cores")
        return
    threads = torch.get_num_threads()
    advice = "" if threads <= cores else f"more threads than cores slow each other down: --threads {cores}"
    yield Check(
        "threads", "note" if advice else "ok", f"{counted(threads, 'thread')} on {counted(cores, 'core')}", advice
    )


def _disk() -> Iterator[Check]:
    for name, folder in (("cache", cache_dir()), ("data", data_dir(""))):
        free = shutil.disk_usage(_existing(folder)).free
        advice = "" if free >= LEAST_DISK else f"make room, or set METADIFF_{name.upper()}_DIR to another disk"
        yield Check(f"disk for {name}", "note" if advice else "ok", f"{in_units(free)} free in {folder}", advice)


def _cache() -> Iterator[Check]:
    root = cache_dir()
    held = in_units(sum(entry.size for kind in KINDS for entry in entries(root, kind)))
    try:
        with tempfile.TemporaryFile(dir=_existing(root)):
            yield Check("cache", "ok", f"{held} in {root}, can be written to")
    except OSError as error:
        advice = "decoded images go to a temporary folder instead; set METADIFF_CACHE_DIR to a folder of yours"
        yield Check("cache", "note", f"{root} cannot be written to ({error.strerror})", advice)


CHECKS: tuple[Callable[[], Iterator[Check]], ...] = (
    _python, _torch, _torchvision, _packages, _devices, _threads, _disk, _cache,
)  # fmt: skip


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above that exists."""
    return next(place for place in (folder, *folder.absolute().parents) if place.is_dir())


def _installed(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
