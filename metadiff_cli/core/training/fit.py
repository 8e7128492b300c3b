"""The outer loop: the hyper-parameters of the descent by ways and shots, fitted on validation classes and domains.

Each bank holds the classes of one validation domain. A candidate is scored on the same episodes of every domain by
`HeldOut`, with the queries as the images that are left out: all products of features are taken once, and a candidate
costs arithmetic on small matrices. The score is the mean gain over the class mean, and a domain that loses counts more.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metadiff_cli.core.encoders.bank import FeatureBank
from metadiff_cli.core.evaluation.controls import ANALYTIC, CONTROLS, ControlSettings, Fitted, fit_control
from metadiff_cli.core.evaluation.episodes import Episodes, episode_batches
from metadiff_cli.core.evaluation.evaluate import Protocol, evaluate, expanded, mean_interval, method_of, run_through
from metadiff_cli.core.method.adapt import (
    MetaDiff,
    Sampling,
    TaskClassifier,
    Tuning,
    adapt_tasks,
    ranks_of,
    seeds_of,
)
from metadiff_cli.core.method.calibration import Rejection, TaskTable, best_temperature
from metadiff_cli.core.method.descent import NO_DESCENT
from metadiff_cli.core.method.guidance import GUIDANCE_GRID, LEVEL_GRID, Usual, shift_of
from metadiff_cli.core.method.held_out import Folds, HeldOut
from metadiff_cli.core.method.metric import Metric, TaskSettings, cosine_logits
from metadiff_cli.core.method.rejection import RATE, rejector_of
from metadiff_cli.core.method.support import TaskSupport, count_of
from metadiff_cli.core.method.task_space import ClassStatistics
from metadiff_cli.errors import DataError

WAYS, SHOTS = (5, 10, 20), (1, 2, 5, 10)
QUERIES = 75  # of a task, at most
EPISODES, FEWEST = 400, 60  # of all domains together, and of each one at least
CHECKED = 100  # episodes of all domains together for temperatures, rejection and the controls
NUMBERS = 250_000_000  # in the features of the episodes that are in memory at once
SEED = 7919  # added to the seed: these episodes are neither those of selection nor those of the final table

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
SHARPEST = 1000.0  # the largest temperature
LOSS, BURDEN = 0.2, 3.0  # points below the class mean that a domain may lose, and what further ones count more

Note = Callable[[str], None]
Expanded = Callable[[np.ndarray], Tensor]


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
        pairs = Pairs(metric, banks, device, seed)
        searches = [_Search(metric, pairs.tasks(pairs.ways[0], shot)) for shot in pairs.shots[::2]]
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
    pairs = Pairs(metric, banks, device, seed)
    found: dict[tuple[int, int], TaskSettings] = {}
    for way, shot in pairs:
        search = _Search(metric, pairs.tasks(way, shot), found.get((pairs.ways[0], shot)) or _last(found))
        search.run(partial(_note_of, note, f"{way}-way {shot}-shot"))
        found[way, shot] = search.settings
    metadiff = metadiff.tuned(
        usual=_usual(metric, pairs),
        **{name: TaskTable.of({pair: float(getattr(s, name)) for pair, s in found.items()}) for name in START},
    )
    metadiff = _with_confidences(metadiff, pairs)
    return metadiff.tuning, fit_controls(metadiff, pairs)


def fit_confidences(metadiff: MetaDiff, banks: Sequence[FeatureBank], device: torch.device, *, seed: int) -> Tuning:
    """Return the tuning with temperatures and rejection fitted anew, as a learned denoiser needs it."""
    return _with_confidences(metadiff, Pairs(metadiff.metric, banks, device, seed)).tuning


def _with_confidences(metadiff: MetaDiff, pairs: "Pairs") -> MetaDiff:
    """The same with its temperatures corrected by a factor, and with the rejection that follows from them.

    Temperatures that were fitted for the hyper-parameters alone do not know the choice for each task.
    """
    fitted, corrected = metadiff.tuning.temperature, {}
    for pair in pairs:
        factor = _factor(metadiff, pairs.tasks(*pair, CHECKED))  # without bound where all images are correct
        corrected[pair] = min(max(factor * fitted.at(*pair), 1 / SHARPEST), SHARPEST)
    metadiff = metadiff.tuned(temperature=TaskTable.of(corrected))
    return metadiff.tuned(rejection=fit_rejection(metadiff, pairs))


def _note_of(note: Note, what: str, text: str) -> None:
    note(f"{what}: {text}")


def _last(found: dict[tuple[int, int], TaskSettings]) -> TaskSettings | None:
    return list(found.values())[-1] if found else None


def fit_rejection(metadiff: MetaDiff, pairs: "Pairs") -> Rejection:
    """Return the offsets of the threshold below which RATE of the images of a task's own classes fall.

    No unknown image is needed. Fit last: the threshold depends on all other tuning.
    """
    none = Rejection(TaskTable.constant(0.0), RATE)
    fitted = metadiff.tuned(rejection=none)
    offsets: dict[tuple[int, int], float] = {}
    for way in sorted({2, *pairs.ways}):
        for shot in pairs.shots:
            margins = []
            for task in pairs.tasks(way, shot, CHECKED):
                classifier = adapted(fitted, task)
                margins.append(rejector_of(fitted, classifier, task.support).margins(task.query).flatten())
            offsets[way, shot] = float(torch.cat(margins).quantile(RATE))
    return Rejection(TaskTable.of(offsets), RATE)


def fit_controls(metadiff: MetaDiff, pairs: "Pairs") -> Fitted:
    """Return what was fitted for each control, and the temperatures of the posterior mean without descent."""
    found: dict[str, list[ControlSettings]] = {name: [] for name in (*CONTROLS, ANALYTIC)}
    for way, shot in pairs:
        tasks = pairs.tasks(way, shot, CHECKED)
        domains = [task.plain() for task in tasks]
        for name in CONTROLS:
            found[name].append(fit_control(name, metadiff.metric, domains, way, shot))
        temperature = _factor(metadiff.without_descent(TaskTable.constant(1.0)), tasks)
        found[ANALYTIC].append(ControlSettings(way, shot, temperature=temperature))
    return {name: tuple(settings) for name, settings in found.items()}


@dataclass(frozen=True)
class DomainTasks:
    """Episodes of one domain: support and query (B, M, J) as expanded features, labels (M,) of the queries."""

    bank: FeatureBank
    support: TaskSupport
    query: Tensor
    labels: Tensor
    episodes: Episodes

    def plain(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return support (B, N, K, D), query (B, M, D) and labels as features z."""
        support, query = (
            self.bank.take(rows).to(self.query.device) for rows in (self.episodes.support, self.episodes.query)
        )
        return support, query, self.labels

    def held_out(self, metric: Metric) -> HeldOut:
        """Return what scores the queries for any hyper-parameters."""
        x = torch.cat([self.support.x, self.query], dim=1)
        labels = torch.cat([self.support.labels, self.labels])
        query = torch.arange(len(labels), device=labels.device) >= len(self.support.labels)
        return HeldOut(metric, TaskSupport(x, labels), Folds.apart(query))


