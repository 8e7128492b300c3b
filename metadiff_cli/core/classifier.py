"""The cosine classifier, its support gradient, calibration of its confidence, and the choice of the guidance scale."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from metadiff_cli.core.denoiser import SupportStats
from metadiff_cli.core.tables import TaskTable
from metadiff_cli.core.task_space import TaskSpace

LOO_PENALTY = 0.25  # nats per factor of four away from the fitted default
PROTOTYPE = 1e6  # a guidance scale at which nothing is left of the prior
GUIDANCE_GRID = (1.0, 4.0, 16.0, 64.0, PROTOTYPE)
LOO_GRID = (1.0, 4.0, 16.0, PROTOTYPE)  # 64 is too near the prototype to be worth its maps
HALF_TRUST = 10.0  # the guidance scale at which the two metrics weigh the same; see task_logits


def cosine_logits(z: Tensor, weights: Tensor, scale: float | Tensor = 1.0, centre: Tensor | None = None) -> Tensor:
    """s * cos(z, w), (B, Q, N), of features z (B, Q, D) and weights (B, N, D), both relative to `centre` (D,)."""
    if centre is not None:
        z, weights = z - centre, weights - centre
    return scale * (F.normalize(z, dim=-1) @ F.normalize(weights, dim=-1).transpose(-1, -2))


def blend(whitened: Tensor, plain: Tensor, guidance: Tensor | float) -> Tensor:
    """(1 - r) whitened + r plain cosines, both (B, Q, N), with r = a / (a + HALF_TRUST): 0 as the prior holds.

    The guidance scale a, a number or one per task (B,), says how far the base classes' statistics hold.
    """
    a = guidance.view(-1, 1, 1) if isinstance(guidance, Tensor) else guidance
    return whitened + a / (a + HALF_TRUST) * (plain - whitened)


def task_logits(
    z: Tensor, weights: Tensor, space: TaskSpace, guidance: Tensor | float, scale: float | Tensor = 1.0
) -> Tensor:
    """Logits (B, Q, N) of generated classifiers: s times the blend of the cosines of whitened and of plain features.

    Whitened, the noise within a class has the same size in every direction: the metric of linear discriminant analysis.
    """
    whitened = cosine_logits(space.whiten(z), space.whiten(weights))
    return scale * blend(whitened, cosine_logits(space.plain(z), space.plain(weights)), guidance)


def support_loss(w: Tensor, v: Tensor, precision: Tensor) -> Tensor:
    """L_S(w) = 1/2 sum_k (v_k - w)' diag(lambda) (v_k - w), (B, N), of w (B, N, D) and support v (B, N, K, D)."""
    return 0.5 * ((v - w.unsqueeze(2)).square() * precision).sum(dim=(2, 3))


def support_gradient(w: Tensor, stats: SupportStats) -> Tensor:
    """Gradient of `support_loss` at w (B, N, D) in closed form: K lambda (w - p)."""
    return stats.count * stats.precision * (w - stats.mean)


@dataclass(frozen=True)
class Calibration:
    """Logit scale s as a smooth function of the task: log s, bilinear in log N and log K between the fitted points."""

    ways: tuple[int, ...] = (5,)
    shots: tuple[int, ...] = (1,)
    log_scales: tuple[tuple[float, ...], ...] = ((math.log(10.0),),)  # a row for each of `ways`

    def scale(self, way: int, shot: float) -> float:
        """s for N ways and K shots (the mean over the classes when shots differ); constant beyond the fitted points."""
        return math.exp(TaskTable(self.ways, self.shots, self.log_scales).at(way, shot))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Calibration":
        """From a checkpoint's header."""
        table = TaskTable.from_dict(values, "log_scales")
        return cls(table.ways, table.shots, table.values)


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


def fit_calibration(scales: Mapping[tuple[int, int], float]) -> Calibration:
    """From the best scale of every (way, shot) of a grid."""
    table = TaskTable.of({pair: math.log(scale) for pair, scale in scales.items()})
    return Calibration(table.ways, table.shots, table.values)


def reliability(confidence: Tensor, correct: Tensor, bins: int = 15) -> list[dict[str, float]]:
    """Mean confidence and accuracy, both in 0..1, and count of each bin of confidence (M,) that is not empty."""
    bucket = (confidence * bins).long().clamp(0, bins - 1)
    sums = torch.zeros(3, bins, dtype=torch.float64)
    for row, values in zip(sums, (confidence, correct, torch.ones_like(confidence)), strict=True):
        row.index_add_(0, bucket, values.double())
    return [
        {"confidence": float(p / n), "accuracy": float(hits / n), "count": int(n)} for p, hits, n in sums.T if n > 0
    ]


