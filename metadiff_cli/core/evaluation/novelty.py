"""Are generated weights copies? Their angle to the nearest training weight, beside that between training weights.

A denoiser that recites the weights it was trained on gives angles near zero. Angles are taken in task space, where the
training weights look like N(0, I), and do not see the length of a weight: shrinkage alone makes nothing look new.
"""

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from metadiff_cli.core.encoders.bank import FeatureBank
from metadiff_cli.core.evaluation.episodes import episode_batches
from metadiff_cli.core.evaluation.evaluate import Protocol
from metadiff_cli.core.method.adapt import MetaDiff, Sampling, adapt_tasks, ranks_of, seeds_of

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
