"""What the commands share between options and core: the screen's progress, data, run directories, encoders."""

import csv
import hashlib
import json
import platform
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from metadiff_cli import __version__
from metadiff_cli.config import Config, to_yaml
from metadiff_cli.console import Screen
from metadiff_cli.data.cache import DecodedSplit, decode_split
from metadiff_cli.data.folders import Dataset, Split, open_dataset, require_split
from metadiff_cli.data.glyphs import glyph_dataset
from metadiff_cli.errors import ConfigError, MetaDiffError
from metadiff_cli.paths import cache_dir, data_dir, write_text

BROKEN_SHOWN = 5  # broken images that are named; the others are counted
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
        with self.screen.progress(f"reading {split.name} images") as advance:
            decoded = decode_split(
                split, size, cache_dir() / "images", workers=self.config.runtime.num_workers, progress=advance
            )
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
        root = data or data_dir(config.data.name)
        with screen.progress("finding images") as advance:
            dataset = open_dataset(root, layout=config.data.layout, seed=config.seed, progress=advance)
    for note in dataset.notes:
        screen.note(note)
    return Source(dataset, config, screen)


@dataclass
class Run:
    """A run directory. Results are in files that depend on the configuration alone; manifest.json has the rest."""

    folder: Path
    command: str
    started: float

    def save_config(self, config: Config) -> None:
        """Write config.yaml: everything that the results depend on and can be given to `--config`."""
        write_text(self.folder / "config.yaml", to_yaml(config))

    def save_metrics(self, rows: list[dict[str, Any]], stage: str) -> None:
        """Write all rows so far to metrics.csv, or to <stage>-metrics.csv for a stage before the run's own."""
        names = list(dict.fromkeys(name for row in rows for name in row))
        lines: list[str] = []
        writer = csv.DictWriter(_Lines(lines), fieldnames=names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(self._metrics(stage), "".join(lines))

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
            **facts,
        }
        write_text(self.folder / "manifest.json", json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")

    def save_json(self, name: str, document: dict[str, Any]) -> None:
        """Write a JSON document into the run directory."""
        write_text(self.folder / name, json.dumps(document, indent=2, ensure_ascii=False) + "\n")


class _Lines:
    """The part of a file that csv needs, over a list of strings."""

    def __init__(self, lines: list[str]) -> None:
        self.write: Callable[[str], None] = lines.append


def open_run(out: Path, command: str, *, overwrite: bool, resume: bool) -> Run:
    """Make or take the run directory. Raises ConfigError when it has contents and neither flag is given."""
    if overwrite and resume:
        raise ConfigError("--overwrite and --resume exclude each other", hint="give one of them")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file, not a folder", hint="give another --out")
    if out.is_dir() and any(out.iterdir()) and not resume:
        if not overwrite:
            raise ConfigError(
                f"run directory {out} is not empty", hint="add --resume or --overwrite, or give another --out"
            )
        _clear(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MetaDiffError(
            f"run directory {out} cannot be made ({error.strerror})", hint="give another --out"
        ) from error
    return Run(out, command, time.time())


def _clear(folder: Path) -> None:
    """Empty a run directory, but never a folder that does not look like one."""
    if not (folder / "config.yaml").is_file():
        raise ConfigError(
            f"{folder} does not look like a run directory", hint="empty it yourself or give another --out"
        )
    for child in folder.iterdir():
        shutil.rmtree(child) if child.is_dir() and not child.is_symlink() else child.unlink()


def encoder_key(config: Config, train: DecodedSplit, val: DecodedSplit | None) -> str:
    """Name of the encoder that these settings and these images give."""
    settings = {
        "encoder": config.encoder,
        "seed": config.seed,
        "size": config.data.size,
        "pretrain": config.pretrain.model_dump(mode="json"),
        "train": train.key,
        "val": val.key if val else None,
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]


def kept_encoder(key: str) -> Path:
    """Where the encoder of a key is kept for later runs."""
    return cache_dir() / "encoders" / f"{key}.safetensors"


def _versions() -> dict[str, str]:
    versions = {"metadiff": __version__, "python": platform.python_version()}
    for name in ("torch", "torchvision", "numpy"):
        if name in sys.modules:
            versions[name] = str(sys.modules[name].__version__)
    return versions
