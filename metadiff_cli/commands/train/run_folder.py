"""The run directory of a training: its files, its lock, and when it may be taken."""

import csv
import io
import json
import platform
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from metadiff_cli import __version__
from metadiff_cli.config.load import check, flat, read_yaml, to_yaml
from metadiff_cli.config.schema import Config
from metadiff_cli.core.training.distributed import SINGLE, Group, is_lost, process_lost
from metadiff_cli.errors import ConfigError, MetaDiffError, Stopped
from metadiff_cli.files import LEFTOVER, sweep, write_text

CONFIG, LOCK = "config.yaml", ".lock"
ENCODER, CHECKPOINT = "encoder.safetensors", "checkpoint.safetensors"
ENCODER_STATE, STATE = "encoder-state.safetensors", "state.safetensors"  # of unfinished trainings
NONE = "none"


@dataclass
class Run:
    """A run directory of `command` that began at `started`, in seconds since 1970.

    Results lie in files that depend on the configuration alone; manifest.json has the rest. Of a group of processes
    rank 0 writes.
    """

    folder: Path
    command: str
    started: float
    group: Group = SINGLE

    def save_config(self, config: Config) -> None:
        """Write config.yaml, which `--config` reads back: everything that the results depend on."""
        self._write(CONFIG, to_yaml(config))

    def save_metrics(self, rows: list[dict[str, Any]], stage: str) -> None:
        """Write all rows so far to metrics.csv, or to <stage>-metrics.csv for another stage than the run's own."""
        names = list(dict.fromkeys(name for row in rows for name in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        self._write(self._metrics(stage).name, text.getvalue())

    def read_metrics(self, stage: str) -> list[dict[str, str]]:
        """The rows that `save_metrics` wrote, as text; none when the stage did not run here."""
        path = self._metrics(stage)
        if not path.is_file():
            return []
        with path.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    def _metrics(self, stage: str) -> Path:
        return self.folder / ("metrics.csv" if stage == self.command else f"{stage}-metrics.csv")

    def save_manifest(self, **facts: Any) -> None:
        """Write manifest.json: `facts`, times, paths, host and versions."""
        manifest = {
            "command": self.command,
            "arguments": sys.argv[1:],
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(self.started)),
            "seconds": round(time.time() - self.started, 1),
            "folder": str(self.folder.resolve()),
            "host": platform.node(),
            "platform": platform.platform(),
            "versions": _versions(),
            "processes": self.group.world_size,
            **facts,
        }
        self.save_json("manifest.json", manifest)

    def save_json(self, name: str, document: dict[str, Any]) -> None:
        """Write a JSON document into the run directory."""
        self._write(name, json.dumps(document, indent=2, ensure_ascii=False) + "\n")

    def _write(self, name: str, text: str) -> None:
        if self.group.rank == 0:
            write_text(self.folder / name, text)


@contextmanager
def open_run(
    out: Path, command: str, config: Config, *, overwrite: bool, resume: bool, group: Group = SINGLE
) -> Iterator[Run]:
    """Make or take the run directory `out`, lock it against other runs, and write the configuration into it.

    Raises ConfigError when it has contents and neither flag is given, or when it was begun with other settings. Inside,
    an interruption or an error of the system is raised again with the way to go on.
    """
    if overwrite and resume:
        raise ConfigError("--overwrite and --resume exclude each other", hint="give one of them")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file, not a folder", hint="give another --out")
    with ExitStack() as held:
        group.on_rank_zero(lambda: _take(held, out, config, overwrite=overwrite, resume=resume))
        run = Run(out, command, time.time(), group)
        try:
            run.save_config(config)
            yield run
        except KeyboardInterrupt:
            raise Stopped(signal.SIGINT, resumable=True) from None
        except Stopped as stopped:
            raise Stopped(stopped.exit_code - 128, resumable=True) from None
        except OSError as error:
            place = f" ({error.filename})" if error.filename else ""
            raise MetaDiffError(
                f"{error.strerror or error}{place}; what was saved in {out} before is intact",
                hint="make room or mend the folder, and go on with --resume",
            ) from error
        except RuntimeError as error:
            if group.world_size > 1 and is_lost(error):
                raise process_lost(group, error, resumable=True) from error
            raise


def _take(held: ExitStack, out: Path, config: Config, *, overwrite: bool, resume: bool) -> None:
    """Check and lock the run directory, and empty it or compare its settings."""
    _check_contents(out, config, overwrite=overwrite, resume=resume)
    held.enter_context(_locked(out))
    sweep(out)
    if overwrite:
        _clear(out)
    elif (out / CONFIG).is_file():
        before = depends(check(read_yaml(out / CONFIG)))
        refuse_changes(before, depends(config), out)


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Keep other runs from the run directory; the system drops the lock of a process that was killed."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = FileLock(out / LOCK)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ConfigError(f"another run is writing to {out}", hint="wait for it, or give another --out") from error
    except OSError as error:
        raise MetaDiffError(
            f"run directory {out} cannot be made ({error.strerror})", hint="give another --out"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _check_contents(out: Path, config: Config, *, overwrite: bool, resume: bool) -> None:
    """Raise ConfigError for a folder with contents, unless a flag is given and it looks like a run directory.

    A run that failed before it made anything leaves its configuration alone: the same run may be tried again.
    """
    inside = [path for path in out.iterdir() if not LEFTOVER.fullmatch(path.name)] if out.is_dir() else []
    contents = {path.name for path in inside} - {LOCK}
    if not contents or (contents == {CONFIG} and (out / CONFIG).read_bytes() == to_yaml(config).encode()):
        return
    if not (overwrite or resume):
        raise ConfigError(
            f"run directory {out} is not empty", hint="add --resume or --overwrite, or give another --out"
        )
    if not (out / CONFIG).is_file():
        raise ConfigError(f"{out} does not look like a run directory", hint="empty it yourself or give another --out")


def depends(config: Config, **further: str | None) -> dict[str, Any]:
    """All that the result of a training depends on: settings, and `further` identities of data and files."""
    return {
        **flat(config.model_dump(mode="json", exclude={"runtime"})),
        **{key: value or NONE for key, value in further.items()},
    }


def refuse_changes(before: Mapping[str, Any], now: Mapping[str, Any], where: Path) -> None:
    """Raise ConfigError that lists what differs between two results of `depends`."""
    changed = [key for key in dict.fromkeys([*before, *now]) if before.get(key, NONE) != now.get(key, NONE)]
    if changed:
        lines = "; ".join(f"{key}: {before.get(key, NONE)} -> {now.get(key, NONE)}" for key in changed)
        raise ConfigError(
            f"{where} was begun with other settings ({lines})",
            hint="to go on, give the same ones; for a new run, another --out or --overwrite, and --init-from FILE to "
            "start from trained weights",
        )


def _clear(folder: Path) -> None:
    for child in folder.iterdir():
        if child.name != LOCK:
            shutil.rmtree(child) if child.is_dir() and not child.is_symlink() else child.unlink()


def _versions() -> dict[str, str]:
    versions = {"metadiff": __version__, "python": platform.python_version()}
    for name in ("torch", "torchvision", "numpy"):
        if name in sys.modules:
            versions[name] = str(sys.modules[name].__version__)
    return versions
