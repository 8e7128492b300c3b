"""Evaluation on episodes: every method on the same ones, with intervals and paired differences.

`evaluate` is a generator: it yields the number of episodes done and returns the results.
"""

import math
from collections.abc import Callable, Container, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from metadiff_cli.core.device import sent
from metadiff_cli.core.encoders.bank import Bank, Encoding, FeatureBank, extract
from metadiff_cli.core.encoders.image_encoder import ImageEncoder
from metadiff_cli.core.evaluation.episodes import Episodes, check_episodes, episode_batches
from metadiff_cli.core.method.adapt import MetaDiff, Sampling, adapt_tasks, ranks_of, seeds_of
from metadiff_cli.core.method.calibration import calibration_error, reliability
from metadiff_cli.core.method.metric import Metric, cosine_logits
from metadiff_cli.core.method.support import TaskSupport

BATCH_VALUES = 24_000_000  # numbers in the features of one batch of episodes: about 100 MB
PART = 4096  # images that are expanded at once
IN_MEMORY = 2 << 30  # bytes of expanded features that may be kept
BATCHES = 16  # or more, where there are as many episodes: progress is reported after each

QUICK_WAY = 5  # of the measurement of an encoder between epochs


@dataclass(frozen=True)
class Protocol:
    """Which episodes: N ways, K shots, Q queries a class; how many; the seed. `imbalance` is a Dirichlet parameter."""

    way: int = 5
    shot: int = 1
    query: int = 15
    episodes: int = 1000
    seed: int = 0
    transductive: bool = False
    imbalance: float | None = None


Method = Callable[[Tensor, Tensor, Episodes, int], Tensor]
Expanded = Callable[[np.ndarray], Tensor]  # rows (...) of a bank -> x (..., J)


@dataclass
class Scores:
    """Of one method: accuracy of each episode in 0..1, and confidence and correctness of each query."""

    accuracy: list[Tensor] = field(default_factory=list)
    confidence: list[Tensor] = field(default_factory=list)
    correct: list[Tensor] = field(default_factory=list)

    def add(self, probabilities: Tensor, labels: Tensor) -> None:
        """Take in probabilities (B, M, N) and labels (B, M)."""
        confidence, predicted = probabilities.max(dim=-1)
        correct = predicted == labels
        self.accuracy.append(correct.cpu().double().mean(dim=1))  # not every device has float64
        self.confidence.append(confidence.flatten().cpu())
        self.correct.append(correct.flatten().cpu())

    def reliability(self) -> list[dict[str, float]]:
        """Bins of the reliability diagram; see `calibration.reliability`."""
        return reliability(torch.cat(self.confidence), torch.cat(self.correct))

    def joined(self, other: "Scores") -> "Scores":
        """The episodes of both."""
        return Scores(self.accuracy + other.accuracy, self.confidence + other.confidence, self.correct + other.correct)


def expanded(metric: Metric, bank: FeatureBank, device: torch.device) -> Expanded:
    """Return what gives expanded features x (..., J) of rows (...): all at once, where they fit into IN_MEMORY."""
    if 4 * sum(metric.parts) * len(bank.labels) > IN_MEMORY:
        return lambda rows: metric.expand(sent(bank.take(rows), device))
    parts = np.array_split(np.arange(len(bank.labels)), math.ceil(len(bank.labels) / PART))
    x = torch.cat([metric.expand(sent(bank.take(rows), device)) for rows in parts])
    return lambda rows: F.embedding(sent(torch.from_numpy(rows), device), x)  # faster than an index


def method_of(
    metadiff: MetaDiff, bank: FeatureBank, sampling: Sampling, protocol: Protocol, device: torch.device,
    x: Expanded | None = None,
) -> Method:  # fmt: skip
    """Return adaptation with a metadiff as a method for episodes of `bank`.

    `x` is what `expanded` gives for the same metric and bank, where several methods share it.
    """
    x = x or expanded(metadiff.metric, bank, device)

    def run(support: Tensor, query: Tensor, episodes: Episodes, first: int) -> Tensor:
        queries = x(episodes.query)
        classifier = adapt_tasks(
            metadiff, TaskSupport.even(x(episodes.support)), sampling, ranks=ranks_of(episodes.classes),
            seeds=seeds_of(protocol.seed, first, len(queries)), pool=queries if protocol.transductive else None,
        )  # fmt: skip
        return classifier.probabilities(queries)

    return run