class Pairs:
    """The combinations of ways and shots that the banks of some domains have images for, and their episodes.

    Each combination has episodes of one domain or more. Raises DataError where none of the banks has two classes of two
    images.
    """

    def __init__(self, metric: Metric, banks: Sequence[FeatureBank], device: torch.device, seed: int) -> None:
        self.size, self.seed, self.device = sum(metric.parts), seed + SEED, device
        self.banks = [(bank, bank.class_indices(), expanded(metric, bank, device)) for bank in banks]
        # what half of the domains have classes for: a fit on one of many says little about others
        most = sorted(len(indices) for _, indices, _ in self.banks)[len(banks) // 2]
        self.shots, self.ways = list(SHOTS), list[int]()
        while not self.ways:
            if not self.shots:
                raise DataError("a fit needs two validation classes of two images", hint="add images")
            ways = [way for way in WAYS if way <= most] or [most]
            self.ways = [way for way in ways if way > 1 and all(self._able(way, shot) for shot in self.shots)]
            self.shots = self.shots if self.ways else self.shots[:-1]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((way, shot) for way in self.ways for shot in self.shots)

    def tasks(self, way: int, shot: int, most: int | None = None) -> list[DomainTasks]:
        """Return the episodes of each domain that has the classes and images; the same ones whenever asked.

        They are `most` (by default EPISODES) of all domains together, or somewhat more where each has FEWEST.
        """
        able, most = self._able(way, shot), EPISODES if most is None else most
        each = max(most // max(len(able), 1), min(FEWEST, most // 5))
        return [self._episodes(bank, indices, x, way, shot, query, each, len(able)) for bank, indices, x, query in able]

    def _able(self, way: int, shot: int) -> list[tuple[FeatureBank, list[np.ndarray], Expanded, int]]:
        """The domains with such episodes: the rows of the classes that are drawn, and the queries per class.

        Half of the classes or more are drawn; those with fewer images than these are not.
        """
        found = []
        for bank, indices, x in self.banks:
            if len(indices) < way:
                continue
            sizes = sorted((len(rows) for rows in indices), reverse=True)
            room = sizes[max(way, math.ceil(len(sizes) / 2)) - 1] - shot
            query = min(QUERIES // 5, max(1, QUERIES // way), room)
            if query > 0:
                found.append((bank, [rows for rows in indices if len(rows) >= shot + query], x, query))
        return found

    def _episodes(
        self, bank: FeatureBank, indices: list[np.ndarray], x: Expanded, way: int, shot: int, query: int, count: int,
        domains: int,
    ) -> DomainTasks:  # fmt: skip
        count = max(1, min(count, NUMBERS // (domains * way * (shot + query) * self.size)))
        (part,) = episode_batches(indices, way, shot, query, count=count, batch=count, seed=self.seed)
        labels = torch.from_numpy(part.labels[0]).to(self.device)
        return DomainTasks(bank, TaskSupport.even(x(part.support)), x(part.query), labels, part)


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


def adapted(metadiff: MetaDiff, task: DomainTasks) -> TaskClassifier:
    """Return the classifiers of the episodes of a domain."""
    count = len(task.query)
    ranks = ranks_of(task.episodes.classes)
    return adapt_tasks(metadiff, task.support, Sampling(), ranks=ranks, seeds=seeds_of(0, 0, count))


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


def _usual(metric: Metric, pairs: Pairs) -> Usual | None:
    """The shift of tasks of validation classes, from which that of a task from elsewhere is told."""
    if metric.space is None or not metric.plain:
        return None
    found = {}
    for pair in pairs:
        each = [metric.stats(t.support.means() - metric.origin, count_of(t.support.counts)) for t in pairs.tasks(*pair)]
        found[pair] = torch.cat([shift_of(stats) for stats in each])
    deviation = math.sqrt(float(torch.stack([values.var() for values in found.values()]).mean()))
    return Usual(TaskTable.of({pair: float(values.mean()) for pair, values in found.items()}), max(deviation, 1e-3))
