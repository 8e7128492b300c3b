"""What the commands share between options and core: the screen's progress, data, run directories, encoders."""

import csv
import hashlib
import json
import platform
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from metadiff_cli import __version__
from metadiff_cli.commands.train.resume import depends, refuse_changes
from metadiff_cli.config.load import check, read_yaml, to_yaml
from metadiff_cli.config.schema import Config
from metadiff_cli.console import Screen
from metadiff_cli.core.training.distributed import check_same, lost, main_first, on_main, process_lost
from metadiff_cli.core.training.world import world
from metadiff_cli.data.benchmarks import KNOWN, open_dataset
from metadiff_cli.data.cache import DecodedSplit, decode_split
from metadiff_cli.data.folders import Dataset, Split, require_split
from metadiff_cli.data.glyphs import glyph_dataset
from metadiff_cli.data.scan import check_folder
from metadiff_cli.errors import ConfigError, DataError, MetaDiffError, Stopped
from metadiff_cli.files import LEFTOVER, cache_dir, data_dir, sweep, writable, write_text

BROKEN_SHOWN = 5  # broken images that are named; the others are counted
CONFIG, LOCK = "config.yaml", ".lock"
ENCODER, CHECKPOINT = "encoder.safetensors", "checkpoint.safetensors"
ENCODER_STATE, STATE = "encoder-state.safetensors", "state.safetensors"  # of unfinished trainings


@dataclass
class Source:
    """A data set that was found, and its splits as decoded arrays, each decoded when first asked for."""

    dataset: Dataset
    config: Config
    screen: Screen
    decoded: dict[tuple[str, int], DecodedSplit] = field(default_factory=dict)

    def has(self, name: str) -> bool:
        """Whether the data set has that split."""
        return name in self.dataset.splits

    def split(self, name: str, size: int | None = None) -> DecodedSplit:
        """The decoded split `name` (or "all"), from the cache when it is there."""
        size = size or self.config.data.size
        if (name, size) not in self.decoded:
            self.decoded[name, size] = self._decode(require_split(self.dataset, name), size)
        return self.decoded[name, size]

    def _decode(self, split: Split, size: int) -> DecodedSplit:
        workers = self.config.runtime.num_workers
        with self.screen.progress(f"reading {split.name} images") as advance:
            decoded = main_first(
                lambda: decode_split(split, size, cache_dir() / "images", workers=workers, progress=advance)
            )
        check_same(decoded.key, f"the {split.name} images")
        for note in decoded.notes:
            self.screen.note(note)
        for path, reason in decoded.broken[:BROKEN_SHOWN]:
            self.screen.warn(f"skipped {path}: {reason}")
        if decoded.broken:
            self.screen.warn(f"{len(decoded.broken)} of {len(split.paths)} {split.name} images could not be read")
        return decoded


def open_source(config: Config, data: Path | None, screen: Screen) -> Source:
    """Find the data set of the configuration; the glyphs are drawn, not found."""
    if config.data.layout == "glyphs":
        with screen.progress("drawing glyphs") as advance:
            g = config.data.glyphs
            dataset = glyph_dataset(
                train=g.train, val=g.val, test=g.test, images_per_class=g.images_per_class,
                size=config.data.size, seed=config.seed, progress=advance,
            )  # fmt: skip
    else:
        root = find_data(config, data)
        with screen.progress("finding images") as advance:
            dataset = open_dataset(root, layout=config.data.layout, seed=config.seed, progress=advance)
    for note in dataset.notes:
        screen.note(note)
    return Source(dataset, config, screen)


def find_data(config: Config, given: Path | None) -> Path:
    """The folder of the data set, of glyphs none. Raises DataError where none is given and none is in its place."""
    name = config.data.name
    place = given or data_dir(name)
    if config.data.layout == "glyphs":
        return place
    if given is None and not place.exists():
        if name not in KNOWN:
            raise DataError("no data set was given", hint="give a folder of images with --data DIR, or a --preset")
        raise DataError(
            f"data set {name} is not in {place}",
            hint=f"give its folder with --data DIR, or put it there with `metadiff data prepare {name}`",
        )
    check_folder(place)
    return place


