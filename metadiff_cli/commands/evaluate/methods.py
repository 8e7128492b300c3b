"""The methods of a results table by name: MetaDiff, the controls, and checkpoint files; and the banks they read."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metadiff_cli.commands.completions import CONTROLS
from metadiff_cli.commands.settings import sampling_of
from metadiff_cli.config.schema import Config
from metadiff_cli.console import Screen
from metadiff_cli.core.baselines.learners import inner_method
from metadiff_cli.core.checkpoints.baseline import Baseline, load_baseline
from metadiff_cli.core.checkpoints.file import read_header
from metadiff_cli.core.checkpoints.model import Model, load_model
from metadiff_cli.core.encoders.bank import Bank, FeatureBank, PixelBank, build_bank
from metadiff_cli.core.encoders.image_encoder import ImageEncoder
from metadiff_cli.core.evaluation.controls import (
    label_propagation_method,
    logreg_method,
    prototype_method,
    ridge_method,
    soft_kmeans_method,
)
from metadiff_cli.core.evaluation.episodes import Episodes
from metadiff_cli.core.evaluation.evaluate import Method, Protocol, lengths_for, method_of
from metadiff_cli.core.method.adapt import MetaDiff, Sampling
from metadiff_cli.core.method.denoisers import build_denoiser, randomise
from metadiff_cli.core.training.distributed import SINGLE, Group
from metadiff_cli.data.open import Source
from metadiff_cli.errors import ConfigError, DataError
from metadiff_cli.files import cache_dir

FILE = ".safetensors"  # the end of a control that is a checkpoint file
POSTERIOR = Sampling(steps=100, samples=16, temperature=1.0)  # the probabilities of 16 sampled classifiers, averaged
FITTED: dict[str, Callable[[], Method]] = {"logreg": logreg_method, "ridge": ridge_method}  # controls fitted to a task
AT_ONCE = 8  # tasks whose images are fetched together, as they may be pixels


def feature_bank(
    images: ImageEncoder, source: Source, split: str, config: Config, screen: Screen, group: Group = SINGLE
) -> FeatureBank:
    """The features of a split, from the cache if they are there; a `group` shares the work."""
    decoded = source.split(split, images.size)
    with screen.progress(f"features of {split} images") as advance:
        return build_bank(
            images, decoded.images, decoded.labels, decoded.classes,
            folder=cache_dir() / "features", key=decoded.key, batch=config.runtime.batch_size,
            progress=advance, note=screen.note, group=group,
        )  # fmt: skip


def pixel_bank(source: Source, split: str, size: int) -> PixelBank:
    """The pixels of a split at `size` pixels, memory-mapped."""
    decoded = source.split(split, size)
    return PixelBank(decoded.images, decoded.labels, decoded.classes)


def parse_controls(text: str) -> list[str]:
    """Names of controls and checkpoint files from a comma-separated list. Raises ConfigError for an unknown name."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in CONTROLS and not name.endswith(FILE):
            known = ", ".join(CONTROLS)
            raise ConfigError(f"unknown control '{name}'", hint=f"choose from {known}, or give a {FILE} file")
    return names


def methods_of(
    model: Model, bank: FeatureBank, controls: Sequence[str], sampling: Sampling, protocol: Protocol,
    device: torch.device,
) -> dict[str, Method]:  # fmt: skip
    """MetaDiff and those of the controls that are made from its model, by name."""
    metadiff = model.metadiff
    ours = partial(method_of, lengths=lengths_for(metadiff.space, bank, protocol, device))
    makers: dict[str, Callable[[], Method]] = {
        "prototype": lambda: prototype_method(metadiff),
        "analytic": lambda: ours(metadiff.analytic(), sampling, protocol),
        "untrained": lambda: ours(_untrained(model, protocol.seed, device), sampling, protocol),
        "posterior": lambda: ours(metadiff, replace(POSTERIOR, guidance=sampling.guidance), protocol),
        "inductive": lambda: ours(metadiff, sampling, replace(protocol, transductive=False)),
        "soft-kmeans": lambda: soft_kmeans_method(metadiff),
        "label-propagation": lambda: label_propagation_method(metadiff),
    }
    named = [name for name in controls if name in makers]
    return {"metadiff": ours(metadiff, sampling, protocol), **{name: makers[name]() for name in named}}


