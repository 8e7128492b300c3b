"""Gradient-based baselines: `metatrain --method NAME`, their checkpoints in `evaluate`, and the fitted controls."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metadiff_cli.commands.evaluate.measure import feature_bank, methods_of, result_document, sampling_of
from metadiff_cli.commands.train.resume import Update, follow, show_step
from metadiff_cli.commands.train.run_folder import CHECKPOINT, STATE
from metadiff_cli.commands.train.stages import analytic_parts
from metadiff_cli.commands.train.training import Training
from metadiff_cli.config.schema import Config
from metadiff_cli.console import Screen
from metadiff_cli.core.baselines.learners import (
    ON_FEATURES,
    FrozenLearner,
    InnerLearner,
    build_image_learner,
    inner_method,
)
from metadiff_cli.core.baselines.train import InnerStep, InnerTrainer, InnerValidation
from metadiff_cli.core.checkpoints.baseline import Baseline, load_baseline, save_baseline
from metadiff_cli.core.checkpoints.file import read_header
from metadiff_cli.core.checkpoints.model import Model, load_model
from metadiff_cli.core.encoders.bank import FeatureBank, ImageEncoder
from metadiff_cli.core.encoders.networks import build_encoder
from metadiff_cli.core.evaluation.controls import logreg_method, ridge_method
from metadiff_cli.core.evaluation.episodes import Episodes
from metadiff_cli.core.evaluation.evaluate import Method, Protocol, evaluate, mean_interval, method_of, run_through
from metadiff_cli.core.training.transforms import Augmentation
from metadiff_cli.data.cache import channel_statistics
from metadiff_cli.data.open import Source
from metadiff_cli.errors import DataError

FILE = ".safetensors"
METRICS = ("methods", "split", "way", "shot", "query", "episodes", "seed")  # of the table, in the header
FITTED: dict[str, Callable[[], Method]] = {"logreg": logreg_method, "ridge": ridge_method}  # controls fitted to a task
AT_ONCE = 8  # tasks whose images are fetched together, as they may be pixels


def train_baseline(t: Training, name: str) -> dict[str, Any]:
    """All stages of a baseline, down to its checkpoint; returns the result document."""
    frozen = name in ON_FEATURES
    method, base, val = (_on_features if frozen else _on_images)(t, name)
    split = "test" if t.source.has("test") else "val" if val is not None else "train"
    if frozen:
        t.features(method.images, split)  # all processes make the features, one measures
    method = _train(t, method, base, val)
    e = t.config.evaluation
    protocol = Protocol(e.way, e.shot, e.query, e.episodes, t.config.seed)
    controls = ("prototype", "analytic", "logreg", "ridge") if frozen else ()

    def measure_and_save() -> dict[str, Any]:
        result = measure_method(method, controls, t.config, t.source, split, protocol, t.screen)
        save_baseline(t.run.folder / CHECKPOINT, method, {key: result[key] for key in METRICS})
        return result

    return t.group.on_rank_zero(measure_and_save)


def measure_method(
    method: Baseline,
    controls: Sequence[str],
    config: Config,
    source: Source,
    split: str,
    protocol: Protocol,
    screen: Screen,
    more: Mapping[str, Method] | None = None,
) -> dict[str, Any]:
    """The `evaluate --json` document of a baseline, its controls and `more` methods.

    A baseline on images has no model that controls could be made of.
    """
    device = method.images.device
    methods = {method.name: inner_method(method.inner, protocol.way)}
    if method.base is not None:
        bank = feature_bank(method.images, source, split, config, screen)
        model = Model(method.images, method.base, method.header)
        of_model = methods_of(model, bank, controls, sampling_of(config), protocol, device)
        methods |= {control: of_model[control] for control in controls if control in of_model}
        methods |= _fitted(controls)
    else:
        bank = pixel_bank(source, split, method.images.size)
        if left := [control for control in controls if not control.endswith(FILE)]:
            screen.note(
                f"{', '.join(left)} need the features of a frozen encoder and are left out: to see them beside "
                f"{method.name}, give a MetaDiff checkpoint with --checkpoint and this one among --controls"
            )
    methods |= more or {}
    document = result_document(
        lambda progress: run_through(evaluate(bank, methods, protocol, device), progress), bank, split, protocol, screen
    )
    return mark(document, {method.name: _statistics(method)})


def further(
    controls: Sequence[str],
    taken: str,
    config: Config,
    source: Source,
    split: str,
    labels: Any,
    protocol: Protocol,
    device: torch.device,
    screen: Screen,
) -> tuple[dict[str, Method], dict[str, str | None]]:
    """The controls that are not made of the model at hand, which is called `taken`, and their BatchNorm statistics.

    They are those fitted to each task, and checkpoint files. A file's method reads its own features or pixels of the
    same images, whose `labels` must be those of the bank at hand. A MetaDiff model appears as `metadiff-<denoiser>`.
    """
    methods, statistics = _fitted(controls), {}
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


def pixel_bank(source: Source, split: str, size: int) -> FeatureBank:
    """The images themselves in the place of features: (n, S * S * 3) uint8, memory-mapped."""
    decoded = source.split(split, size)
    return FeatureBank(decoded.images.reshape(len(decoded.images), -1), decoded.labels, decoded.classes)


def _from_file(
    path: Path, config: Config, source: Source, split: str, protocol: Protocol, device: torch.device, screen: Screen
) -> tuple[str, Method, FeatureBank, str | None]:
    """Name, method, images in its own form, and BatchNorm statistics of a checkpoint file."""
    if read_header(path)["kind"] != "baseline":
        model = load_model(path, device)
        bank = feature_bank(model.images, source, split, config, screen)
        name = f"metadiff-{model.header['denoiser']['kind']}"
        return name, method_of(model.metadiff, sampling_of(config), protocol), bank, None
    trained = load_baseline(path, device)
    if trained.base is None:
        bank = pixel_bank(source, split, trained.images.size)
    else:
        bank = feature_bank(trained.images, source, split, config, screen)
    return trained.name, inner_method(trained.inner, protocol.way), bank, _statistics(trained)


def _statistics(method: Baseline) -> str | None:
    """Which images BatchNorm takes its statistics of: with a baseline on images all queries of a task."""
    return "queries" if method.base is None else None


def _fitted(controls: Sequence[str]) -> dict[str, Method]:
    return {name: FITTED[name]() for name in FITTED if name in controls}


def _reading(bank: FeatureBank, method: Method, device: torch.device) -> Method:
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
    """The name, or where it is taken the name with a number."""
    numbered = (f"{name}-{i}" for i in range(2, len(taken) + 3))
    return next(candidate for candidate in (name, *numbered) if candidate not in taken)


def _on_features(t: Training, name: str) -> tuple[Baseline, FeatureBank, FeatureBank | None]:
    """An untrained baseline over the features of the run's encoder, with base and validation classes."""
    images, base, val, analytic = analytic_parts(t)
    inner = FrozenLearner(name, t.config.evaluation.way, analytic.space.mean, t.config.baselines.frozen)
    return Baseline(name, images, inner, analytic, _header(name, t.config, base)), base, val


