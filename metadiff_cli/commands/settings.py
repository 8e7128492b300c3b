"""From the shared options to what commands work with: a checked configuration, a device, checked places."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from metadiff_cli.commands.completions import SPLITS
from metadiff_cli.config.load import resolve
from metadiff_cli.config.schema import Config
from metadiff_cli.core.device import keep_freed_memory, pick_device, set_threads
from metadiff_cli.errors import ConfigError


def model_config(file: Path | None, settings: Sequence[str] | None, *flags: Mapping[str, object]) -> Config:
    """Configuration of a command that works with a finished model. Raises ConfigError."""
    return resolve(None, file, settings or (), {key: value for part in flags for key, value in part.items()})


def start(config: Config) -> torch.device:
    """Set threads and memory as configured, and pick the device. Raises ConfigError when there is no such device."""
    keep_freed_memory()
    set_threads(config.runtime.threads)
    return pick_device(config.runtime.device)


def check_split(name: str) -> None:
    """Raise ConfigError for an unknown split."""
    if name not in SPLITS:
        raise ConfigError(f"unknown split '{name}'", hint=f"choose one of {', '.join(SPLITS)}")


def check_new(file: Path, *, overwrite: bool) -> None:
    """Raise ConfigError when `file` cannot be written, is a folder, or exists and may not be overwritten."""
    place = next((parent for parent in file.absolute().parents if parent.exists()), file)
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise ConfigError(
            f"{file} cannot be written: {place} is not a folder that you may write to", hint="give another place"
        )
    if file.is_dir() or (file.exists() and not overwrite):
        raise ConfigError(f"{file} exists already", hint="add --overwrite or give another name")
