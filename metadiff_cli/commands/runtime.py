"""From a checked configuration to what runs it: a device, an encoder, the sampler."""

from dataclasses import replace

import torch

from metadiff_cli.config.schema import Config
from metadiff_cli.console import Screen
from metadiff_cli.core.device import keep_freed_memory, pick_device, set_threads
from metadiff_cli.core.distributed import SINGLE, Group
from metadiff_cli.core.encoders.graphs import Graphs, missing_packages
from metadiff_cli.core.encoders.image_encoder import ImageEncoder
from metadiff_cli.core.method.adapt import Sampling
from metadiff_cli.files import cache_dir, writable


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