def _untrained(model: Model, seed: int, device: torch.device) -> MetaDiff:
    """MetaDiff with a denoiser of the configured kind in which every layer is random, the last one included."""
    settings = model.header["config"]["denoiser"]
    kind = settings["kind"] if settings["kind"] != "analytic" else "unet"
    denoiser = build_denoiser(kind, model.images.feature_size, settings["width"])
    return MetaDiff(model.metadiff.space, randomise(denoiser, seed).to(device), True, model.metadiff.tuning)


def fitted_controls(controls: Sequence[str]) -> dict[str, Method]:
    """Those of the controls that are fitted to the support of each task and need no model."""
    return {name: FITTED[name]() for name in FITTED if name in controls}


def further(
    controls: Sequence[str],
    taken: str,
    config: Config,
    source: Source,
    split: str,
    labels: np.ndarray,
    protocol: Protocol,
    device: torch.device,
    screen: Screen,
) -> tuple[dict[str, Method], dict[str, str | None]]:
    """The controls that are not made from the model at hand, which is called `taken`, and their BatchNorm statistics.

    They are those fitted to each task, and checkpoint files. The method of a file reads its own features or pixels of
    the same images, whose `labels` must be those of the bank at hand; else it raises DataError. A MetaDiff model
    appears as `metadiff-<denoiser>`.
    """
    methods, statistics = fitted_controls(controls), {}
    for path in (Path(control) for control in controls if control.endswith(FILE)):
        name, method, bank, kind = _from_file(path, config, source, split, protocol, device, screen)
        if not (len(bank.labels) == len(labels) and (bank.labels == labels).all()):
            raise DataError(f"{path} sees other images of this data set", hint="evaluate it by itself")
        name = _unused(name, {taken, *methods})
        methods[name], statistics[name] = _reading(bank, method, device), kind
    return methods, statistics


def mark(document: dict[str, Any], statistics: Mapping[str, str | None]) -> dict[str, Any]:
    """Note for each baseline if its BatchNorm sees all queries of a task together: then it is not inductive."""
    for name, kind in statistics.items():
        if kind is not None:
            document["methods"][name]["statistics"] = kind
    return document


def statistics_of(method: Baseline) -> str | None:
    """The images that BatchNorm takes its statistics from: with a baseline on images, all queries of a task."""
    return "queries" if method.base is None else None


def _from_file(
    path: Path, config: Config, source: Source, split: str, protocol: Protocol, device: torch.device, screen: Screen
) -> tuple[str, Method, Bank, str | None]:
    """Name, method, bank in its own form, and BatchNorm statistics of a checkpoint file."""
    if read_header(path)["kind"] != "baseline":
        model = load_model(path, device)
        bank: Bank = feature_bank(model.images, source, split, config, screen)
        name = f"metadiff-{model.header['denoiser']['kind']}"
        return name, method_of(model.metadiff, sampling_of(config), protocol), bank, None
    trained = load_baseline(path, device)
    if trained.base is None:
        bank = pixel_bank(source, split, trained.images.size)
    else:
        bank = feature_bank(trained.images, source, split, config, screen)
    return trained.name, inner_method(trained.inner, protocol.way), bank, statistics_of(trained)


def _reading(bank: Bank, method: Method, device: torch.device) -> Method:
    """A method that takes the episodes' images from a bank of its own, a few tasks at a time."""

    def run(support: Tensor, query: Tensor, episodes: Episodes, first: int) -> Tensor:
        parts = []
        for i in range(0, len(episodes.labels), AT_ONCE):
            part = episodes.part(slice(i, i + AT_ONCE))
            own, queries = (bank.take(rows).to(device) for rows in (part.support, part.query))
            parts.append(method(own, queries, part, first + i))
        return torch.cat(parts)

    return run


def _unused(name: str, taken: set[str]) -> str:
    """The name, with a number if it is taken."""
    numbered = (f"{name}-{i}" for i in range(2, len(taken) + 3))
    return next(candidate for candidate in (name, *numbered) if candidate not in taken)
