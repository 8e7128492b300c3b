"""What `metatrain` and `evaluate` share: feature banks, methods by name, and the result document."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial, reduce
from typing import Any, TypeVar

import torch

from metadiff_cli.commands.completions import CONTROLS
from metadiff_cli.commands.train.run_folder import Source
from metadiff_cli.config.schema import Config
from metadiff_cli.console import Screen
from metadiff_cli.core.checkpoints.model import Model
from metadiff_cli.core.encoders.bank import Bank, FeatureBank, build_bank, every_other
from metadiff_cli.core.encoders.image_encoder import ImageEncoder
from metadiff_cli.core.evaluation.controls import label_propagation_method, prototype_method, soft_kmeans_method
from metadiff_cli.core.evaluation.diagnostics import measure_novelty, trace_weights
from metadiff_cli.core.evaluation.evaluate import (
    Method,
    Protocol,
    Scores,
    evaluate,
    lengths_for,
    method_of,
    run_through,
    summarise,
)
from metadiff_cli.core.evaluation.openset import OpenSet, measure_open_set, unknown_classes
from metadiff_cli.core.method.adapt import MetaDiff, Sampling
from metadiff_cli.core.method.denoisers import build_denoiser, randomise
from metadiff_cli.core.method.rejection import require_rejection
from metadiff_cli.core.training.fit import fit_tuning
from metadiff_cli.errors import ConfigError, DataError
from metadiff_cli.files import cache_dir

NAMED = 10  # classes that are named; the others are counted
POSTERIOR = Sampling(steps=100, samples=16, temperature=1.0)  # the probabilities of 16 sampled classifiers, averaged
PICTURES = "pictures"  # key of what only the report page draws; it is taken out before JSON is printed
AGAINST = ("prototype", "analytic", "inductive")  # the methods that all others are compared with, in pairs

Progress = Callable[[int], None]
AnyBank = TypeVar("AnyBank", bound=Bank)


def feature_bank(images: ImageEncoder, source: Source, split: str, config: Config, screen: Screen) -> FeatureBank:
    """The features of a split, from the cache if they are there."""
    decoded = source.split(split, images.size)
    with screen.progress(f"features of {split} images") as advance:
        return build_bank(
            images, decoded.images, decoded.labels, decoded.classes,
            folder=cache_dir() / "features", key=decoded.key, batch=config.runtime.batch_size,
            progress=advance, note=screen.note,
        )  # fmt: skip


def with_enough(bank: AnyBank, protocol: Protocol, screen: Screen) -> tuple[AnyBank, list[str]]:
    """The bank without the classes that have too few images for an episode, and the names of these; see `with_images`.

    Raises DataError when fewer classes are left than an episode has.
    """
    need = protocol.shot + (protocol.query if protocol.imbalance is None else 2 * protocol.query)
    kept, left_out = bank.with_images(need)
    if left_out and len(kept.classes) < protocol.way:
        raise DataError(
            f"{protocol.way}-way {protocol.shot}-shot episodes with {need - protocol.shot} queries per class need "
            f"{protocol.way} classes of {need} images or more; {len(kept.classes)} of {len(bank.classes)} have as many",
            hint="lower --query, --shot or --way, or add images",
        )
    if left_out:
        more = f" and {len(left_out) - NAMED} more" if len(left_out) > NAMED else ""
        screen.note(f"classes left out, with fewer than {need} images: {', '.join(left_out[:NAMED])}{more}")
    return kept, list(left_out)


def sampling_of(config: Config) -> Sampling:
    """The sampler's settings as the core takes them."""
    s = config.sampler
    return Sampling(s.steps, s.samples, s.temperature, None if s.guidance == "auto" else s.guidance, s.method)


