"""Baselines on the command line: `metatrain --method NAME`, their checkpoints in `evaluate`, and further controls."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metadiff_cli.config.schema import Config
from metadiff_cli.console import Screen
from metadiff_cli.errors import ConfigError, DataError

if TYPE_CHECKING:
    import torch

    from metadiff_cli.commands.train.run_folder import Run, Source
    from metadiff_cli.commands.train.starting import Start
    from metadiff_cli.core.baselines.train import InnerStep, InnerTrainer, InnerValidation
    from metadiff_cli.core.checkpoints.baseline import Baseline
    from metadiff_cli.core.encoders.bank import Bank, PixelBank
    from metadiff_cli.core.evaluation.evaluate import Method, Protocol

FILE = ".safetensors"


def train_method(
    name: str, config: Config, source: "Source", run: "Run", start: "Start", screen: Screen
) -> dict[str, Any]:
    """All stages of a baseline, down to its checkpoint; returns the result document."""
    from metadiff_cli.commands.train.run_folder import CHECKPOINT
    from metadiff_cli.core.baselines.learners import ON_FEATURES
    from metadiff_cli.core.checkpoints.baseline import save_baseline
    from metadiff_cli.core.evaluation.evaluate import Protocol
    from metadiff_cli.core.training.distributed import on_main

    frozen = name in ON_FEATURES
    method, base, val = (_on_features if frozen else _on_images)(name, config, source, run, start, screen)
    identity = start.identity(config, name, source, method.images if frozen else None)
    method = _train(method, config, base, val, run, screen, identity)
    e = config.evaluation
    protocol = Protocol(e.way, e.shot, e.query, e.episodes, config.seed)
    split = "test" if source.has("test") else "val" if val is not None else "train"
    result = measure_method(method, ("prototype", "analytic", "logreg", "ridge") if frozen else (), config, source,
                            split, protocol, screen)  # fmt: skip
    metrics = {key: result[key] for key in ("methods", "split", "way", "shot", "query", "episodes", "seed")}
    on_main(lambda: save_baseline(run.folder / CHECKPOINT, method, metrics))
    return result


def measure_method(
    method: "Baseline",
    controls: Sequence[str],
    config: Config,
    source: "Source",
    split: str,
    protocol: "Protocol",
    screen: Screen,
    more: "Mapping[str, Method] | None" = None,
) -> dict[str, Any]:
    """The `evaluate --json` document of a baseline; on images there is no model that controls could be made of."""
    from metadiff_cli.commands.evaluate.measure import (
        feature_bank,
        methods_of,
        result_document,
        sampling_of,
        with_enough,
    )
    from metadiff_cli.core.checkpoints.model import Model
    from metadiff_cli.core.evaluation.evaluate import evaluate, run_through

    device = method.images.device
    methods = {method.name: _as_method(method, protocol.way)}
    if method.base is not None:
        features = feature_bank(method.images, source, split, config, screen)
        bank: Bank = features
        model = Model(method.images, method.base, method.header)
        of_model = methods_of(model, features, controls, sampling_of(config), protocol, device)
        methods |= {control: of_model[control] for control in controls if control in of_model}
        methods |= _fitted(controls, config)
    else:
        bank = pixel_bank(source, split, method.images.size)
        if left := [control for control in controls if not control.endswith(FILE)]:
            screen.note(
                f"{', '.join(left)} need the features of a frozen encoder and are left out: to see them beside "
                f"{method.name}, give a MetaDiff checkpoint with --checkpoint and this one among --controls"
            )
    methods |= more or {}
    bank, left_out = with_enough(bank, protocol, screen)
    document = result_document(
        lambda progress: run_through(evaluate(bank, methods, protocol, device), progress), bank, split, protocol, screen
    )
    document["classes_left_out"] = left_out
    return mark(document, {method.name: _statistics(method)})


def further(
    controls: Sequence[str], taken: str, config: Config, source: "Source", split: str, labels: Any,
    protocol: "Protocol", device: "torch.device", screen: Screen,
) -> tuple[dict[str, "Method"], dict[str, str | None]]:  # fmt: skip
    """The controls that are not made of the model at hand, which is called `taken`, and their BatchNorm statistics.

    They are those fitted to each task, and checkpoint files. A file's method reads its own features or pixels of the
    same images, whose `labels` must be those of the bank at hand. A MetaDiff model appears as `metadiff-<denoiser>`.
    """
    methods, statistics = _fitted(controls, config), {}
    for path in (Path(control) for control in controls if control.endswith(FILE)):
        name, method, bank, kind = _from_file(path, config, source, split, protocol, device, screen)
        if not (len(bank.labels) == len(labels) and (bank.labels == labels).all()):
            raise DataError(f"{path} sees other images of this data set", hint="evaluate it by itself")
        name = _unused(name, {taken, *methods})
        methods[name], statistics[name] = _reading(bank, method, device), kind
    return methods, statistics


def _from_file(
    path: Path, config: Config, source: "Source", split: str, protocol: "Protocol", device: "torch.device",
    screen: Screen,
) -> tuple[str, "Method", "Bank", str | None]:  # fmt: skip
    """Name, method, images in its own form, and BatchNorm statistics of a checkpoint file."""
    from metadiff_cli.commands.evaluate.measure import feature_bank, sampling_of
    from metadiff_cli.core.checkpoints.baseline import load_baseline
    from metadiff_cli.core.checkpoints.file import read_header
    from metadiff_cli.core.checkpoints.model import load_model
    from metadiff_cli.core.evaluation.evaluate import method_of

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
    return trained.name, _as_method(trained, protocol.way), bank, _statistics(trained)


def mark(document: dict[str, Any], statistics: Mapping[str, str | None]) -> dict[str, Any]:
    """Say of each baseline whose BatchNorm sees all queries of a task together: that is no inductive protocol."""
    for name, kind in statistics.items():
        if kind is not None:
            document["methods"][name]["statistics"] = kind
    return document


def _statistics(method: "Baseline") -> str | None:
    kind = method.header["baseline"]["settings"].get("statistics")
    return None if kind is None else str(kind)


def pixel_bank(source: "Source", split: str, size: int) -> "PixelBank":
    """The images themselves, memory-mapped."""
    from metadiff_cli.core.encoders.bank import PixelBank

    decoded = source.split(split, size)
    return PixelBank(decoded.images, decoded.labels, decoded.classes)


def _fitted(controls: Sequence[str], config: Config) -> dict[str, "Method"]:
    from metadiff_cli.core.evaluation.controls import logreg_method, ridge_method

    makers: dict[str, Callable[[], Method]] = {
        "logreg": lambda: logreg_method(config.baselines.logreg),
        "ridge": lambda: ridge_method(config.baselines.ridge),
    }
    return {name: maker() for name, maker in makers.items() if name in controls}


def _as_method(method: "Baseline", way: int) -> "Method":
    from metadiff_cli.core.baselines.learners import inner_method

    return inner_method(method.inner, int(method.header["baseline"]["settings"]["test_steps"]), way)


def _reading(bank: "Bank", method: "Method", device: "torch.device") -> "Method":
    """A method that takes the episodes' images from a bank of its own, a few tasks at a time as they may be pixels."""
    import torch

    from metadiff_cli.core.evaluation.episodes import Episodes

    def run(support: Any, query: Any, episodes: Episodes, first: int) -> Any:
        parts = []
        for i in range(0, len(episodes.labels), 8):
            part = Episodes(*(array[i : i + 8] for array in vars(episodes).values()))
            own, queries = (bank.take(rows).to(device) for rows in (part.support, part.query))
            parts.append(method(own, queries, part, first + i))
        return torch.cat(parts)

    return run


