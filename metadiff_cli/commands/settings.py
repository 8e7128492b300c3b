"""From the shared options to what commands work with: a checked configuration, checked places. No torch here."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from metadiff_cli.commands.completions import SPLITS
from metadiff_cli.config.load import flat, layers, resolve
from metadiff_cli.config.schema import Config
from metadiff_cli.errors import ConfigError

USED = ("seed", "sampler", "runtime")  # keys and sections that matter for a finished model


def model_config(
    file: Path | None,
    settings: Sequence[str] | None,
    *flags: Mapping[str, object],
    used: Sequence[str] = USED,
    note: Callable[[str], None] = lambda text: None,
) -> Config:
    """Configuration of a command that works with a finished model, and reads only the keys and sections `used`.

    All other keys belong to training. Raises ConfigError when one of them comes from `--set`. A file may be that of the
    run, and variables may be meant for the training: their keys are ignored with one `note`.
    """
    merged = {key: value for part in flags for key, value in part.items()}
    config = resolve(None, file, settings or (), merged)
    if config.sampler.samples > 1 and config.sampler.temperature == 0:
        raise ConfigError(
            f"{config.sampler.samples} samples have no effect at temperature 0, where all are the same",
            hint="add --temperature 1, or leave out --samples",
        )
    ignored = []
    for origin, layer in layers(None, file, settings or ()):
        unused = [key for key in flat(layer) if not any(f"{key}.".startswith(f"{name}.") for name in used)]
        if unused and origin == "--set":
            raise ConfigError(
                f"--set {unused[0]} has no effect here: the model comes with its own settings",
                hint=f"these can be set: {', '.join(used)}",
            )
        if unused:
            ignored.append(origin if origin.startswith("$") else f"{len(unused)} keys of {origin}")
    if ignored:
        note(f"settings of training are ignored, as the model comes with its own: {', '.join(ignored)}")
    return config


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
