"""What `metatrain` and `evaluate` share: feature banks, methods by name, the result document and its table."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch

from metadiff_cli.config.schema import Config
from metadiff_cli.console import Screen
from metadiff_cli.core.checkpoints.model import Model
from metadiff_cli.core.encoders.bank import FeatureBank, ImageEncoder, build_bank, every_other
from metadiff_cli.core.evaluation.diagnostics import trace_weights
from metadiff_cli.core.evaluation.evaluate import (
    Method,
    Protocol,
    Scores,
    evaluate,
    label_propagation_method,
    lengths_for,
    method_of,
    prototype_method,
    run_through,
    soft_kmeans_method,
    summarise,
)
from metadiff_cli.core.evaluation.novelty import measure_novelty
from metadiff_cli.core.method.adapt import MetaDiff, Sampling
from metadiff_cli.core.method.denoisers import build_denoiser, randomise
from metadiff_cli.core.method.rejection import require_rejection
from metadiff_cli.core.training.fit import fit_tuning
from metadiff_cli.data.open import Source
from metadiff_cli.errors import ConfigError
from metadiff_cli.files import cache_dir

CONTROLS = (
    "prototype", "analytic", "untrained", "logreg", "ridge", "posterior", "inductive", "soft-kmeans",
    "label-propagation",
)  # fmt: skip
POSTERIOR = Sampling(
    steps=100, samples=16, temperature=1.0
)  # classifiers drawn from the posterior, probabilities averaged

PICTURES = "pictures"  # key of what a page draws and JSON does not hold
AGAINST = ("prototype", "analytic", "inductive")  # what the paired differences of every method refer to


def feature_bank(images: ImageEncoder, source: Source, split: str, config: Config, screen: Screen) -> FeatureBank:
    """The features of a split, from the cache when they are there."""
    decoded = source.split(split, images.size)
    with screen.progress(f"features of {split} images") as advance:
        return build_bank(
            images, decoded.images, decoded.labels, decoded.classes,
            folder=cache_dir() / "features", key=decoded.key, batch=config.runtime.batch_size,
            progress=advance, note=screen.note,
        )  # fmt: skip


def sampling_of(config: Config) -> Sampling:
    """The sampler's settings as the core takes them."""
    s = config.sampler
    return Sampling(s.steps, s.samples, s.temperature, None if s.guidance == "auto" else s.guidance, s.method)


