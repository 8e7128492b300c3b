"""Three views of generated weights: are they copies of training weights, how do they move, and does the descent help?

Weights are seen in task space, where training weights look like N(0, I), relative to the domain of their task. Without
a task space they are seen as they are, and copies are not looked for.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from metadiff_cli.core.device import sent
from metadiff_cli.core.encoders.bank import FeatureBank
from metadiff_cli.core.evaluation.episodes import Episodes, episode_batches, sample_episode
from metadiff_cli.core.evaluation.evaluate import BATCH_VALUES, Expanded, Protocol
from metadiff_cli.core.method.adapt import MetaDiff, Sampling, adapt_tasks, ranks_of, seeds_of, trace_tasks
from metadiff_cli.core.method.metric import Metric
from metadiff_cli.core.method.support import TaskSupport

DRAWS = 4  # of starting noise
MOST_CLASSES = 5  # more would hide one another
EPISODES, PATH_EPISODES = 100, 50  # of the protocol's own that are looked at: for novelty, and for the path
AT_ONCE = 25  # of these episodes, at most


@dataclass(frozen=True)
class Trajectories:
    """Of one task: its N classes, targets (N, 2), and the weights (S, R, N, 2) of R draws after each of the S steps.

    `shares` are the parts (0..1) of the targets' variance that the two directions hold.
    """

    classes: tuple[str, ...]
    targets: Tensor
    weights: Tensor
    shares: tuple[float, float]

    def to_dict(self) -> dict[str, Any]:
        """For a page."""
        return {
            "classes": list(self.classes),
            "targets": self.targets.tolist(),
            "weights": self.weights.tolist(),
            "shares": list(self.shares),
        }


def trace_weights(
    metadiff: MetaDiff, bank: FeatureBank, protocol: Protocol, sampling: Sampling, device: torch.device
) -> Trajectories:
    """The first episode of the protocol, drawn at temperature 1; a target is the mean of all images of its class.

    The plane is that of the two principal components of the targets (with two classes: their line, and a direction
    across it).
    """
    metric, indices, way = metadiff.metric, bank.class_indices(), min(protocol.way, MOST_CLASSES)
    x = _expanding(metric, bank, device)
    episode = sample_episode(indices, way, protocol.shot, protocol.query, seed=protocol.seed, index=0)
    steps = trace_tasks(
        metadiff, TaskSupport.even(x(episode.support).expand(DRAWS, -1, -1, -1)),
        replace(sampling, samples=1, temperature=1.0), ranks=ranks_of(episode.classes).expand(DRAWS, -1),
        seeds=seeds_of(protocol.seed, 0, DRAWS),
    )  # fmt: skip
    path = [(classifier, placed(metric, step.weights)) for classifier, step in steps]
    chosen = [int(c) for c in episode.classes[0]]
    means = torch.stack([x(indices[c]).mean(dim=0) for c in chosen])
    targets = placed(metric, path[0][0].embed(means.unsqueeze(0))[0])  # all draws have one domain
    plane, shares = principal_plane(targets)
    centre = targets.mean(dim=0)
    flat_targets, flat_weights = (
        ((w - centre) @ plane).cpu() for w in (targets, torch.stack([weights for _, weights in path]))
    )
    return Trajectories(tuple(bank.classes[c] for c in chosen), flat_targets, flat_weights, shares)


def placed(metric: Metric, weights: Tensor) -> Tensor:
    """Return where weights W (..., J) of a classifier lie in task space, (..., D); without one, W itself."""
    return weights if metric.space is None else metric.whitened(weights) / metric.space.precision.sqrt()


def principal_plane(points: Tensor) -> tuple[Tensor, tuple[float, float]]:
    """Two orthonormal directions (D, 2) in which points (N, D) spread most, and their shares of the variance."""
    _, values, directions = torch.linalg.svd(points - points.mean(dim=0), full_matrices=len(points) < 3)
    # a sign of its own each, which svd leaves open
    plane = directions[:2].T
    plane = plane * plane.gather(0, plane.abs().argmax(dim=0, keepdim=True)).sign()
    variance = values.square() / values.square().sum().clamp_min(1e-12)
    return plane, (float(variance[0]), float(variance[1]))


@dataclass(frozen=True)
class Path:
    """After each of the S steps: accuracy of the queries in percent, and inner loss F in nats; means over tasks."""

    accuracy: tuple[float, ...]
    loss: tuple[float, ...]

    def to_dict(self) -> dict[str, list[float]]:
        """For a result document."""
        return {"accuracy": list(self.accuracy), "loss": list(self.loss)}


def measure_path(
    metadiff: MetaDiff, bank: FeatureBank, protocol: Protocol, sampling: Sampling, device: torch.device
) -> Path:
    """How accuracy and loss change from step to step, over the first episodes at temperature 0, without a pool."""
    x = _expanding(metadiff.metric, bank, device)
    sampling = replace(sampling, samples=1, temperature=0.0)
    tasks, sums = 0, torch.zeros(2, sampling.steps)
    for first, part in _first_episodes(metadiff.metric, bank, protocol, PATH_EPISODES):
        query, labels = x(part.query), torch.from_numpy(part.labels).to(device)
        seeds = seeds_of(protocol.seed, first, len(query))
        for classifier, step in trace_tasks(
            metadiff, TaskSupport.even(x(part.support)), sampling, ranks=ranks_of(part.classes), seeds=seeds
        ):
            right = (classifier.logits(query).argmax(dim=-1) == labels).float().mean(dim=1)  # (B,)
            sums[:, step.index] += torch.stack([100 * right.sum(), step.loss.sum()]).cpu()
        tasks += len(query)
    accuracy, loss = (sums / tasks).tolist()
    return Path(tuple(accuracy), tuple(loss))


@dataclass(frozen=True)
class Novelty:
    """Mean angles in degrees: a generated weight to the nearest training weight, a training weight to the next one."""

    generated_to_training: float
    training_to_training: float
    nearer: float  # share (percent) of generated weights nearer to a training weight than the closest two of those are
    weights: int

    def to_dict(self) -> dict[str, float]:
        """For a result document."""
        return asdict(self)


def measure_novelty(
    metadiff: MetaDiff, bank: FeatureBank, protocol: Protocol, sampling: Sampling, device: torch.device
) -> Novelty | None:
    """Novelty of the weights of the first episodes; None without a task space or the means of the base classes.

    A denoiser that recites its training weights gives angles near zero. Training weights are seen in the metric of each
    task, and relative to its domain; among themselves, relative to the mean of the base classes.
    """
    metric, targets = metadiff.metric, metadiff.targets
    if metric.space is None or targets is None:
        return None
    x, known = _expanding(metric, bank, device), metric.expand(targets.to(device))
    nearest = []
    for first, part in _first_episodes(metric, bank, protocol, EPISODES):
        support = TaskSupport.even(x(part.support))
        seeds = seeds_of(protocol.seed, first, len(support.x))
        classifier = adapt_tasks(metadiff, support, sampling, ranks=ranks_of(part.classes), seeds=seeds)
        for task, weights in enumerate(classifier.weights.unbind(dim=1)):  # (M, N, J)
            domain, parts = classifier.domain[task : task + 1], classifier.parts[task : task + 1]
            training = placed(metric, metric.embed(known.unsqueeze(0), domain, parts)[0])
            nearest.append(_nearest(placed(metric, weights.flatten(0, 1)), training))
    generated = torch.cat(nearest)
    training = metric.space.to_task(targets.to(device))
    between = _nearest(training, training, itself=True)
    nearer = 100 * float((generated < between.min()).float().mean())
    return Novelty(float(generated.mean()), float(between.mean()), nearer, len(generated))


def _expanding(metric: Metric, bank: FeatureBank, device: torch.device) -> Expanded:
    """Expands features when they are asked for: few episodes see few of the images."""
    return lambda rows: metric.expand(sent(bank.take(rows), device))


def _first_episodes(metric: Metric, bank: FeatureBank, protocol: Protocol, most: int) -> Iterator[tuple[int, Episodes]]:
    """The first episodes of the protocol in batches, each with the number of its first one."""
    count = min(most, protocol.episodes)
    values = protocol.way * (protocol.shot + protocol.query) * sum(metric.parts)  # in the features of an episode
    batch = max(1, min(AT_ONCE, BATCH_VALUES // values))
    return zip(range(0, count, batch), episode_batches(
        bank.class_indices(), protocol.way, protocol.shot, protocol.query,
        count=count, batch=batch, seed=protocol.seed, imbalance=protocol.imbalance,
    ), strict=True)  # fmt: skip


def _nearest(points: Tensor, targets: Tensor, *, itself: bool = False) -> Tensor:
    """Angle in degrees (n,) of each point (n, D) to the nearest target (C, D); with `itself`, to the nearest other."""
    cosines = F.normalize(points, dim=1) @ F.normalize(targets, dim=1).T
    if itself:
        cosines.fill_diagonal_(-1.0)
    return torch.rad2deg(cosines.max(dim=1).values.clamp(-1, 1).acos())