def evaluate(
    bank: Bank, methods: Mapping[str, Method], protocol: Protocol, device: torch.device
) -> Generator[int, None, dict[str, Scores]]:
    """Scores of each method on the protocol's episodes. Raises DataError when the classes do not suffice."""
    indices = bank.class_indices()
    largest = None if protocol.imbalance is None else 2 * protocol.query
    check_episodes(indices, bank.classes, protocol.way, protocol.shot, protocol.query, largest)
    rows = protocol.way * (protocol.shot + protocol.query)
    batch = max(1, min(math.ceil(protocol.episodes / BATCHES), BATCH_VALUES // (rows * bank.numbers_per_image)))
    scores = {name: Scores() for name in methods}
    for first, episodes in zip(range(0, protocol.episodes, batch), episode_batches(
        indices, protocol.way, protocol.shot, protocol.query,
        count=protocol.episodes, batch=batch, seed=protocol.seed, imbalance=protocol.imbalance,
    ), strict=True):  # fmt: skip
        support = sent(bank.take(episodes.support), device)  # (B, N, K, D)
        query = sent(bank.take(episodes.query), device)  # (B, M, D)
        labels = sent(torch.from_numpy(episodes.labels), device)
        for name, method in methods.items():
            scores[name].add(method(support, query, episodes, first), labels)
        yield min(protocol.episodes, first + batch)
    return scores


def summarise(
    scores: Mapping[str, Scores], against: Sequence[str] = ("prototype", "analytic"), calibrated: Container[str] = ()
) -> dict[str, dict[str, Any]]:
    """Accuracy with 95 % interval, calibration error and paired differences of each method, in percent.

    The calibration error is None for a method whose temperature was not fitted: it would say nothing about the method.
    """
    per_episode = {name: 100 * torch.cat(s.accuracy) for name, s in scores.items()}
    summary: dict[str, dict[str, Any]] = {}
    for name, values in per_episode.items():
        mean, half = mean_interval(values)
        ece = None
        if name in calibrated:
            ece = calibration_error(torch.cat(scores[name].confidence), torch.cat(scores[name].correct))
        summary[name] = {"accuracy": mean, "ci95": half, "ece": ece}
        for other in against:
            if other in per_episode and other != name:
                difference, half = mean_interval(values - per_episode[other])
                summary[name][f"paired_to_{other}"] = {"difference": difference, "ci95": half}
    return summary


def mean_interval(values: Tensor) -> tuple[float, float]:
    """Mean and half-width of its 95 % interval (normal approximation over episodes)."""
    if len(values) < 2:
        return float(values.mean()), 0.0
    return float(values.mean()), float(1.96 * values.std() / np.sqrt(len(values)))


def run_through(
    steps: Generator[int, None, dict[str, Scores]], progress: Callable[[int], None] = lambda done: None
) -> dict[str, Scores]:
    """Consume `evaluate`, reporting the episodes done; returns its result."""
    while True:
        try:
            progress(next(steps))
        except StopIteration as stop:
            result: dict[str, Scores] = stop.value
            return result


def quick_accuracy(
    encoder: ImageEncoder,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    batch: int | None,
    seed: int,
    per_class: int = 100,
    episodes: int = 600,
) -> float | None:
    """1-shot accuracy in percent of the cosine class mean, on at most `per_class` images per class.

    For the progress of pretraining: QUICK_WAY ways, or all classes if there are fewer. None when there are too few
    classes or images.
    """
    classes, counts = np.unique(labels, return_counts=True)
    classes = classes[counts > 1]  # one image is no support and query
    if len(classes) < 2:
        return None
    rows = np.concatenate([np.flatnonzero(labels == c)[:per_class] for c in classes])
    bank = FeatureBank(np.empty(0), np.searchsorted(classes, labels[rows]), tuple(str(c) for c in classes))
    indices = bank.class_indices()
    query = min(15, min(len(i) for i in indices) - 1)
    z = torch.cat([part.float() for part in extract(Encoding(encoder, batch), images[rows])])
    hits = []
    for part in episode_batches(indices, min(QUICK_WAY, len(classes)), 1, query, count=episodes, batch=100, seed=seed):
        support, queries = z[part.support].squeeze(2), z[part.query]
        predicted = cosine_logits(queries, F.normalize(support, dim=-1)).argmax(dim=-1)
        hits.append((predicted == torch.from_numpy(part.labels).to(predicted.device)).float().mean(dim=1))
    return 100 * float(torch.cat(hits).mean())
