"""The run directory of a training: its files, its lock, and when it may be taken."""

import csv
import io
import json
import platform
import re
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from metadiff_cli import __version__
from metadiff_cli.config.load import check, flat, read_yaml, to_yaml
from metadiff_cli.config.schema import Config
from metadiff_cli.core.baselines.learners import ON_FEATURES, ON_IMAGES
from metadiff_cli.core.distributed import SINGLE, Group, is_lost, process_lost
from metadiff_cli.errors import ConfigError, MetaDiffError, Stopped
from metadiff_cli.files import LEFTOVER, sweep, write_text

CONFIG, LOCK = "config.yaml", ".lock"
ENCODER, CHECKPOINT = "encoder.safetensors", "checkpoint.safetensors"
ENCODER_STATE, STATE = "encoder-state.safetensors", "state.safetensors"  # of unfinished trainings
MANIFEST, RESULT = "manifest.json", "result.json"
METRICS, EARLIER_METRICS = "metrics.csv", "pretrain-metrics.csv"
OURS = (CONFIG, MANIFEST, RESULT, METRICS, EARLIER_METRICS, ENCODER, CHECKPOINT, ENCODER_STATE, STATE)
HEAD = "# settings of a metadiff run; --config reads them back\n"  # of config.yaml
UNNAMED = re.compile(r"\.tmp\w{6}")  # files that safetensors had begun
NONE = "none"

EPISODES = ("evaluation.way", "evaluation.shot", "evaluation.query")  # of the validations that select
DEPENDS = {  # stage -> settings, or sections of them, that its result depends on
    "data": ("data.layout", "data.size", "data.glyphs", "seed"),
    "pretrain": ("encoder", "seed", "data.size", "pretrain"),
    "library": ("encoder",),
    "features": ("features",),
    "metadiff": ("seed", "denoiser", "metatrain", *EPISODES),
    **dict.fromkeys(ON_FEATURES, ("seed", "baselines.frozen", *EPISODES)),
    **dict.fromkeys(ON_IMAGES, ("encoder", "seed", "data.size", "baselines.images", "pretrain.augment", *EPISODES)),
}


@dataclass
class Run:
    """A run directory of `command` that began at `started`, in seconds since 1970.

    Results lie in files that depend on the configuration alone; manifest.json has the rest. Of a group of processes
    rank 0 writes.
    """

    folder: Path
    command: str
    started: float
    overwrite: bool = False
    group: Group = SINGLE

    def begin(self, config: Config) -> list[str]:
        """Write config.yaml, which --config reads back; with `overwrite`, remove the files of the earlier run first.

        For rank 0, once all inputs could be opened. Returns the names of other files, which stay.
        """
        ours = is_run(self.folder)
        for name in OURS:
            sweep(self.folder, name)
            if self.overwrite and ours:
                (self.folder / name).unlink(missing_ok=True)
        left = sorted(path.name for path in self.folder.iterdir())
        for name in left if ours else ():
            if UNNAMED.fullmatch(name):
                (self.folder / name).unlink(missing_ok=True)
        self._write(CONFIG, _config_text(config))
        return [name for name in left if name not in (*OURS, LOCK) and not UNNAMED.fullmatch(name)]

    def save_metrics(self, rows: list[dict[str, Any]], stage: str) -> None:
        """Write all rows so far to metrics.csv, or to pretrain-metrics.csv when `stage` is not the run's own."""
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
        return self.folder / (METRICS if stage == self.command else EARLIER_METRICS)

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
        self.save_json(MANIFEST, manifest)

    def save_json(self, name: str, document: dict[str, Any]) -> None:
        """Write a JSON document into the run directory."""
        self._write(name, json.dumps(document, indent=2, ensure_ascii=False) + "\n")

    def _write(self, name: str, text: str) -> None:
        if self.group.rank == 0:
            write_text(self.folder / name, text)