def _unused(name: str, taken: set[str]) -> str:
    """The name, or where it is taken the name with a number."""
    numbered = (f"{name}-{i}" for i in range(2, len(taken) + 3))
    return next(candidate for candidate in (name, *numbered) if candidate not in taken)


def _on_features(
    name: str, config: Config, source: "Source", run: "Run", start: "Start", screen: Screen
) -> tuple["Baseline", "Bank", "Bank | None"]:
    """An untrained baseline over the features of the run's encoder, with base and validation classes."""
    from metadiff_cli.commands.train.metatrain import frozen_parts
    from metadiff_cli.core.baselines.learners import FrozenLearner
    from metadiff_cli.core.checkpoints.baseline import Baseline

    images, base, val, analytic = frozen_parts(config, source, run, start, screen)
    inner = FrozenLearner(name, config.evaluation.way, analytic.space.mean, config.baselines.frozen)
    header = _header(name, config, base)
    return Baseline(name, images, inner, analytic, header), base, val


def _on_images(
    name: str, config: Config, source: "Source", run: "Run", start: "Start", screen: Screen
) -> tuple["Baseline", "Bank", "Bank | None"]:
    """An untrained baseline over images, with base and validation classes; its encoder starts at random."""
    import torch

    from metadiff_cli.commands.settings import start as begin
    from metadiff_cli.core.baselines.learners import build_image_learner
    from metadiff_cli.core.checkpoints.baseline import Baseline
    from metadiff_cli.core.encoders.image_encoder import ImageEncoder
    from metadiff_cli.core.encoders.networks import build_encoder
    from metadiff_cli.data.cache import channel_statistics

    if start.encoder or start.init:
        raise ConfigError(
            f"{name} trains an encoder of its own", hint="leave --encoder FILE and --init-from out, or give a name"
        )
    device, size = begin(config), config.data.size
    mean, std = channel_statistics(source.split("train").images)
    shape = (size, tuple(mean), tuple(std))
    base = pixel_bank(source, "train", size)
    val = pixel_bank(source, "val", size) if source.has("val") else None
    torch.manual_seed(config.seed)
    backbone = build_encoder(config.encoder)
    inner = build_image_learner(name, config.evaluation.way, backbone, *shape, config.baselines.images)
    images = ImageEncoder(backbone, config.encoder, *shape, False, device)
    return Baseline(name, images, inner, None, _header(name, config, base)), base, val