def calibration_error(confidence: Tensor, correct: Tensor, bins: int = 15) -> float:
    """Expected calibration error in percent, equal-width bins of confidence (M,) (Guo et al. 2017)."""
    gaps = (b["count"] * abs(b["confidence"] - b["accuracy"]) for b in reliability(confidence, correct, bins))
    return 100 * sum(gaps) / max(len(confidence), 1)


def leave_one_out_guidance(
    z: Tensor, space: TaskSpace, scale: float, valid: Tensor | None = None, default: Tensor | float = 1.0
) -> Tensor:
    """Guidance scale a per task (B,), from the support features z (B, N, K, D) alone.

    For every a of the grid, each support image is classified with its own class's weight made without it, the others'
    with all images; the a with the lowest cross-entropy is taken, `default` being favoured by LOO_PENALTY (design,
    "How far to trust the prior"). Classes with one image say nothing about a. `valid` (B, N, K) where shots differ;
    `space` and `default` may be the tasks' own.
    """
    tasks, ways, shots, _ = z.shape
    mask = torch.ones(tasks, ways, shots, dtype=torch.bool, device=z.device) if valid is None else valid
    usable = mask & (mask.sum(dim=2, keepdim=True) >= 2)
    usual = torch.as_tensor(default, dtype=z.dtype, device=z.device).expand(tasks)
    losses = []
    for a, logits in leave_one_out_logits(z, space, mask):
        distance = (a / usual).log().abs() / math.log(GUIDANCE_GRID[1])
        index = torch.arange(ways, device=z.device).view(1, ways, 1, 1).expand(tasks, ways, shots, 1)
        loss = -F.log_softmax(scale * logits, dim=-1).gather(3, index).squeeze(-1)
        losses.append((loss * usable).sum(dim=(1, 2)) + LOO_PENALTY * distance.clamp(max=len(LOO_GRID)))
    grid = torch.tensor(LOO_GRID, device=z.device)
    return torch.where(usable.flatten(1).any(dim=1), grid[torch.stack(losses).argmin(dim=0)], usual)


def leave_one_out_logits(z: Tensor, space: TaskSpace, mask: Tensor) -> Iterator[tuple[float, Tensor]]:
    """(a, unscaled logits (B, N, K, N) of the support images) for every guidance scale a of LOO_GRID.

    Each image meets the other classes' weights made of all their images, and that of its own class made without it.
    Classes of one image have nothing left for themselves; `mask` (B, N, K) marks the real images.
    """

    def back(w: Tensor) -> Tensor:
        return space.plain(space.to_feature(w))

    v = _by_image(space.to_task, z)
    count = mask.sum(dim=2, keepdim=True).unsqueeze(-1).to(v)  # (B, N, 1, 1)
    noise = space.precision.sqrt()
    mean, without = _with_and_without(v, mask, count)
    z = _by_image(space.plain, z)
    plain = _left_out_cosines(*_with_and_without(z, mask, count), z)  # what is left when the prior counts for nothing
    for a in LOO_GRID:
        if a == PROTOTYPE:
            yield a, plain
            continue
        evidence, rest = (n * a * space.precision for n in (count, count - 1))
        full, own = evidence / (1 + evidence) * mean, rest / (1 + rest) * without
        whitened = _left_out_cosines(full * noise, own * noise, v * noise)
        features = _left_out_cosines(_by_image(back, full), _by_image(back, own), z)
        yield a, blend(whitened, features, a)


def _by_image(change: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """`change`, which takes (B, Q, D), of all the images of z (B, N, K, D)."""
    return change(z.flatten(1, 2)).view(z.shape)


def _with_and_without(v: Tensor, mask: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Class means (B, N, 1, D) of v (B, N, K, D), and the means (B, N, K, D) without each image."""
    mean = (v * mask.unsqueeze(-1)).sum(dim=2, keepdim=True) / count.clamp_min(1)
    return mean, (count * mean - v) / (count - 1).clamp_min(1)


def _left_out_cosines(full: Tensor, own: Tensor, z: Tensor) -> Tensor:
    """Cosines (B, N, K, N) of z (B, N, K, D) to the classes' weights `full` (B, N, 1, D), its own class's in `own`."""
    tasks, ways, shots, size = z.shape
    logits = cosine_logits(z.reshape(tasks, ways * shots, size), full.squeeze(2)).view(tasks, ways, shots, ways)
    index = torch.arange(ways, device=z.device).view(1, ways, 1, 1).expand(tasks, ways, shots, 1)
    return logits.scatter(3, index, F.cosine_similarity(z, own, dim=-1).unsqueeze(-1))