@dataclass
class Run:
    """A run directory. Results are in files that depend on the configuration alone; manifest.json has the rest.

    Of several processes the main one writes.
    """

    folder: Path
    command: str
    started: float

    def save_config(self, config: Config) -> None:
        """Write config.yaml: everything that the results depend on and can be given to `--config`."""
        self._write(CONFIG, to_yaml(config))

    def save_metrics(self, rows: list[dict[str, Any]], stage: str) -> None:
        """Write all rows so far to metrics.csv, or to <stage>-metrics.csv for a stage before the run's own."""
        names = list(dict.fromkeys(name for row in rows for name in row))
        lines: list[str] = []
        writer = csv.DictWriter(_Lines(lines), fieldnames=names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        self._write(self._metrics(stage).name, "".join(lines))

    def read_metrics(self, stage: str) -> list[dict[str, str]]:
        """The rows of `save_metrics`, as text; none when the stage did not run here."""
        path = self._metrics(stage)
        if not path.is_file():
            return []
        with path.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    def _metrics(self, stage: str) -> Path:
        return self.folder / ("metrics.csv" if stage == self.command else f"{stage}-metrics.csv")

    def save_manifest(self, **facts: Any) -> None:
        """Write manifest.json: times, paths, host and versions, which stand nowhere else."""
        manifest = {
            "command": self.command,
            "arguments": sys.argv[1:],
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(self.started)),
            "seconds": round(time.time() - self.started, 1),
            "folder": str(self.folder.resolve()),
            "host": platform.node(),
            "platform": platform.platform(),
            "versions": _versions(),
            "processes": world().size,
            **facts,
        }
        self.save_json("manifest.json", manifest)

    def save_json(self, name: str, document: dict[str, Any]) -> None:
        """Write a JSON document into the run directory."""
        self._write(name, json.dumps(document, indent=2, ensure_ascii=False) + "\n")

    def _write(self, name: str, text: str) -> None:
        if world().main:
            write_text(self.folder / name, text)


class _Lines:
    """The part of a file that csv needs, over a list of strings."""

    def __init__(self, lines: list[str]) -> None:
        self.write: Callable[[str], None] = lines.append


@contextmanager
def open_run(out: Path, command: str, config: Config, *, overwrite: bool, resume: bool) -> Iterator[Run]:
    """Make or take the run directory, for this process alone, with the configuration in it.

    Raises ConfigError when it has contents and neither flag is given, or was begun with other settings. An interruption
    or an error of the system within is told with the way to go on.
    """
    if overwrite and resume:
        raise ConfigError("--overwrite and --resume exclude each other", hint="give one of them")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file, not a folder", hint="give another --out")
    with ExitStack() as held:
        on_main(lambda: _take(held, out, config, overwrite=overwrite, resume=resume))
        run = Run(out, command, time.time())
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
                f"{error.strerror or error}{place}; what was saved in {out} before is whole",
                hint="make room or mend the folder, and go on with --resume",
            ) from error
        except RuntimeError as error:
            if lost(error):
                raise process_lost(error, resumable=True) from error
            raise


def _take(held: ExitStack, out: Path, config: Config, *, overwrite: bool, resume: bool) -> None:
    """Check and lock the run directory, and empty it or compare its settings."""
    _check_contents(out, config, overwrite=overwrite, resume=resume)
    held.enter_context(_alone(out))
    sweep(out)
    if overwrite:
        _clear(out)
    elif (out / CONFIG).is_file():
        before = depends(check(read_yaml(out / CONFIG)))
        refuse_changes(before, depends(config), out)


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Keep other processes from the run directory; the system drops the lock of one that was killed."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = FileLock(out / LOCK)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ConfigError(f"another process works in {out}", hint="wait for it, or give another --out") from error
    except OSError as error:
        raise MetaDiffError(
            f"run directory {out} cannot be made ({error.strerror})", hint="give another --out"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _check_contents(out: Path, config: Config, *, overwrite: bool, resume: bool) -> None:
    """A folder with contents needs a flag, and has to look like a run directory.

    A run that failed before it made anything has left nothing but the configuration that it is tried with again.
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


def _clear(folder: Path) -> None:
    for child in folder.iterdir():
        if child.name != LOCK:
            shutil.rmtree(child) if child.is_dir() and not child.is_symlink() else child.unlink()


def encoder_key(config: Config, train: DecodedSplit, val: DecodedSplit | None, init: str | None = None) -> str:
    """Name of the encoder that these settings and these images give, from the weights of the file `init`."""
    settings = {
        "encoder": config.encoder,
        "seed": config.seed,
        "size": config.data.size,
        "pretrain": config.pretrain.model_dump(mode="json"),
        "train": train.key,
        "val": val.key if val else None,
    }
    if init is not None:
        settings["init"] = init
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]


def kept_encoder(key: str) -> Path:
    """Where the encoder of a key is kept for later runs, or will be."""
    path = cache_dir() / "encoders" / f"{key}.safetensors"
    return path if path.is_file() else writable(path.parent) / path.name


def _versions() -> dict[str, str]:
    versions = {"metadiff": __version__, "python": platform.python_version()}
    for name in ("torch", "torchvision", "numpy"):
        if name in sys.modules:
            versions[name] = str(sys.modules[name].__version__)
    return versions
