"""The methods of a results table by name: MetaDiff, the controls, and checkpoint files; and the banks they read."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from metadiff_cli.commands.completions import CONTROLS
from metadiff_cli.commands.runtime import accelerated, sampling_of
from metadiff_cli.config.schema import Config
from metadiff_cli.console import Screen
from metadiff_cli.core.baselines.learners import inner_method
from metadiff_cli.core.checkpoints.baseline import Baseline, load_baseline
from metadiff_cli.core.checkpoints.file import read_header
from metadiff_cli.core.checkpoints.model import Model, checkpoint_errors, load_model
from metadiff_cli.core.distributed import SINGLE, Group
from metadiff_cli.core.encoders.bank import Bank, FeatureBank, PixelBank, build_bank
from metadiff_cli.core.encoders.image_encoder import ImageEncoder
from metadiff_cli.core.evaluation.controls import (
    ANALYTIC,
    Fitted,
    control_method,
    label_propagation_method,
    read_fitted,
    soft_kmeans_method,
)
from metadiff_cli.core.evaluation.controls import CONTROLS as OF_FEATURES
from metadiff_cli.core.evaluation.episodes import Episodes
from metadiff_cli.core.evaluation.evaluate import Method, Protocol, expanded, method_of
from metadiff_cli.core.method.adapt import MetaDiff, Sampling, Tuning
from metadiff_cli.core.method.calibration import TaskTable
from metadiff_cli.core.method.denoisers import build_denoiser, randomise
from metadiff_cli.core.method.metric import Metric
from metadiff_cli.data.open import Source
from metadiff_cli.errors import ConfigError, DataError
from metadiff_cli.files import cache_dir

FILE = ".safetensors"  # the end of a control that is a checkpoint file
POSTERIOR = Sampling(steps=100, samples=16, temperature=1.0)  # the probabilities of 16 sampled classifiers, averaged
DENOISING = ("untrained", "posterior")  # controls that differ from MetaDiff in the denoising alone
AT_ONCE = 8  # tasks whose images are fetched together, as they may be pixels


@dataclass(frozen=True)
class Entry:
    """A method of a results table.

    `calibrated` says whether the temperature of its confidences was fitted. `statistics` names the images that the
    BatchNorm of a baseline takes its statistics from: "queries" if it sees all queries of a task together, so that it
    is not inductive.
    """

    run: Method
    calibrated: bool = False
    statistics: str | None = None


def feature_bank(
    images: ImageEncoder, source: Source, split: str, config: Config, screen: Screen, group: Group = SINGLE
) -> FeatureBank:
    """The features of a split, from the cache if they are there; a `group` shares the work."""
    decoded = source.split(split, images.size)
    with screen.progress(f"features of {split} images") as advance:
        return build_bank(
            accelerated(images, config, len(decoded.labels), screen), decoded.images, decoded.labels, decoded.classes,
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
) -> dict[str, Entry]:  # fmt: skip
    """MetaDiff and those of the controls that are not files, by name.

    Raises ConfigError for a control of the denoiser where nothing is denoised, CheckpointError if the settings of the
    controls in the model's header are damaged.
    """
    metadiff, metric = model.metadiff, model.metadiff.metric
    if metric.space is None and (idle := [name for name in controls if name in DENOISING]):
        raise ConfigError(
            f"the control {idle[0]} needs a task space, and this checkpoint has none: nothing is denoised",
            hint="leave it out of --controls",
        )
    with checkpoint_errors("the checkpoint"):
        fitted = read_fitted(model.header)
        without, known = _without_descent(metadiff, fitted)
    ours = partial(method_of, bank=bank, device=device, x=expanded(metric, bank, device))
    tuned = is_calibrated(metadiff)
    makers: dict[str, Callable[[], Entry]] = {
        **{name: partial(_control, name, metric, fitted) for name in OF_FEATURES},
        ANALYTIC: lambda: Entry(ours(without, sampling=sampling, protocol=protocol), known),
        "untrained": lambda: Entry(
            ours(_untrained(model, protocol.seed, device), sampling=sampling, protocol=protocol)
        ),
        "posterior": lambda: Entry(
            ours(metadiff, sampling=replace(POSTERIOR, guidance=sampling.guidance), protocol=protocol), tuned
        ),
        "inductive": lambda: Entry(
            ours(metadiff, sampling=sampling, protocol=replace(protocol, transductive=False)), tuned
        ),
        "soft-kmeans": lambda: Entry(soft_kmeans_method(metric, fitted)),
        "label-propagation": lambda: Entry(label_propagation_method(metric, fitted)),
    }
    own = Entry(ours(metadiff, sampling=sampling, protocol=protocol), tuned)
    return {"metadiff": own, **{name: makers[name]() for name in controls if name in makers}}


def is_calibrated(metadiff: MetaDiff) -> bool:
    """Whether the temperature of its confidences was fitted on classes."""
    return metadiff.tuning.temperature != Tuning().temperature


def _control(name: str, metric: Metric, fitted: Fitted) -> Entry:
    return Entry(control_method(name, metric, fitted), bool(fitted.get(name)))


def _without_descent(metadiff: MetaDiff, fitted: Fitted) -> tuple[MetaDiff, bool]:
    """The control `analytic`, and whether its own temperatures were fitted; else it has those of the tuning."""
    found = {(s.way, s.shot): s.temperature for s in fitted.get(ANALYTIC, ())}
    table = TaskTable.of(found) if found else metadiff.tuning.temperature
    return metadiff.without_descent(table), bool(found)


def _untrained(model: Model, seed: int, device: torch.device) -> MetaDiff:
    """MetaDiff with a denoiser of the configured kind in which every layer is random, the last one included."""
    settings, space = model.header["config"]["denoiser"], model.metadiff.metric.space
    kind = settings["kind"] if settings["kind"] != "analytic" else "unet"
    denoiser = randomise(build_denoiser(kind, model.images.feature_size, settings["width"], space), seed)
    return replace(model.metadiff, denoiser=denoiser.to(device), learned=True, most_shots=None)


def further(
    controls: Sequence[str], taken: str, config: Config, source: Source, split: str, labels: np.ndarray,
    protocol: Protocol, device: torch.device, screen: Screen,
) -> dict[str, Entry]:  # fmt: skip
    """The controls that are checkpoint files. The model at hand is called `taken`.

    A file's method reads its own features or pixels of the same images, whose `labels` must be those of the bank at
    hand; else it raises DataError. A MetaDiff model appears as `metadiff-<denoiser>`.
    """
    entries: dict[str, Entry] = {}
    for path in (Path(control) for control in controls if control.endswith(FILE)):
        name, bank, entry = _from_file(path, config, source, split, protocol, device, screen)
        if not (len(bank.labels) == len(labels) and (bank.labels == labels).all()):
            raise DataError(f"{path} sees other images of this data set", hint="evaluate it by itself")
        entries[unused(name, {taken, *entries})] = entry
    return entries


def statistics_of(method: Baseline) -> str | None:
    """The images that BatchNorm takes its statistics from: with a baseline on images, all queries of a task."""
    return "queries" if method.base is None else None


def _from_file(
    path: Path, config: Config, source: Source, split: str, protocol: Protocol, device: torch.device, screen: Screen
) -> tuple[str, Bank, Entry]:
    """Name, bank in its own form, and method of a checkpoint file."""
    if read_header(path)["kind"] != "baseline":
        model = load_model(path, device)
        features = feature_bank(model.images, source, split, config, screen)
        method = method_of(model.metadiff, features, sampling_of(config), protocol, device)
        name = f"metadiff-{model.header['denoiser']['kind']}"
        return name, features, Entry(method, is_calibrated(model.metadiff))
    trained = load_baseline(path, device)
    if trained.base is None:
        bank: Bank = pixel_bank(source, split, trained.images.size)
    else:
        bank = feature_bank(trained.images, source, split, config, screen)
    method = _reading(bank, inner_method(trained.inner, protocol.way), device)
    return trained.name, bank, Entry(method, statistics=statistics_of(trained))


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


def unused(name: str, taken: set[str]) -> str:
    """The name, with a number if it is taken."""
    numbered = (f"{name}-{i}" for i in range(2, len(taken) + 3))
    return next(candidate for candidate in (name, *numbered) if candidate not in taken)