def parse_controls(text: str) -> list[str]:
    """Names and checkpoint files from a comma-separated list. Raises ConfigError for a name that is not known."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in CONTROLS and not name.endswith(".safetensors"):
            known = ", ".join(CONTROLS)
            raise ConfigError(f"unknown control '{name}'", hint=f"choose from {known}, or give a .safetensors file")
    return names


def methods_of(
    model: Model, bank: FeatureBank, controls: Sequence[str], sampling: Sampling, protocol: Protocol,
    device: torch.device,
) -> dict[str, Method]:  # fmt: skip
    """MetaDiff and those of the controls that are made of the model, by name; `methods.further` has the others."""
    metadiff = model.metadiff
    ours = partial(method_of, lengths=lengths_for(metadiff.space, bank, protocol, device))
    makers = {
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
    """A randomly initialised denoiser of the configured kind, its last layer included."""
    settings = model.header["config"]["denoiser"]
    kind = settings["kind"] if settings["kind"] != "analytic" else "unet"
    size = model.images.feature_size
    denoiser = build_denoiser(kind, size, settings["width"])
    return MetaDiff(model.metadiff.space, randomise(denoiser, seed).to(device), True, model.metadiff.tuning)


def measure(
    model: Model,
    bank: FeatureBank,
    split: str,
    protocol: Protocol,
    sampling: Sampling,
    controls: Sequence[str],
    screen: Screen,
    more: Mapping[str, Method] | None = None,
    *,
    halves: bool = False,
    open_set: bool = False,
    drawn: bool = False,
) -> dict[str, Any]:
    """The `evaluate --json` document of a model, its controls, and `more` methods.

    With `halves`, what is fitted on classes is fitted on the other half of them. With `open_set`, also how well images
    of classes that a task does not contain are rejected. With `drawn`, also PICTURES, for a page alone.
    """
    device = model.images.device
    if open_set and not halves:
        require_rejection(model.metadiff)  # before the long part
    parts = _halves(model, bank, protocol) if halves else [Part(model, bank, protocol)]
    document = result_document(
        lambda progress: _scores(parts, sampling, controls, more or {}, device, progress), bank, split, protocol, screen
    )
    if open_set:
        from metadiff_cli.commands.evaluate.openset import open_set_document

        with screen.progress("open-set episodes") as advance:
            found = open_set_document(parts, sampling, device, lambda done: advance(done, protocol.episodes))
        document["open_set"] = found
    if drawn:
        first = parts[0]
        document[PICTURES] = _pictures(first, sampling)
    return {
        **document,
        "halves": halves,
        "sampling": asdict(sampling),
        "denoiser": model.header["denoiser"]["kind"],
        "novelty": _novelty(model.metadiff, bank, protocol, sampling),
    }


def result_document(
    run: Callable[[Callable[[int], None]], Mapping[str, Scores]], bank: FeatureBank, split: str, protocol: Protocol,
    screen: Screen,
) -> dict[str, Any]:  # fmt: skip
    """The part of the document that holds for any methods; `run` scores them and reports the episodes done."""
    started = time.perf_counter()
    with screen.progress("episodes") as advance:
        scores = run(lambda done: advance(done, protocol.episodes))
    seconds = time.perf_counter() - started
    return {
        "schema": "metadiff.evaluate/1",
        "way": protocol.way,
        "shot": protocol.shot,
        "query": protocol.query,
        "episodes": protocol.episodes,
        "seed": protocol.seed,
        "split": split,
        "classes": len(bank.classes),
        "protocol": "transductive" if protocol.transductive else "inductive",
        "imbalance": protocol.imbalance,
        "methods": rounded(summarise(scores, AGAINST)),
        "reliability": rounded(next(iter(scores.values())).reliability()),
        "episodes_per_second": round(protocol.episodes / seconds, 1),
    }


@dataclass(frozen=True)
class Part:
    """A part of an evaluation: the model as it is tuned there, the classes it is measured on, and its episodes."""

    model: Model
    bank: FeatureBank
    protocol: Protocol


def _halves(model: Model, bank: FeatureBank, protocol: Protocol) -> list[Part]:
    """Tuned on every other class and measured on the rest, and the other way round."""
    parts = []
    for fitted, measured in ((0, 1), (1, 0)):
        part = replace(protocol, episodes=(protocol.episodes + fitted) // 2, seed=protocol.seed + fitted)
        tuning = fit_tuning(model.metadiff, every_other(bank, fitted), model.images.device, seed=protocol.seed)
        fresh = replace(model, metadiff=model.metadiff.tuned(tuning))
        parts.append(Part(fresh, every_other(bank, measured), part))
    return parts


def _scores(
    parts: Sequence[Part], sampling: Sampling, controls: Sequence[str], more: Mapping[str, Method],
    device: torch.device, progress: Callable[[int], None],
) -> dict[str, Scores]:  # fmt: skip
    found: dict[str, Scores] = {}
    for part in parts:
        methods = {**methods_of(part.model, part.bank, controls, sampling, part.protocol, device), **more}
        scores = run_through(evaluate(part.bank, methods, part.protocol, device), progress)
        found = {name: found[name].joined(s) if name in found else s for name, s in scores.items()}
    return found


def _pictures(part: Part, sampling: Sampling) -> dict[str, Any]:
    images, metadiff = part.model.images, part.model.metadiff
    ways = trace_weights(metadiff, part.bank, part.protocol, sampling, images.device)
    return {"trajectories": ways.to_dict()}


def _novelty(metadiff: MetaDiff, bank: FeatureBank, protocol: Protocol, sampling: Sampling) -> dict[str, float] | None:
    """How far generated weights are from the training weights; None for a checkpoint that does not hold those."""
    if metadiff.targets is None:
        return None
    found: dict[str, float] = rounded(measure_novelty(metadiff, metadiff.targets, bank, protocol, sampling).to_dict())
    return found


RESULT_COLUMNS = ("method", "accuracy %", "minus prototype", "minus analytic", "ECE %")


def result_title(document: dict[str, Any]) -> str:
    """One line on the episodes of a result document."""
    return (
        f"{document['way']}-way {document['shot']}-shot, {document['query']} queries a class, "
        f"{document['split']} classes, {document['episodes']} episodes, {document['protocol']}"
    )


def result_rows(document: dict[str, Any]) -> list[tuple[str, ...]]:
    """The cells of RESULT_COLUMNS for each method."""
    return [
        (
            _label(name, document),
            f"{m['accuracy']:.2f} ± {m['ci95']:.2f}",
            _difference(m.get("paired_to_prototype")),
            _difference(m.get("paired_to_analytic")),
            f"{m['ece']:.1f}",
        )
        for name, m in document["methods"].items()
    ]


def show_result(document: dict[str, Any], screen: Screen) -> None:
    """The table of a result document."""
    screen.table(result_title(document), RESULT_COLUMNS, result_rows(document))
    if "open_set" in document:
        from metadiff_cli.commands.evaluate.openset import COLUMNS, open_set_rows, open_set_title

        screen.table(open_set_title(document), COLUMNS, open_set_rows(document))


def _label(name: str, document: dict[str, Any]) -> str:
    if document["methods"][name].get("statistics") == "queries":
        return f"{name} (statistics of all queries)"
    return f"metadiff ({document['denoiser']})" if name == "metadiff" else name


def _difference(paired: dict[str, float] | None) -> str:
    return "" if paired is None else f"{paired['difference']:+.2f} ± {paired['ci95']:.2f}"


def rounded(value: Any) -> Any:
    """Four decimals: beyond that the digits of a float32 computation mean nothing."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    return round(value, 4) if isinstance(value, float) else value
