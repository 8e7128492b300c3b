"""The cosine classifier, its support gradient, calibration of its confidence, and the choice of the guidance scale."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from metadiff_cli.core.denoiser import SupportStats
from metadiff_cli.core.task_space import TaskSpace

LOO_PENALTY = 0.25  # nats per factor of four away from the fitted default
PROTOTYPE = 1e6  # a guidance scale at which nothing is left of the prior
GUIDANCE_GRID = (1.0, 4.0, 16.0, 64.0, PROTOTYPE)
LOO_GRID = (1.0, 4.0, 16.0, PROTOTYPE)  # 64 is too near the prototype to be worth its maps


def cosine_logits(z: Tensor, weights: Tensor, scale: float | Tensor = 1.0, centre: Tensor | None = None) -> Tensor:
    """s * cos(z, w), (B, Q, N), of features z (B, Q, D) and weights (B, N, D), both relative to `centre` (D,)."""
    if centre is not None:
        z, weights = z - centre, weights - centre
    return scale * (F.normalize(z, dim=-1) @ F.normalize(weights, dim=-1).transpose(-1, -2))


def support_loss(w: Tensor, v: Tensor, precision: Tensor) -> Tensor:
    """L_S(w) = 1/2 sum_k (v_k - w)' diag(lambda) (v_k - w), (B, N), of w (B, N, D) and support v (B, N, K, D)."""
    return 0.5 * ((v - w.unsqueeze(2)).square() * precision).sum(dim=(2, 3))


def support_gradient(w: Tensor, stats: SupportStats) -> Tensor:
    """Gradient of `support_loss` at w (B, N, D) in closed form: K lambda (w - p)."""
    return stats.count * stats.precision * (w - stats.mean)


@dataclass(frozen=True)
class Calibration:
    """Logit scale s as a smooth function of the task: log s = base + shots log K + ways log N."""

    base: float = math.log(10.0)
    shots: float = 0.0
    ways: float = 0.0

    def scale(self, way: int, shot: float) -> float:
        """s for N ways and K shots (the mean over the classes when shots differ)."""
        return math.exp(self.base + self.shots * math.log(max(shot, 1.0)) + self.ways * math.log(way))

    def to_dict(self) -> dict[str, float]:
        """For a checkpoint's header."""
        return asdict(self)


def best_scale(cosines: Tensor, labels: Tensor) -> float:
    """The scale s that minimises the cross-entropy of s * cosines (M, N) against labels (M,); golden-section search."""
    low, high = math.log(0.5), math.log(500.0)
    ratio = (math.sqrt(5) - 1) / 2

    def loss(log_scale: float) -> float:
        return float(F.cross_entropy(cosines * math.exp(log_scale), labels))

    for _ in range(40):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        if loss(left) < loss(right):
            high = right
        else:
            low = left
    return math.exp((low + high) / 2)


def fit_calibration(points: Sequence[tuple[int, int, float]]) -> Calibration:
    """Least squares over (way, shot, best scale); a slope that the points cannot tell stays zero."""
    ways = np.log([p[0] for p in points])
    shots = np.log([p[1] for p in points])
    target = np.log([p[2] for p in points])
    columns = [np.ones(len(points))]
    vary = [bool(np.ptp(shots) > 0), bool(np.ptp(ways) > 0)]
    columns += [x for x, varies in zip((shots, ways), vary, strict=True) if varies]
    solution = list(np.linalg.lstsq(np.stack(columns, axis=1), target, rcond=None)[0])
    base = float(solution.pop(0))
    slopes = [float(solution.pop(0)) if varies else 0.0 for varies in vary]
    return Calibration(base, *slopes)


def calibration_error(confidence: Tensor, correct: Tensor, bins: int = 15) -> float:
    """Expected calibration error in percent, equal-width bins of confidence (M,) (Guo et al. 2017)."""
    bucket = (confidence * bins).long().clamp(0, bins - 1)
    gap = torch.zeros(bins, dtype=torch.float64)
    gap.index_add_(0, bucket, (confidence - correct.to(confidence)).double())
    return float(100 * gap.abs().sum() / max(len(confidence), 1))


def leave_one_out_guidance(
    z: Tensor, space: TaskSpace, scale: float, valid: Tensor | None = None, default: float = 1.0
) -> Tensor:
    """Guidance scale a per task (B,), from the support features z (B, N, K, D) alone.

    For every a of the grid, each support image is classified with its own class's weight made without it, the others'
    with all images; the a with the lowest cross-entropy is taken, `default` being favoured by LOO_PENALTY (design,
    "How far to trust the prior"). Classes with one image say nothing about a. `valid` (B, N, K) where shots differ.
    """
    tasks, ways, shots, _ = z.shape
    v = space.to_task(z)
    mask = torch.ones(tasks, ways, shots, dtype=torch.bool, device=z.device) if valid is None else valid
    count = mask.sum(dim=2, keepdim=True).unsqueeze(-1).to(v)  # (B, N, 1, 1)
    mean, without = _with_and_without(v, mask, count)
    usable = mask & (count.squeeze(-1) >= 2)
    losses = []
    for a in LOO_GRID:
        distance = abs(math.log(a / default)) / math.log(GUIDANCE_GRID[1])
        if a == PROTOTYPE:
            full, own = _with_and_without(z, mask, count)  # what the maps below would give, without the maps
        else:
            evidence, rest = (n * a * space.precision for n in (count, count - 1))
            full = space.to_feature(evidence / (1 + evidence) * mean)
            own = space.to_feature(rest / (1 + rest) * without)
        loss = _left_out_loss(full.squeeze(2), own, z, scale, usable)
        losses.append(loss + LOO_PENALTY * min(distance, len(LOO_GRID)))
    grid = torch.tensor(LOO_GRID, device=z.device)
    return torch.where(usable.flatten(1).any(dim=1), grid[torch.stack(losses).argmin(dim=0)], default)


def _with_and_without(v: Tensor, mask: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Class means (B, N, 1, D) of v (B, N, K, D), and the means (B, N, K, D) without each image."""
    mean = (v * mask.unsqueeze(-1)).sum(dim=2, keepdim=True) / count.clamp_min(1)
    return mean, (count * mean - v) / (count - 1).clamp_min(1)


def _left_out_loss(full: Tensor, own: Tensor, z: Tensor, scale: float, usable: Tensor) -> Tensor:
    """Cross-entropy (B,), summed over the support images z (B, N, K, D).

    Each meets the other classes' weights of `full` (B, N, D), and the weight of its own class made without it, `own`
    (B, N, K, D).
    """
    tasks, ways, shots, size = z.shape
    logits = cosine_logits(z.reshape(tasks, ways * shots, size), full, scale).view(tasks, ways, shots, ways)
    held_out = scale * F.cosine_similarity(z, own, dim=-1)  # (B, N, K)
    index = torch.arange(ways, device=z.device).view(1, ways, 1, 1).expand(tasks, ways, shots, 1)
    logits = logits.scatter(3, index, held_out.unsqueeze(-1))
    loss = -F.log_softmax(logits, dim=-1).gather(3, index).squeeze(-1)
    return (loss * usable).sum(dim=(1, 2))
