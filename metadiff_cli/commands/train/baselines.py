"""Gradient-based baselines: the stages of `metatrain --method NAME`."""

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from metadiff_cli.commands.evaluate.measure import measure_baseline
from metadiff_cli.commands.evaluate.methods import pixel_bank
from metadiff_cli.commands.train.few_images import measured_split
from metadiff_cli.commands.train.resume import Update, follow, show_step
from metadiff_cli.commands.train.run_folder import CHECKPOINT, STATE
from metadiff_cli.commands.train.stages import analytic_parts, described
from metadiff_cli.commands.train.training import Training
from metadiff_cli.config.schema import Config
from metadiff_cli.core.baselines.learners import (
    ON_FEATURES,
    FrozenLearner,
    InnerLearner,
    build_image_learner,
    inner_method,
)
from metadiff_cli.core.baselines.train import InnerStep, InnerTrainer, InnerValidation
from metadiff_cli.core.checkpoints.baseline import Baseline, save_baseline
from metadiff_cli.core.encoders.bank import Bank
from metadiff_cli.core.encoders.image_encoder import ImageEncoder
from metadiff_cli.core.encoders.networks import build_encoder
from metadiff_cli.core.evaluation.evaluate import Protocol, evaluate, mean_interval, run_through
from metadiff_cli.core.training.transforms import Augmentation
from metadiff_cli.data.cache import channel_statistics

METRICS = ("methods", "split", "way", "shot", "query", "episodes", "seed")  # of the table, in the header


def train_baseline(t: Training, name: str) -> dict[str, Any]:
    """All stages of a baseline, down to its checkpoint; returns the result document."""
    frozen = name in ON_FEATURES
    method, base, val = (_on_features if frozen else _on_images)(t, name)
    split = measured_split(t.source.dataset.splits)
    if frozen:
        t.features(method.images, split)  # all processes make the features, one measures
    method = _train(t, method, base, val)
    e = t.config.evaluation
    protocol = Protocol(e.way, e.shot, e.query, e.episodes, t.config.seed)
    controls = ("prototype", "analytic", "logreg", "ridge") if frozen else ()

    def measure_and_save() -> dict[str, Any]:
        result = measure_baseline(method, controls, t.config, t.source, split, protocol, t.screen)
        save_baseline(t.run.folder / CHECKPOINT, method, {key: result[key] for key in METRICS})
        return result

    return t.group.on_rank_zero(measure_and_save)


def _on_features(t: Training, name: str) -> tuple[Baseline, Bank, Bank | None]:
    """An untrained baseline over the features of the run's encoder, with base and validation classes."""
    images, base, val, start = analytic_parts(t)
    space = start.metadiff.metric.space
    assert space is not None
    inner = FrozenLearner(name, t.config.evaluation.way, space.mean, t.config.baselines.frozen)
    header = {**_header(name, t.config, base), "controls": described(start.controls)}
    return Baseline(name, images, inner, start.metadiff, header), base, val


def _on_images(t: Training, name: str) -> tuple[Baseline, Bank, Bank | None]:
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
    images = ImageEncoder(inner.backbone, config.encoder, *shape, 1, t.device)
    return Baseline(name, images, inner, None, _header(name, config, base)), base, val


def _header(name: str, config: Config, base: Bank) -> dict[str, Any]:
    settings = config.baselines.frozen if name in ON_FEATURES else config.baselines.images
    facts = {"way": config.evaluation.way, "shot": config.evaluation.shot, "settings": settings.model_dump(mode="json")}
    return {
        "config": config.model_dump(mode="json", exclude={"runtime"}),
        "classes": list(base.classes),
        "baseline": {"name": name, **facts},
    }


def _train(t: Training, method: Baseline, base: Bank, val: Bank | None) -> Baseline:
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


def _validate(t: Training, val: Bank | None, learner: InnerLearner) -> tuple[float, float] | None:
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