def _header(name: str, config: Config, base: "Bank") -> dict[str, Any]:
    from metadiff_cli.core.baselines.learners import ON_FEATURES

    settings = config.baselines.frozen if name in ON_FEATURES else config.baselines.images
    facts = {"way": config.evaluation.way, "shot": config.evaluation.shot, "settings": settings.model_dump(mode="json")}
    return {
        "config": config.model_dump(mode="json", exclude={"runtime"}),
        "classes": list(base.classes),
        "baseline": {"name": name, **facts},
    }


def _train(
    method: "Baseline",
    config: Config,
    base: "Bank",
    val: "Bank | None",
    run: "Run",
    screen: Screen,
    identity: dict[str, Any],
) -> "Baseline":
    """The method with its learner trained; selected by accuracy on validation classes where there are some."""
    from dataclasses import replace

    from metadiff_cli.commands.train.resume import follow
    from metadiff_cli.commands.train.run_folder import STATE
    from metadiff_cli.core.baselines.train import InnerTrainer
    from metadiff_cli.core.training.transforms import Augmentation

    b = config.baselines
    on_images = method.base is None
    augmented = on_images and b.images.augment
    trainer = InnerTrainer(
        method.inner, base, b.images if on_images else b.frozen, shot=config.evaluation.shot, seed=config.seed,
        device=method.images.device, quarters=4 if on_images and b.images.rotated_classes else 1,
        augmentation=Augmentation(**config.pretrain.augment.model_dump()) if augmented else None,
    )  # fmt: skip
    if val is None:
        screen.warn("no validation classes: the last parameters are kept, and nothing is selected")
    follow(
        trainer, partial(_validation, val, config), partial(_show, run, trainer, screen),
        label=f"training {method.name}", state=run.folder / STATE, identity=identity, screen=screen,
    )  # fmt: skip
    return replace(method, inner=trainer.chosen())


def _validation(val: "Bank | None", config: Config, learner: Any) -> tuple[float, float] | None:
    """Accuracy on validation episodes in percent, and its interval."""
    import torch

    from metadiff_cli.core.baselines.learners import FrozenLearner, inner_method
    from metadiff_cli.core.evaluation.evaluate import Protocol, evaluate, mean_interval, run_through

    if val is None:
        return None
    e = config.evaluation
    settings = config.baselines.frozen if isinstance(learner, FrozenLearner) else config.baselines.images
    protocol = Protocol(e.way, e.shot, e.query, settings.validation_episodes, config.seed + 1)
    device = next(learner.parameters()).device
    method = inner_method(learner, settings.test_steps, e.way)
    scores = run_through(evaluate(val, {"learner": method}, protocol, device))
    return mean_interval(100 * torch.cat(scores["learner"].accuracy))


def _show(
    run: "Run", trainer: "InnerTrainer", screen: Screen, record: "InnerStep | InnerValidation", update: Any
) -> bool:
    from metadiff_cli.commands.train.resume import show_step
    from metadiff_cli.core.baselines.train import InnerValidation

    measured = None
    if isinstance(record, InnerValidation):
        measured = "" if record.validation is None else f"  validation {record.validation:.2f} ± {record.ci95:.2f}"
    return show_step(run, trainer.history, screen, record, update, measured)
