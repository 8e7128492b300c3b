"""Measurements on episodes, as the `evaluate --json` document; `metatrain` and `evaluate` share them."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import reduce
from typing import Any, TypeVar

import torch

from metadiff_cli.commands.evaluate.methods import (
    FILE,
    feature_bank,
    fitted_controls,
    mark,
    methods_of,
    pixel_bank,
    statistics_of,
)
from metadiff_cli.commands.settings import sampling_of
from metadiff_cli.config.schema import Config
from metadiff_cli.console import Screen
from metadiff_cli.core.baselines.learners import inner_method
from metadiff_cli.core.checkpoints.baseline import Baseline
from metadiff_cli.core.checkpoints.model import Model
from metadiff_cli.core.encoders.bank import Bank, FeatureBank, every_other
from metadiff_cli.core.evaluation.diagnostics import measure_novelty, trace_weights
from metadiff_cli.core.evaluation.evaluate import Method, Protocol, Scores, evaluate, run_through, summarise
from metadiff_cli.core.evaluation.openset import OpenSet, measure_open_set, unknown_classes
from metadiff_cli.core.method.adapt import MetaDiff, Sampling
from metadiff_cli.core.method.rejection import require_rejection
from metadiff_cli.core.training.fit import fit_tuning
from metadiff_cli.data.open import Source
from metadiff_cli.errors import DataError

NAMED = 10  # classes that are named; the others are counted
PICTURES = "pictures"  # key of what only the report page draws; it is taken out before JSON is printed
AGAINST = ("prototype", "analytic", "inductive")  # the methods that all others are compared with, in pairs

Progress = Callable[[int], None]
AnyBank = TypeVar("AnyBank", bound=Bank)


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


def measure_baseline(
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
        features = feature_bank(method.images, source, split, config, screen)
        bank: Bank = features
        model = Model(method.images, method.base, method.header)
        of_model = methods_of(model, features, controls, sampling_of(config), protocol, device)
        methods |= {control: of_model[control] for control in controls if control in of_model}
        methods |= fitted_controls(controls)
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
    return mark(document, {method.name: statistics_of(method)})


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