@contextmanager
def open_run(
    out: Path,
    command: str,
    config: Config,
    *,
    overwrite: bool,
    resume: bool,
    inputs: Sequence[Path] = (),
    stages: Sequence[str] = (),
    group: Group = SINGLE,
) -> Iterator[Run]:
    """Make or take the run directory `out` and lock it against other runs; `Run.begin` writes the first file.

    Raises ConfigError when it has contents and neither flag is given, when --overwrite would touch one of `inputs`, and
    when --resume finds that it was begun with other settings of its `stages` (see DEPENDS). Inside, an interruption or
    an error of the system is raised again with the way to go on.
    """
    if overwrite and resume:
        raise ConfigError("--overwrite and --resume exclude each other", hint="give one of them")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file, not a folder", hint="give another --out")
    with ExitStack() as held:

        def take() -> None:
            _check_contents(out, config, overwrite=overwrite, resume=resume)
            if overwrite:
                _check_overwriting(out, inputs)
            held.enter_context(_locked(out))
            if not overwrite and is_run(out):
                before = check(read_yaml(out / CONFIG))
                refuse_changes(depends(before, *stages), depends(config, *stages), out)

        group.on_rank_zero(take)
        try:
            yield Run(out, command, time.time(), overwrite, group)
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


def is_run(folder: Path) -> bool:
    """Whether the folder has a config.yaml that a run wrote: anybody may have a file of that name."""
    try:
        with (folder / CONFIG).open("rb") as file:
            return file.read(len(HEAD)) == HEAD.encode()
    except OSError:
        return False


def _check_contents(out: Path, config: Config, *, overwrite: bool, resume: bool) -> None:
    """Raise ConfigError for a folder with contents, unless a flag is given and it is a run directory.

    A run that failed before it made anything leaves its configuration alone: the same run may be tried again.
    """
    inside = [path for path in out.iterdir() if not LEFTOVER.fullmatch(path.name)] if out.is_dir() else []
    contents = {path.name for path in inside} - {LOCK}
    if not contents or (contents == {CONFIG} and (out / CONFIG).read_bytes() == _config_text(config).encode()):
        return
    if not (overwrite or resume):
        raise ConfigError(
            f"run directory {out} is not empty", hint="add --resume or --overwrite, or give another --out"
        )
    if not is_run(out):
        raise ConfigError(
            f"{out} is no run directory: it has no {CONFIG} that metadiff wrote", hint="give another --out"
        )


def _check_overwriting(out: Path, inputs: Sequence[Path]) -> None:
    """Raise ConfigError when `out` is or holds an input, the working folder, the home folder or a repository.

    Only files of a run are removed, see `OURS`; a slip of the keyboard should not get that far.
    """
    places = [(str(path), path) for path in inputs]
    places += [("the working folder", Path.cwd()), ("a repository", out / ".git")]
    with suppress(RuntimeError):  # no home
        places.append(("your home folder", Path.home()))
    whole = out.resolve()
    for name, place in places:
        found = place.resolve()
        if place.exists() and (found == whole or whole in found.parents):
            raise ConfigError(f"--overwrite would reach {name}, which {out} is or holds", hint="give another --out")


def depends(config: Config, *stages: str, **further: str | None) -> dict[str, Any]:
    """What the results of training `stages` depend on: their settings, and `further` identities of data and files."""
    settings = flat(config.model_dump(mode="json"))
    prefixes = tuple(dict.fromkeys(prefix for stage in stages for prefix in DEPENDS[stage]))
    own = {key: value for key, value in settings.items() if any(f"{key}.".startswith(f"{p}.") for p in prefixes)}
    return {**own, **{key: value or NONE for key, value in further.items()}}


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


def _config_text(config: Config) -> str:
    return HEAD + to_yaml(config)


def _versions() -> dict[str, str]:
    versions = {"metadiff": __version__, "python": platform.python_version()}
    for name in ("torch", "torchvision", "numpy"):
        if name in sys.modules:
            versions[name] = str(sys.modules[name].__version__)
    return versions
