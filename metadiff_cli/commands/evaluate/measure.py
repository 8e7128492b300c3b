"""Measurements on episodes, as the `evaluate --json` document; `metatrain` and `evaluate` share them."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import reduce
from typing import Any, TypeVar

import torch

from metadiff_cli.commands.evaluate.methods import (
    FILE,
    Entry,
    feature_bank,
    methods_of,
    pixel_bank,
    statistics_of,
)
from metadiff_cli.commands.runtime import sampling_of
from metadiff_cli.config.schema import Config
from metadiff_cli.console import Screen
from metadiff_cli.core.baselines.learners import inner_method
from metadiff_cli.core.checkpoints.baseline import Baseline
from metadiff_cli.core.checkpoints.model import Model
from metadiff_cli.core.encoders.bank import Bank, FeatureBank, every_other
from metadiff_cli.core.evaluation.diagnostics import measure_novelty, measure_path, trace_weights
from metadiff_cli.core.evaluation.evaluate import Protocol, Scores, evaluate, run_through, summarise
from metadiff_cli.core.evaluation.openset import OpenSet, measure_open_set, unknown_classes
from metadiff_cli.core.method.adapt import Sampling
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
    more: Mapping[str, Entry] | None = None,
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
    trials = _halves(model, bank, protocol) if halves else [Trial(model, bank, protocol)]
    parts = [
        Part(
            t.bank, t.protocol, {**methods_of(t.model, t.bank, controls, sampling, t.protocol, device), **(more or {})}
        )
        for t in trials
    ]
    document = result_document(parts, split, protocol, device, screen)
    if open_set:
        with screen.progress("open-set episodes") as advance:
            document["open_set"] = _open_set(trials, sampling, device, lambda done: advance(done, protocol.episodes))
    last = trials[-1]  # of the halves of a single episode the first has none
    seen = (last.model.metadiff, last.bank, last.protocol, sampling, device)
    if drawn:
        document[PICTURES] = trace_weights(*seen).to_dict()
    novelty = measure_novelty(model.metadiff, bank, protocol, sampling, device)
    return {
        **document,
        "classes_left_out": left_out,
        "halves": halves,
        "sampling": asdict(sampling),
        "denoiser": model.header["denoiser"]["kind"],
        "novelty": None if novelty is None else rounded(novelty.to_dict()),
        "path": rounded(measure_path(*seen).to_dict()),
    }


def measure_baseline(
    method: Baseline,
    controls: Sequence[str],
    config: Config,
    source: Source,
    split: str,
    protocol: Protocol,
    screen: Screen,
    more: Mapping[str, Entry] | None = None,
) -> dict[str, Any]:
    """The `evaluate --json` document of a baseline, its controls and `more` methods.

    A baseline on images has no model that controls could be made of.
    """
    device = method.images.device
    methods = {method.name: Entry(inner_method(method.inner, protocol.way), statistics=statistics_of(method))}
    if method.base is not None:
        features = feature_bank(method.images, source, split, config, screen)
        bank: Bank = features
        model = Model(method.images, method.base, method.header)
        of_model = methods_of(model, features, controls, sampling_of(config), protocol, device)
        methods |= {name: entry for name, entry in of_model.items() if name in controls}
    else:
        bank = pixel_bank(source, split, method.images.size)
        if left := [control for control in controls if not control.endswith(FILE)]:
            screen.note(
                f"{', '.join(left)} need the features of a frozen encoder and are left out: to see them beside "
                f"{method.name}, give a MetaDiff checkpoint with --checkpoint and this one among --controls"
            )
    bank, left_out = with_enough(bank, protocol, screen)
    document = result_document([Part(bank, protocol, {**methods, **(more or {})})], split, protocol, device, screen)
    return {**document, "classes_left_out": left_out}


@dataclass(frozen=True)
class Trial:
    """A model with what was fitted for it, the classes that are measured, the episodes."""

    model: Model
    bank: FeatureBank
    protocol: Protocol


@dataclass(frozen=True)
class Part:
    """A part of an evaluation: the classes that are measured, the episodes, the methods by name."""

    bank: Bank
    protocol: Protocol
    methods: Mapping[str, Entry]


def result_document(
    parts: Sequence[Part], split: str, protocol: Protocol, device: torch.device, screen: Screen
) -> dict[str, Any]:
    """The part of the document that is the same for all methods; `protocol` is that of all parts together."""
    started = time.perf_counter()
    with screen.progress("episodes") as advance:
        scores = _scores(parts, device, lambda done: advance(done, protocol.episodes))
    seconds = time.perf_counter() - started
    methods = parts[0].methods
    calibrated = [name for name, entry in methods.items() if entry.calibrated]
    first = next(iter(methods))
    rows = rounded(summarise(scores, AGAINST, calibrated))
    for name, entry in methods.items():
        rows[name] |= {} if entry.statistics is None else {"statistics": entry.statistics}
    return {
        "schema": "metadiff.evaluate/1",
        "way": protocol.way,
        "shot": protocol.shot,
        "query": protocol.query,
        "episodes": protocol.episodes,
        "seed": protocol.seed,
        "split": split,
        "classes": sum(len(part.bank.classes) for part in parts),
        "protocol": "transductive" if protocol.transductive else "inductive",
        "imbalance": protocol.imbalance,
        "methods": rows,
        "reliability": rounded(scores[first].reliability()) if first in calibrated else [],
        "episodes_per_second": round(protocol.episodes / seconds, 1),
    }


def _scores(parts: Sequence[Part], device: torch.device, progress: Progress) -> dict[str, Scores]:
    """The scores of each method over the episodes of all parts."""
    found: dict[str, Scores] = {}
    done = 0
    for part in parts:
        methods = {name: entry.run for name, entry in part.methods.items()}
        scores = run_through(evaluate(part.bank, methods, part.protocol, device), _after(done, progress))
        found = {name: found[name].joined(s) if name in found else s for name, s in scores.items()}
        done += part.protocol.episodes
    return found


def _halves(model: Model, bank: FeatureBank, protocol: Protocol) -> list[Trial]:
    """Two trials: fitted on every other class and measured on the rest, and the other way round."""
    trials = []
    for fitted, measured in ((0, 1), (1, 0)):
        part = replace(protocol, episodes=(protocol.episodes + fitted) // 2, seed=protocol.seed + fitted)
        tuning, controls = fit_tuning(
            model.metadiff, [every_other(bank, fitted)], model.images.device, seed=protocol.seed
        )
        header = {**model.header, "controls": {name: [asdict(s) for s in found] for name, found in controls.items()}}
        fresh = Model(model.images, replace(model.metadiff, tuning=tuning), header)
        trials.append(Trial(fresh, every_other(bank, measured), part))
    return trials


def _open_set(trials: Sequence[Trial], sampling: Sampling, device: torch.device, progress: Progress) -> dict[str, Any]:
    """AUROC and rejection rates at the fitted threshold, over the episodes of all trials."""
    first = trials[0]
    measured: list[OpenSet] = []
    for trial in trials:
        before = sum(len(m.auroc) for m in measured)
        metadiff, report = trial.model.metadiff, _after(before, progress)
        measured.append(measure_open_set(metadiff, trial.bank, trial.protocol, sampling, device, report))
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


def rounded(value: Any) -> Any:
    """Numbers to four decimals: beyond that the digits of a float32 computation mean nothing."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    return round(value, 4) if isinstance(value, float) else value
