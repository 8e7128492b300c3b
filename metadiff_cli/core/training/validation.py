"""Episodes of validation domains: what the outer loop fits its hyper-parameters on.

Each bank holds the classes of one domain, and each combination of ways and shots has episodes of all domains that allow
them.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from metadiff_cli.core.encoders.bank import FeatureBank
from metadiff_cli.core.evaluation.episodes import Episodes, episode_batches
from metadiff_cli.core.evaluation.evaluate import Expanded, expanded
from metadiff_cli.core.method.adapt import MetaDiff, Sampling, TaskClassifier, adapt_tasks, ranks_of, seeds_of
from metadiff_cli.core.method.held_out import Folds, HeldOut
from metadiff_cli.core.method.metric import Metric
from metadiff_cli.core.method.support import TaskSupport
from metadiff_cli.errors import DataError

WAYS, SHOTS = (5, 10, 20), (1, 2, 5, 10)
QUERIES = 75  # of a task, at most
EPISODES, FEWEST = 400, 60  # of all domains together, and of each one at least
CHECKED = 100  # episodes of all domains together for temperatures, rejection and the controls
NUMBERS = 250_000_000  # in the features of the episodes that are in memory at once
SEED = 7919  # added to the seed: these episodes are neither those of selection nor those of the final table


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


class ValidationTasks:
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
            self.ways = [way for way in ways if way > 1 and self.allows(way)]
            self.shots = self.shots if self.ways else self.shots[:-1]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((way, shot) for way in self.ways for shot in self.shots)

    def tasks(self, way: int, shot: int) -> list[DomainTasks]:
        """Return the episodes of each domain that has the classes and images; the same ones whenever asked."""
        return self._tasks(way, shot, EPISODES)

    def allows(self, way: int) -> bool:
        """Whether some domain has so many classes, for each number of shots."""
        return all(self._able(way, shot) for shot in self.shots)

    def few_tasks(self, way: int, shot: int) -> list[DomainTasks]:
        """Return the first of these episodes, for what needs fewer of them."""
        return self._tasks(way, shot, CHECKED)

    def _tasks(self, way: int, shot: int, most: int) -> list[DomainTasks]:
        """Episodes, `most` of all domains together, or somewhat more where each has FEWEST."""
        able = self._able(way, shot)
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


def adapted(metadiff: MetaDiff, task: DomainTasks) -> TaskClassifier:
    """Return the classifiers of the episodes of a domain."""
    count = len(task.query)
    ranks = ranks_of(task.episodes.classes)
    return adapt_tasks(metadiff, task.support, Sampling(), ranks=ranks, seeds=seeds_of(0, 0, count))
