"""Weights on their way from noise to their targets, seen in two dimensions."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from metadiff_cli.core.encoders.bank import FeatureBank
from metadiff_cli.core.evaluation.episodes import sample_episode
from metadiff_cli.core.evaluation.evaluate import Protocol
from metadiff_cli.core.method.adapt import MetaDiff, Sampling, ranks_of, seeds_of, trace_tasks
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
