"""Two views of generated weights: are they copies of training weights, and how do they travel from noise to targets?

A denoiser that recites its training weights gives angles near zero. Angles are taken in task space, where the training
weights look like N(0, I). They do not see the length of a weight: shrinkage alone makes nothing look new.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from metadiff_cli.core.encoders.bank import FeatureBank
from metadiff_cli.core.evaluation.episodes import episode_batches, sample_episode
from metadiff_cli.core.evaluation.evaluate import Protocol
from metadiff_cli.core.method.adapt import MetaDiff, Sampling, adapt_tasks, ranks_of, seeds_of, trace_tasks
from metadiff_cli.core.method.support import TaskSupport

DRAWS = 4  # of starting noise
MOST_CLASSES = 5  # more would hide one another


@dataclass(frozen=True)
class Trajectories:
    """Of one task: its N classes, targets (N, 2), and the weights (S + 1, R, N, 2) of R draws, the noise first.

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

    The plane is that of the two principal components of the targets in task space (with two classes: their line, and
    the direction across it in which noise spreads most).
    """
    indices, way = bank.class_indices(), min(protocol.way, MOST_CLASSES)
    episode = sample_episode(indices, way, protocol.shot, protocol.query, seed=protocol.seed, index=0)
    path = trace_tasks(
        metadiff, TaskSupport.even(bank.take(episode.support).to(device).expand(DRAWS, -1, -1, -1)),
        replace(sampling, samples=1, temperature=1.0), ranks=ranks_of(episode.classes).expand(DRAWS, -1),
        seeds=seeds_of(protocol.seed, 0, DRAWS),
    )  # fmt: skip
    chosen = [int(c) for c in episode.classes[0]]
    means = torch.stack([bank.take(indices[c]).mean(dim=0) for c in chosen]).to(device)
    targets, weights = metadiff.space.to_task(means), metadiff.space.to_task(path)
    plane, shares = principal_plane(targets)
    centre = targets.mean(dim=0)
    flat_targets, flat_weights = (((v - centre) @ plane).cpu() for v in (targets, weights))
    return Trajectories(tuple(bank.classes[c] for c in chosen), flat_targets, flat_weights, shares)


def principal_plane(points: Tensor) -> tuple[Tensor, tuple[float, float]]:
    """Two orthonormal directions (D, 2) in which points (N, D) spread most, and their shares of the variance."""
    _, values, directions = torch.linalg.svd(points - points.mean(dim=0), full_matrices=len(points) < 3)
    # a sign of its own each, which svd leaves open
    plane = directions[:2].T
    plane = plane * plane.gather(0, plane.abs().argmax(dim=0, keepdim=True)).sign()
    variance = values.square() / values.square().sum().clamp_min(1e-12)
    return plane, (float(variance[0]), float(variance[1]))


EPISODES = 100  # of the protocol's own that are looked at


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
    metadiff: MetaDiff, targets: Tensor, bank: FeatureBank, protocol: Protocol, sampling: Sampling
) -> Novelty:
    """Novelty of the weights of the first episodes; `targets` (C, D) are the training weights in task space."""
    nearest = []
    for part in episode_batches(
        bank.class_indices(), protocol.way, protocol.shot, protocol.query,
        count=min(EPISODES, protocol.episodes), batch=25, seed=protocol.seed, imbalance=protocol.imbalance,
    ):  # fmt: skip
        support = bank.take(part.support).to(targets.device)
        seeds = seeds_of(protocol.seed, 0, len(support))
        classifier = adapt_tasks(metadiff, support, sampling, ranks=ranks_of(part.classes), seeds=seeds)
        nearest.append(_nearest(metadiff.space.to_task(classifier.weights).flatten(0, -2), targets))
    generated, between = torch.cat(nearest), _nearest(targets, targets, itself=True)
    nearer = 100 * float((generated < between.min()).float().mean())
    return Novelty(float(generated.mean()), float(between.mean()), nearer, len(generated))


def _nearest(points: Tensor, targets: Tensor, *, itself: bool = False) -> Tensor:
    """Angle in degrees (n,) of each point (n, D) to the nearest target (C, D); with `itself`, to the nearest other."""
    cosines = F.normalize(points, dim=1) @ F.normalize(targets, dim=1).T
    if itself:
        cosines.fill_diagonal_(-1.0)
    return torch.rad2deg(cosines.max(dim=1).values.clamp(-1, 1).acos())
