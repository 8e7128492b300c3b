"""Unlabelled images of the same task: guidance of the sampler by them, and the transductive controls of the field.

Guidance (design, section 2): the mixture likelihood of the pool joins that of the support. At each step the class
proportions of the pool are estimated, by expectation-maximisation with the classifier of that step, and every image is
shared out among the classes by its responsibilities under them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from metadiff_cli.core.method.denoisers import SupportStats
from metadiff_cli.core.method.metric import blend, cosine_logits
from metadiff_cli.core.method.task_space import TaskSpace

Guide = Callable[[Tensor], SupportStats]

# of expectation-maximisation a step. Proportions that follow the classifier with a step's delay are still near equal
# when the first images are shared out, and a class that makes up most of the pool then drags all others to itself.
ROUNDS = 10
FEW = 2.0  # smoothing grows by this factor over the images a class: the proportions of few images are mostly chance


@dataclass(frozen=True)
class PoolGuidance:
    """Constants of the guidance; `sharpness` is a factor on the calibrated logit scale of the task."""

    sharpness: float = 1.25  # s_r, of the responsibilities
    smoothing: float = 8.0  # a, Dirichlet smoothing of the class proportions of a large pool, in images a class
    weight: float = 0.3  # omega, of one unlabelled image beside a labelled one


def pool_guide(
    space: TaskSpace, stats: SupportStats, pool: Tensor, guidance: Tensor | float, scale: float, how: PoolGuidance
) -> Guide:
    """x0 -> support statistics that take in a pool (B, P, D) of unlabelled images by their responsibilities.

    `guidance` and `scale` are those of the task's classifier; `stats` carry the guidance already.
    """
    points, noise = space.to_task(pool), space.precision.sqrt()  # (B, P, D), (D,)
    whitened, plain = (
        F.normalize(points * noise, dim=-1),
        F.normalize(space.plain(pool), dim=-1),
    )  # once, not at every step
    tasks, ways, _ = stats.mean.shape
    proportions = torch.full((tasks, 1, ways), 1 / ways, device=pool.device)
    images = pool.shape[1]
    smoothing = how.smoothing * (1 + FEW * ways / images)

    def guide(x0: Tensor) -> SupportStats:
        nonlocal proportions
        cosines = blend(_cosines(whitened, x0 * noise), _cosines(plain, space.plain(space.to_feature(x0))), guidance)
        logits = how.sharpness * scale * cosines
        for _ in range(ROUNDS):
            total = (logits + proportions.log()).softmax(dim=-1).sum(dim=1, keepdim=True)  # (B, 1, N)
            proportions = (smoothing + total) / (ways * smoothing + images)
        share = (logits + proportions.log()).softmax(dim=-1)  # (B, P, N)
        total = share.sum(dim=1, keepdim=True)
        extra = how.weight * total.transpose(1, 2)  # (B, N, 1)
        count = stats.count + extra
        sums = stats.count * stats.mean + how.weight * share.transpose(1, 2) @ points
        return SupportStats(sums / count, count, stats.precision)

    return guide


def _cosines(unit: Tensor, weights: Tensor) -> Tensor:
    """(B, P, N) of points of unit length (B, P, D) to weights (B, N, D)."""
    return unit @ F.normalize(weights, dim=-1).transpose(1, 2)


def soft_kmeans(support: Tensor, query: Tensor, scale: float, steps: int = 1) -> Tensor:
    """Probabilities (B, Q, N) of soft k-means from the class means (Ren et al. 2018), with cosine similarity.

    `support` (B, N, K, D), `query` (B, Q, D); `scale` is that of the prototype's logits.
    """
    sums, shots = support.sum(dim=2), support.shape[2]
    means = sums / shots
    for _ in range(steps):
        share = cosine_logits(query, means, scale).softmax(dim=-1)  # (B, Q, N)
        means = (sums + share.transpose(1, 2) @ query) / (shots + share.sum(dim=1).unsqueeze(-1))
    return cosine_logits(query, means, scale).softmax(dim=-1)


def label_propagation(
    support: Tensor, query: Tensor, neighbours: int = 10, alpha: float = 0.8, sharpness: float = 10.0
) -> Tensor:
    """Probabilities (B, Q, N) of label propagation over a graph of nearest neighbours (Zhou et al. 2004, eq. 3).

    Edges weigh exp(sharpness * cosine) between images that are among each other's `neighbours`; labels spread from
    `support` (B, N, K, D) to `query` (B, Q, D) as F = (1 - alpha S)^-1 Y.
    """
    tasks, ways, shots, size = support.shape
    nodes = F.normalize(torch.cat([support.reshape(tasks, ways * shots, size), query], dim=1), dim=-1)
    similarity = nodes @ nodes.transpose(1, 2)
    similarity.diagonal(dim1=1, dim2=2).fill_(-1.0)
    near = similarity.topk(min(neighbours, nodes.shape[1] - 1), dim=-1).indices
    kept = torch.zeros_like(similarity).scatter_(2, near, 1.0)
    weights = (sharpness * similarity).exp() * torch.maximum(kept, kept.transpose(1, 2))
    root = weights.sum(dim=-1).clamp_min(1e-12).rsqrt()
    spread = root.unsqueeze(2) * weights * root.unsqueeze(1)
    labels = torch.zeros(tasks, nodes.shape[1], ways, device=support.device)
    labels[:, : ways * shots] = torch.eye(ways, device=support.device).repeat_interleave(shots, dim=0)
    eye = torch.eye(nodes.shape[1], device=support.device)
    found: Tensor = torch.linalg.solve(eye - alpha * spread, labels)[:, ways * shots :].clamp_min(1e-12)
    return found / found.sum(dim=-1, keepdim=True)
