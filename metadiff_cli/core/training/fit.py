"""The outer loop: the hyper-parameters of the descent by ways and shots, fitted on validation classes and domains.

Each bank holds the classes of one validation domain. A candidate is scored on the same episodes of every domain by
`HeldOut`, with the queries as the images that are left out: all products of features are taken once, and a candidate
costs arithmetic on small matrices. The score is the mean gain over the class mean, and a domain that loses counts more.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metadiff_cli.core.encoders.bank import FeatureBank
from metadiff_cli.core.evaluation.controls import ANALYTIC, CONTROLS, ControlSettings, Fitted, fit_control
from metadiff_cli.core.evaluation.evaluate import Protocol, evaluate, mean_interval, method_of, run_through
from metadiff_cli.core.method.adapt import (
    MetaDiff,
    Sampling,
    Tuning,
)
from metadiff_cli.core.method.calibration import Rejection, TaskTable, best_temperature
from metadiff_cli.core.method.descent import NO_DESCENT
from metadiff_cli.core.method.guidance import GUIDANCE_GRID, LEVEL_GRID, Usual, shift_of
from metadiff_cli.core.method.held_out import HeldOut
from metadiff_cli.core.method.metric import Metric, TaskSettings, cosine_logits
from metadiff_cli.core.method.rejection import RATE, rejector_of
from metadiff_cli.core.method.support import count_of
from metadiff_cli.core.method.task_space import ClassStatistics
from metadiff_cli.core.training.validation import DomainTasks, ValidationTasks, adapted

SHRINKAGE = ((0.5, 0.3), (0.8, 0.3), (0.95, 0.3))  # within and between: a longer training wants more within
DOMAIN_GRID = (0.0, 0.5, 1.0)
DESCENT_GRID = (
    (2.0, 0.03), (2.0, 0.1), (3.0, 0.1), (3.0, 0.3), (5.0, 0.3), (5.0, 1.0), (8.0, 3.0), (10.0, 10.0),
)  # fmt: skip  # s and rho
TENSORS = ("guidance", "level", "domain", "temperature")  # of the hyper-parameters; the others are numbers
START = {"guidance": 4.0, "level": 0.2, "domain": 0.5, "temperature": 2.0, "scale": 5.0, "prior": 1.0}
# of the published form, whose metric has no plain parts: features as they are, and no descent
PAPER = {**START, "guidance": 1.0, "level": 0.0, "domain": 0.0, "scale": 1.0, "prior": NO_DESCENT}
BETTER = 0.1  # points that a candidate has to be ahead by: a standard error over the episodes
FEW_WAYS = (2, 3)  # for which rejection is fitted as well: its scores of few classes are others
MOST_CORRECTED = 10.0  # the largest factor on a temperature
LOSS, BURDEN = 0.2, 3.0  # points below the class mean that a domain may lose, and what further ones count more

Note = Callable[[str], None]


def _unheard(text: str) -> None:
    """Take a note that nobody asked for."""


def paired_gain(
    metadiff: MetaDiff, banks: Sequence[FeatureBank], protocol: Protocol, device: torch.device
) -> tuple[float, float]:
    """Return the accuracy of a metadiff minus that without its learned part: points and half-width of 95 %.

    It is the mean over the banks, each with the episodes of the protocol, as far as its classes and images go.
    """
    gains = [_paired_gain(metadiff, *fitting(bank, protocol), device) for bank in banks]
    return sum(gain for gain, _ in gains) / len(gains), math.hypot(*(half for _, half in gains)) / len(gains)


def _paired_gain(
    metadiff: MetaDiff, bank: FeatureBank, protocol: Protocol, device: torch.device
) -> tuple[float, float]:
    """The gain on one bank."""
    pair = {"learned": metadiff, "analytic": metadiff.analytic()}
    methods = {name: method_of(m, bank, Sampling(), protocol, device) for name, m in pair.items()}
    scores = run_through(evaluate(bank, methods, protocol, device))
    first, second = (100 * torch.cat(scores[name].accuracy) for name in pair)
    return mean_interval(first - second)


def fitting(bank: FeatureBank, protocol: Protocol) -> tuple[FeatureBank, Protocol]:
    """Return the classes with images enough for a protocol, or where these are too few, all and smaller episodes.

    Each class has two images or more.
    """
    kept, _ = bank.with_images(protocol.shot + protocol.query)
    if len(kept.classes) >= protocol.way:
        return kept, protocol
    smallest = min(len(rows) for rows in bank.class_indices())
    shot = min(protocol.shot, smallest - 1)
    query = min(protocol.query, smallest - shot)
    return bank, replace(protocol, way=min(protocol.way, len(bank.classes)), shot=shot, query=query)


def choose_shrinkage(
    statistics: ClassStatistics, banks: Sequence[FeatureBank], device: torch.device, *, seed: int, note: Note = _unheard
) -> tuple[float, float]:
    """Return the pair of SHRINKAGE with the best 1-shot and 5-shot score on `banks`, all else at the start.

    An encoder that fits its base classes closely pulls their images together as it does not those of new classes, and
    their covariance says less about new ones. `note` is told the score of each pair.
    """
    totals = []
    for within, between in SHRINKAGE:
        metric = Metric(statistics.groups, statistics.task_space(within, between).to(device))
        validation = ValidationTasks(metric, banks, device, seed)
        searches = [_Search(metric, validation.tasks(validation.ways[0], shot)) for shot in validation.shots[::2]]
        totals.append(sum(search.score(search.settings) for search in searches) / len(searches))
        note(f"shrinkage {within:g} within classes and {between:g} between: {totals[-1]:+.2f}")
    return SHRINKAGE[int(np.argmax(totals))]


def fit_tuning(
    metadiff: MetaDiff, banks: Sequence[FeatureBank], device: torch.device, *, seed: int, note: Note = _unheard
) -> tuple[Tuning, Fitted]:
    """Fit the tuning, and the settings of the controls, on `banks`. Too few images lower shots and queries.

    `note` is told the score of each candidate, and what was chosen for each combination of ways and shots.
    """
    metric = metadiff.metric
    validation = ValidationTasks(metric, banks, device, seed)
    found: dict[tuple[int, int], TaskSettings] = {}
    for way, shot in validation:
        search = _Search(metric, validation.tasks(way, shot), found.get((validation.ways[0], shot)) or _last(found))
        search.run(partial(_note_of, note, f"{way}-way {shot}-shot"))
        found[way, shot] = search.settings
    metadiff = metadiff.tuned(
        usual=_usual(metric, validation),
        **{name: TaskTable.of({pair: float(getattr(s, name)) for pair, s in found.items()}) for name in START},
    )
    metadiff = _with_confidences(metadiff, validation)
    return metadiff.tuning, fit_controls(metadiff, validation)


def fit_confidences(metadiff: MetaDiff, banks: Sequence[FeatureBank], device: torch.device, *, seed: int) -> Tuning:
    """Return the tuning with temperatures and rejection fitted anew, as a learned denoiser needs it."""
    return _with_confidences(metadiff, ValidationTasks(metadiff.metric, banks, device, seed)).tuning


def _with_confidences(metadiff: MetaDiff, validation: ValidationTasks) -> MetaDiff:
    """The same with the factor on its temperatures, and with the rejection that follows from them.

    Temperatures that were fitted for the hyper-parameters alone do not know the choice for each task, which is made by
    held-out images and is better on them than on others.
    """
    metadiff, found = metadiff.tuned(correction=TaskTable.constant(1.0)), {}
    for pair in validation:
        factor = _factor(metadiff, validation.few_tasks(*pair))  # without bound where all images are correct
        found[pair] = min(max(factor, 1 / MOST_CORRECTED), MOST_CORRECTED)
    metadiff = metadiff.tuned(correction=TaskTable.of(found))
    return metadiff.tuned(rejection=fit_rejection(metadiff, validation))


def _note_of(note: Note, what: str, text: str) -> None:
    note(f"{what}: {text}")


def _last(found: dict[tuple[int, int], TaskSettings]) -> TaskSettings | None:
    return list(found.values())[-1] if found else None


def fit_rejection(metadiff: MetaDiff, validation: ValidationTasks) -> Rejection:
    """Return the offsets of the threshold below which RATE of the images of a task's own classes fall.

    No unknown image is needed. Fit last: the threshold depends on all other tuning.
    """
    none = Rejection(TaskTable.constant(0.0), RATE)
    fitted = metadiff.tuned(rejection=none)
    offsets: dict[tuple[int, int], float] = {}
    for way in sorted({*filter(validation.allows, FEW_WAYS), *validation.ways}):
        for shot in validation.shots:
            margins = []
            for task in validation.few_tasks(way, shot):
                classifier = adapted(fitted, task)
                margins.append(rejector_of(fitted, classifier, task.support).margins(task.query).flatten())
            offsets[way, shot] = float(torch.cat(margins).quantile(RATE))
    return Rejection(TaskTable.of(offsets), RATE)


def fit_controls(metadiff: MetaDiff, validation: ValidationTasks) -> Fitted:
    """Return what was fitted for each control, and the temperatures of the posterior mean without descent."""
    found: dict[str, list[ControlSettings]] = {name: [] for name in (*CONTROLS, ANALYTIC)}
    for way, shot in validation:
        tasks = validation.few_tasks(way, shot)
        domains = [task.plain() for task in tasks]
        for name in CONTROLS:
            found[name].append(fit_control(name, metadiff.metric, domains, way, shot))
        temperature = _factor(metadiff.without_descent(TaskTable.constant(1.0)), tasks)
        found[ANALYTIC].append(ControlSettings(way, shot, temperature=temperature))
    return {name: tuple(settings) for name, settings in found.items()}


class _Search:
    """Coordinate search for the hyper-parameters of one combination of ways and shots."""

    def __init__(self, metric: Metric, tasks: Sequence[DomainTasks], start: TaskSettings | None = None) -> None:
        self.tasks, self.held = tasks, [task.held_out(metric) for task in tasks]
        self.reference = torch.stack([_class_mean(metric, task) for task in tasks])
        self.device = self.reference.device
        self.settings = start or self._starting(START if metric.plain else PAPER)
        self.grids: dict[str, Sequence[Any]] = {}  # in the order of how much depends on them
        if metric.plain:
            self.grids["domain"] = DOMAIN_GRID
            if metric.space is not None:
                self.grids["guidance"] = GUIDANCE_GRID
            if len(metric.groups) > 1:
                self.grids["level"] = LEVEL_GRID
            self.grids["scale"] = DESCENT_GRID

    def run(self, note: Note) -> None:
        """Settle all hyper-parameters; `note` is told the score of each candidate, and what was chosen."""
        best = self.score(self.settings)
        for name, grid in self.grids.items():
            candidates = [self._changed(name, value) for value in grid]
            scores = [self.score(candidate) for candidate in candidates]
            tried = [f"{_shown(value)} {score:+.2f}" for value, score in zip(grid, scores, strict=True)]
            note(f"{name} {', '.join(tried)}")
            if max(scores) > best + BETTER:
                best, self.settings = max(scores), candidates[int(np.argmax(scores))]
        logits = torch.cat([self._logits(held, self.settings).flatten(0, 1) for held in self.held])
        labels = torch.cat([task.labels.repeat(len(task.query)) for task in self.tasks])
        self.settings = replace(self.settings, temperature=self._single(best_temperature(logits, labels)))
        note(self._describe())

    def score(self, settings: TaskSettings) -> float:
        """Return the mean gain over the class mean; what a domain loses beyond LOSS counts more."""
        gains = self.gains(settings)
        return float((gains + BURDEN * (gains + LOSS).clamp(max=0)).mean())

    def gains(self, settings: TaskSettings) -> Tensor:
        """Return the points over the class mean, of each domain."""
        found = [_accuracy(self._logits(h, settings), t.labels) for h, t in zip(self.held, self.tasks, strict=True)]
        return torch.stack(found) - self.reference

    def _describe(self) -> str:
        """What was chosen, as text."""
        s, gains = self.settings, self.gains(self.settings)
        return (
            f"s {s.scale:g}, rho {s.prior:g}, level {float(s.level):g}, domain {float(s.domain):g}, "
            f"guidance {float(s.guidance):g}, temperature {float(s.temperature):.2f}; over the class mean "
            f"{float(gains.mean()):+.2f} points, least {float(gains.min()):+.2f}"
        )

    def _logits(self, held: HeldOut, settings: TaskSettings) -> Tensor:
        return held.logits(settings)[:, held.folds.left_out]

    def _changed(self, name: str, value: Any) -> TaskSettings:
        if name == "scale":
            return replace(self.settings, scale=value[0], prior=value[1])
        return replace(self.settings, **{name: self._single(value)})  # type: ignore[arg-type]

    def _starting(self, values: Mapping[str, float]) -> TaskSettings:
        made: dict[str, Any] = {name: self._single(v) if name in TENSORS else v for name, v in values.items()}
        return TaskSettings(**made)

    def _single(self, value: float) -> Tensor:
        """A hyper-parameter of all tasks."""
        return torch.tensor([value], device=self.device)


def _shown(value: float | tuple[float, float]) -> str:
    """A candidate as text: a number, or s and rho."""
    return f"{value:g}" if isinstance(value, float) else f"{value[0]:g}/{value[1]:g}"


def _factor(metadiff: MetaDiff, tasks: Sequence[DomainTasks]) -> float:
    """The factor on the logits of a metadiff that fits them best."""
    logits = torch.cat([adapted(metadiff, task).logits(task.query).flatten(0, 1) for task in tasks])
    return best_temperature(logits, torch.cat([task.labels.repeat(len(task.query)) for task in tasks]))


def _class_mean(metric: Metric, task: DomainTasks) -> Tensor:
    """Accuracy in percent of the better of the raw and the centred class mean, on the first group of features."""
    x, q = (metric.split(t)[0] for t in (task.support.x, task.query))
    means = metric.split(task.support.means())[0]
    origins = [x.new_zeros(1, 1, x.shape[-1]), means.mean(dim=1, keepdim=True)]
    return torch.stack([_accuracy(cosine_logits(q, means, centre=origin), task.labels) for origin in origins]).amax()


def _accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """In percent, of logits (B, M, N) and labels (M,)."""
    return 100 * (logits.argmax(dim=-1) == labels).float().mean()


def _usual(metric: Metric, validation: ValidationTasks) -> Usual | None:
    """The shift of tasks of validation classes, from which that of a task from elsewhere is told."""
    if metric.space is None or not metric.plain:
        return None
    found = {}
    for pair in validation:
        supports = [task.support for task in validation.tasks(*pair)]
        stats = [metric.stats(s.means() - metric.origin, count_of(s.counts)) for s in supports]
        found[pair] = torch.cat([shift_of(each) for each in stats])
    deviation = math.sqrt(float(torch.stack([values.var() for values in found.values()]).mean()))
    return Usual(TaskTable.of({pair: float(values.mean()) for pair, values in found.items()}), max(deviation, 1e-3))