def parse_controls(text: str) -> list[str]:
    """Names of controls and checkpoint files from a comma-separated list. Raises ConfigError for an unknown name."""
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
    size = model.images.feature_size
    denoiser = build_denoiser(kind, size, settings["width"], settings["depth"], settings["dropout"])
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

    With `halves`, what is fitted on classes is fitted on the half of them that is not measured. With `open_set`, the
    rejection of images of unknown classes is measured too. With `drawn`, PICTURES is added, for a report page.
    """
    device = model.images.device
    bank, left_out = with_enough(bank, protocol, screen)
    if open_set and not halves:
        require_rejection(model.metadiff)  # before the long part
    parts = _halves(model, bank, protocol) if halves else [Part(model, bank, protocol)]
    document = result_document(
        lambda progress: _scores(parts, sampling, controls, more or {}, device, progress), bank, split, protocol, screen
    )
    if open_set:
        with screen.progress("open-set episodes") as advance:
            document["open_set"] = _open_set(parts, sampling, device, lambda done: advance(done, protocol.episodes))
    if drawn:
        first = parts[0]
        document[PICTURES] = trace_weights(first.model.metadiff, first.bank, first.protocol, sampling, device).to_dict()
    return {
        **document,
        "classes_left_out": left_out,
        "halves": halves,
        "sampling": asdict(sampling),
        "denoiser": model.header["denoiser"]["kind"],
        "novelty": _novelty(model.metadiff, bank, protocol, sampling),
    }


def result_document(
    run: Callable[[Progress], Mapping[str, Scores]], bank: Bank, split: str, protocol: Protocol, screen: Screen
) -> dict[str, Any]:
    """The part of the document that is the same for all methods; `run` scores them and reports the episodes done."""
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
    """A part of an evaluation: the model with what was fitted for it, the classes that are measured, the episodes."""

    model: Model
    bank: FeatureBank
    protocol: Protocol


def _halves(model: Model, bank: FeatureBank, protocol: Protocol) -> list[Part]:
    """Two parts: fitted on every other class and measured on the rest, and the other way round."""
    parts = []
    for fitted, measured in ((0, 1), (1, 0)):
        part = replace(protocol, episodes=(protocol.episodes + fitted) // 2, seed=protocol.seed + fitted)
        tuning = fit_tuning(model.metadiff, every_other(bank, fitted), model.images.device, seed=protocol.seed)
        fresh = replace(model, metadiff=model.metadiff.tuned(tuning))
        parts.append(Part(fresh, every_other(bank, measured), part))
    return parts


def _scores(
    parts: Sequence[Part], sampling: Sampling, controls: Sequence[str], more: Mapping[str, Method],
    device: torch.device, progress: Progress,
) -> dict[str, Scores]:  # fmt: skip
    found: dict[str, Scores] = {}
    for part in parts:
        methods = {**methods_of(part.model, part.bank, controls, sampling, part.protocol, device), **more}
        scores = run_through(evaluate(part.bank, methods, part.protocol, device), progress)
        found = {name: found[name].joined(s) if name in found else s for name, s in scores.items()}
    return found


def _open_set(parts: Sequence[Part], sampling: Sampling, device: torch.device, progress: Progress) -> dict[str, Any]:
    """AUROC and rejection rates at the fitted threshold, over the episodes of all parts."""
    first = parts[0]
    measured: list[OpenSet] = []
    for part in parts:
        before = sum(len(m.auroc) for m in measured)
        metadiff, report = part.model.metadiff, _after(before, progress)
        measured.append(measure_open_set(metadiff, part.bank, part.protocol, sampling, device, report))
    together = reduce(OpenSet.joined, measured)
    found: dict[str, Any] = rounded({
        "unknown_classes": unknown_classes(first.bank, first.protocol.way),
        "episodes": len(together.auroc),
        "false_rejection_rate": require_rejection(first.model.metadiff).rate,
        **together.summary(),
    })  # fmt: skip
    return found


def _after(before: int, progress: Progress) -> Progress:
    return lambda done: progress(before + done)


def _novelty(metadiff: MetaDiff, bank: FeatureBank, protocol: Protocol, sampling: Sampling) -> dict[str, float] | None:
    """How far generated weights are from the training weights; None for a checkpoint that does not hold those."""
    if metadiff.targets is None:
        return None
    found: dict[str, float] = rounded(measure_novelty(metadiff, metadiff.targets, bank, protocol, sampling).to_dict())
    return found


def rounded(value: Any) -> Any:
    """Numbers to four decimals: beyond that the digits of a float32 computation mean nothing."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    return round(value, 4) if isinstance(value, float) else value