def _on_images(t: Training, name: str) -> tuple[Baseline, FeatureBank, FeatureBank | None]:
    """An untrained baseline over images, with base and validation classes; its encoder starts at random."""
    config, size = t.config, t.config.data.size
    mean, std = channel_statistics(t.source.split("train").images)
    shape = (size, tuple(mean), tuple(std))
    base = pixel_bank(t.source, "train", size)
    val = pixel_bank(t.source, "val", size) if t.source.has("val") else None
    inner = build_image_learner(
        name, config.evaluation.way, partial(build_encoder, config.encoder), *shape, config.baselines.images,
        config.seed,
    )  # fmt: skip
    images = ImageEncoder(inner.backbone, config.encoder, *shape, False, t.device)
    return Baseline(name, images, inner, None, _header(name, config, base)), base, val


def _header(name: str, config: Config, base: FeatureBank) -> dict[str, Any]:
    settings = config.baselines.frozen if name in ON_FEATURES else config.baselines.images
    facts = {"way": config.evaluation.way, "shot": config.evaluation.shot, "settings": settings.model_dump(mode="json")}
    return {
        "config": config.model_dump(mode="json", exclude={"runtime"}),
        "classes": list(base.classes),
        "baseline": {"name": name, **facts},
    }


def _train(t: Training, method: Baseline, base: FeatureBank, val: FeatureBank | None) -> Baseline:
    """The method with its learner trained; selected by accuracy on validation classes where there are some."""
    config, on_images = t.config, method.base is None
    b = config.baselines.images
    trainer = InnerTrainer(
        method.inner, base, b if on_images else config.baselines.frozen, shot=config.evaluation.shot, seed=config.seed,
        device=method.images.device, cosine=on_images and b.schedule == "cosine",
        quarters=4 if on_images and b.rotated_classes else 1,
        augmentation=Augmentation(**config.pretrain.augment.model_dump()) if on_images and b.augment else None,
        group=t.group,
    )  # fmt: skip
    if val is None:
        t.screen.warn("no validation classes: the last parameters are kept, and nothing is selected")
    follow(
        trainer, partial(_validate, t, val), partial(_show, t, trainer), label=f"training {method.name}", run=t.run,
        state=STATE, identity=t.identity(method.name, None if on_images else method.images), screen=t.screen,
    )  # fmt: skip
    return replace(method, inner=trainer.chosen())


def _validate(t: Training, val: FeatureBank | None, learner: InnerLearner) -> tuple[float, float] | None:
    """Accuracy on validation episodes in percent, and its interval."""
    if val is None:
        return None
    e, b = t.config.evaluation, t.config.baselines
    episodes = (b.frozen if isinstance(learner, FrozenLearner) else b.images).validation_episodes
    protocol = Protocol(e.way, e.shot, e.query, episodes, t.config.seed + 1)
    methods = {"learner": inner_method(learner, e.way)}

    def measure() -> tuple[float, float]:
        scores = run_through(evaluate(val, methods, protocol, t.device))
        return mean_interval(100 * torch.cat(scores["learner"].accuracy))

    return t.group.on_rank_zero(measure)


def _show(t: Training, trainer: InnerTrainer, record: InnerStep | InnerValidation, update: Update) -> bool:
    measured = ""
    if isinstance(record, InnerValidation) and record.validation is not None:
        measured = f"  validation {record.validation:.2f} ± {record.ci95:.2f}"
    return show_step(t.run, trainer, t.screen, record, update, measured)
