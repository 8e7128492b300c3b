"""What is fitted on validation classes once the denoiser stands: centring, guidance default, calibration, the threshold
of rejection, and whether the learned part is kept."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from metadiff_cli.core.encoders.bank import FeatureBank
from metadiff_cli.core.evaluation.episodes import Episodes, episode_batches
from metadiff_cli.core.evaluation.evaluate import Protocol, evaluate, lengths_for, mean_interval, method_of, run_through
from metadiff_cli.core.method.adapt import MetaDiff, Sampling, Tuning, adapt_tasks, ranks_of, seeds_of
from metadiff_cli.core.method.calibration import Rejection, TaskTable, best_scale, fit_calibration
from metadiff_cli.core.method.denoisers import AnalyticDenoiser
from metadiff_cli.core.method.guidance import GUIDANCE_GRID, PROTOTYPE, Usual, shift_of
from metadiff_cli.core.method.metric import cosine_logits
from metadiff_cli.core.method.rejection import LEAVE_ONE_OUT, RATE, rejector_of
from metadiff_cli.core.method.support import support_stats
from metadiff_cli.core.method.task_space import ClassStatistics

EPISODES = 400
SHRINKAGE = ((0.5, 0.3), (0.8, 0.3), (0.95, 0.3))  # within and between: a longer training wants more within
KEPT = 0.8  # of the gain over the prototype: the default guidance is the largest scale that keeps this share of it
SEED = 7919  # added to the seed: these episodes are neither those of selection nor those of the final table


def paired_gain(metadiff: MetaDiff, bank: FeatureBank, protocol: Protocol, device: torch.device) -> tuple[float, float]:
    """Accuracy of a metadiff minus that of its analytic form on the same episodes: points and half-width of 95 %."""
    ours = partial(method_of, sampling=Sampling(), protocol=protocol)
    lengths = lengths_for(metadiff.space, bank, protocol, device)
    methods = {"learned": ours(metadiff, lengths=lengths), "analytic": ours(metadiff.analytic(), lengths=lengths)}
    scores = run_through(evaluate(bank, methods, protocol, device))
    first, second = (100 * torch.cat(scores[name].accuracy) for name in ("learned", "analytic"))
    return mean_interval(first - second)


def choose_shrinkage(
    statistics: ClassStatistics, bank: FeatureBank, device: torch.device, *, seed: int
) -> tuple[float, float]:
    """The pair of SHRINKAGE with the best 1-shot and 5-shot accuracy of the analytic denoiser on the classes of `bank`.

    An encoder that fits its base classes closely pulls their images together as it does not those of new classes, and
    their covariance says less about new ones.
    """
    indices = bank.class_indices()
    smallest = min(len(rows) for rows in indices)
    shots = [shot for shot in (1, 5) if shot < smallest] or [1]
    tasks = _Tasks(bank, indices, max(1, min(15, smallest - shots[-1])), seed + SEED, device)
    totals = []
    for within, between in SHRINKAGE:
        space = statistics.task_space(within, between).to(device)
        metadiff = MetaDiff(space, AnalyticDenoiser(), False, Tuning())
        totals.append(sum(tasks.accuracy(min(5, len(indices)), shot, _logits(metadiff, 1.0)) for shot in shots))
    return SHRINKAGE[int(np.argmax(totals))]


def fit_tuning(metadiff: MetaDiff, bank: FeatureBank, device: torch.device, *, seed: int, query: int = 15) -> Tuning:
    """Fit on the classes of `bank`, which should be validation classes. Too few images lower shots and queries."""
    indices = bank.class_indices()
    smallest = min(len(rows) for rows in indices)
    query = max(1, min(query, smallest - 1))
    ways = [way for way in (5, 10, 20) if way <= len(indices)] or [len(indices)]
    shots = [shot for shot in (1, 2, 5, 10) if shot + query <= smallest] or [1]
    tasks = _Tasks(bank, indices, query, seed + SEED, device)
    tuning = replace(metadiff.tuning, centred_prototype=_centre_helps(metadiff, tasks, ways[0], shots))
    metadiff = metadiff.tuned(tuning)
    metadiff = metadiff.tuned(replace(tuning, guidance=_default_guidance(metadiff, tasks, ways[0])))
    pairs = [(way, shot) for way in ways for shot in shots]
    if tuning.shared > 0:
        metadiff = metadiff.tuned(replace(metadiff.tuning, usual=_usual(metadiff, tasks, pairs)))
    ours = {pair: best_scale(*tasks.collect(*pair, _logits(metadiff))) for pair in pairs}
    theirs = {pair: best_scale(*tasks.collect(*pair, _prototype(metadiff))) for pair in pairs}
    tuning = replace(metadiff.tuning, calibration=fit_calibration(ours), prototype_calibration=fit_calibration(theirs))
    return replace(tuning, rejection=fit_rejection(metadiff.tuned(tuning), bank, device, seed=seed, query=query))


def fit_rejection(
    metadiff: MetaDiff, bank: FeatureBank, device: torch.device, *, seed: int, query: int = 15
) -> Rejection | None:
    """The threshold below which RATE of the images of a task's own classes fall, for a grid of ways and shots.

    No unknown image is needed. None when the metadiff does not have the weights of its base classes. Fit last: the
    threshold depends on all other tuning.
    """
    if metadiff.targets is None:
        return None
    indices = bank.class_indices()
    smallest = min(len(rows) for rows in indices)
    query = max(1, min(query, smallest - LEAVE_ONE_OUT))
    ways = sorted({min(way, len(indices)) for way in (2, 5, 10, 20)})
    shots = [shot for shot in (1, 2, 5, 10) if shot + query <= smallest] or [1]
    tasks = _Tasks(bank, indices, query, seed + SEED, device)
    margins = {
        (way, shot): tasks.collect(way, shot, _margins(metadiff, way), max(100, 1000 // way))[0]
        for way in ways
        for shot in shots
    }
    return Rejection(TaskTable.of({pair: float(values.quantile(RATE)) for pair, values in margins.items()}), RATE)


Cosines = Callable[[Tensor, Tensor, Episodes], Tensor]


class _Tasks:
    """Episodes of validation classes, drawn again for each measurement so that every one sees the same."""

    def __init__(
        self, bank: FeatureBank, indices: list[np.ndarray], query: int, seed: int, device: torch.device
    ) -> None:
        self.bank, self.indices, self.query, self.seed, self.device = bank, indices, query, seed, device

    def collect(self, way: int, shot: int, cosines: Cosines, episodes: int | None = None) -> tuple[Tensor, Tensor]:
        """What `cosines` gives, as (M, N), of all queries of all episodes, and their labels (M,)."""
        found = []
        count = EPISODES if episodes is None else episodes
        for part in episode_batches(self.indices, way, shot, self.query, count=count, batch=25, seed=self.seed):
            support = self.bank.take(part.support).to(self.device)
            query = self.bank.take(part.query).to(self.device)
            values = cosines(support, query, part).flatten(0, 1).cpu()
            found.append((values, torch.from_numpy(part.labels).flatten()))
        all_values, all_labels = zip(*found, strict=True)
        return torch.cat(all_values), torch.cat(all_labels)

    def accuracy(self, way: int, shot: int, cosines: Cosines) -> float:
        """In percent."""
        values, labels = self.collect(way, shot, cosines)
        return 100 * float((values.argmax(dim=1) == labels).float().mean())


def _logits(metadiff: MetaDiff, guidance: float | None = None) -> Cosines:
    sampling = Sampling(guidance=guidance)

    def logits(support: Tensor, query: Tensor, episodes: Episodes) -> Tensor:
        classifier = adapt_tasks(
            metadiff, support, sampling, ranks=ranks_of(episodes.classes), seeds=seeds_of(0, 0, len(support))
        )
        return classifier.logits(query)

    return logits


def _margins(metadiff: MetaDiff, way: int) -> Cosines:
    """Known scores relative to the left-out ones of the support, (B, Q)."""
    none = Rejection(TaskTable((way,), (1, LEAVE_ONE_OUT), ((0.0, 0.0),)), RATE)
    metadiff = metadiff.tuned(replace(metadiff.tuning, rejection=none))

    def margins(support: Tensor, query: Tensor, episodes: Episodes) -> Tensor:
        classifier = adapt_tasks(
            metadiff, support, Sampling(), ranks=ranks_of(episodes.classes), seeds=seeds_of(0, 0, len(support))
        )
        return rejector_of(metadiff, classifier, support).margins(query)

    return margins


def _prototype(metadiff: MetaDiff) -> Cosines:
    centre = metadiff.space.mean if metadiff.tuning.centred_prototype else None
    return lambda support, query, episodes: cosine_logits(query, support.mean(dim=2), centre=centre)


def _usual(metadiff: MetaDiff, tasks: _Tasks, pairs: Sequence[tuple[int, int]]) -> Usual:
    """The shift of tasks of validation classes, from which that of a task from elsewhere is told."""

    def shift(support: Tensor, query: Tensor, episodes: Episodes) -> Tensor:
        found = shift_of(support_stats(metadiff.space.to_task(support), metadiff.space.precision))
        return found.view(-1, 1, 1).expand(-1, query.shape[1], 1)

    found = {pair: tasks.collect(*pair, shift)[0] for pair in pairs}
    deviation = math.sqrt(float(torch.stack([values.var() for values in found.values()]).mean()))
    return Usual(TaskTable.of({pair: float(values.mean()) for pair, values in found.items()}), max(deviation, 1e-3))


def _centre_helps(metadiff: MetaDiff, tasks: _Tasks, way: int, shots: list[int]) -> bool:
    totals = []
    for centred in (False, True):
        chosen = replace(metadiff, tuning=replace(metadiff.tuning, centred_prototype=centred))
        totals.append(sum(tasks.accuracy(way, shot, _prototype(chosen)) for shot in shots))
    return totals[1] > totals[0]


def _default_guidance(metadiff: MetaDiff, tasks: _Tasks, way: int) -> float:
    """The largest scale that keeps KEPT of the best 1-shot gain over the prototype.

    Images from another world than the base classes want a large scale, and with one image per class the support does
    not tell; so as much of the prior is given up as costs next to nothing at home.
    """
    prototype = tasks.accuracy(way, 1, _prototype(metadiff))
    gains = {a: tasks.accuracy(way, 1, _logits(metadiff, a)) - prototype for a in GUIDANCE_GRID}
    best = max(gains.values())
    if best <= 0:
        return PROTOTYPE
    return max(a for a, gain in gains.items() if gain >= KEPT * best)
