"""What a person asked for when they typed `metadiff pretrain` or `metadiff metatrain`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Data:
    """The folders of --data and --val-data. Without any, the data set is in its usual place."""

    base: Sequence[Path] = ()
    validation: Sequence[Path] = ()

    @property
    def first(self) -> Path | None:
        """The first folder with base classes."""
        return self.base[0] if self.base else None


@dataclass(frozen=True)
class Request:
    """The options of both commands, and those of `metatrain` alone with what they are where they are not given."""

    preset: str | None
    config: Path | None
    settings: Sequence[str]
    flags: Mapping[str, object]  # options that are configuration keys; None where one is not given
    data: Data
    out: Path | None
    overwrite: bool
    resume: bool
    init_from: Path | None
    dry_run: bool
    as_json: bool
    quiet: bool
    verbose: bool
    encoder: str | None = None
    encoder_weights: Path | None = None
    method: str = "metadiff"
    report: Path | None = None
