"""From the shared options to what commands work with: a checked configuration, a device, checked places."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from metadiff_cli.commands.completions import SPLITS
from metadiff_cli.config.load import flat, layers, resolve
from metadiff_cli.config.schema import Config
from metadiff_cli.console import Screen
from metadiff_cli.core.device import keep_freed_memory, pick_device, set_threads
from metadiff_cli.core.distributed import SINGLE, Group
from metadiff_cli.core.encoders.graphs import Graphs, missing_packages
from metadiff_cli.core.encoders.image_encoder import ImageEncoder
from metadiff_cli.core.method.adapt import Sampling
from metadiff_cli.errors import ConfigError
from metadiff_cli.files import cache_dir, writable

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


def start(config: Config, group: Group = SINGLE) -> torch.device:
    """Set threads and memory as configured, and pick the device. Raises ConfigError when there is no such device.

    Each process of a `group` gets a GPU of its own.
    """
    keep_freed_memory()
    set_threads(config.runtime.threads)
    return pick_device(config.runtime.device, group)


MANY = 2000  # views of images from which on making a graph pays


def accelerated(images: ImageEncoder, config: Config, count: int, screen: Screen) -> ImageEncoder:
    """The encoder for `count` images, run by onnxruntime where that is asked for, or possible and faster.

    Raises ConfigError if a package is missing that was asked for.
    """
    asked = config.runtime.backend == "onnxruntime"
    if config.runtime.backend == "torch" or images.device.type != "cpu" or (missing_packages() and not asked):
        return images
    graphs = Graphs(images.encoder, writable(cache_dir() / "graphs"), screen.note, required=asked)
    pays = asked or count * images.views > MANY or graphs.made(images.sides)
    return replace(images, graphs=graphs) if pays else images


def sampling_of(config: Config) -> Sampling:
    """The sampler's settings as the core takes them."""
    s = config.sampler
    return Sampling(s.steps, s.samples, s.temperature, None if s.guidance == "auto" else s.guidance, s.method)


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
