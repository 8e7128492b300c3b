"""The cosine classifier, its support gradient, calibration of its confidence, and the choice of the guidance scale."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from metadiff_cli.core.method.calibration import TaskTable
from metadiff_cli.core.method.denoisers import SupportStats
from metadiff_cli.core.method.support import TaskSupport
from metadiff_cli.core.method.task_space import TaskSpace

LOO_PENALTY = 0.25  # nats per factor of four away from the fitted default
PROTOTYPE = 1e6  # a guidance scale at which nothing is left of the prior
GUIDANCE_GRID = (1.0, 4.0, 16.0, 64.0, PROTOTYPE)
LOO_GRID = (1.0, 4.0, 16.0, PROTOTYPE)  # 64 is too near the prototype to be worth its maps
SHORTEST = 1e-12  # what a length counts for at least
HALF_TRUST = 10.0  # the guidance scale at which the two metrics weigh the same; see task_logits
LARGEST_LOG = 50.0  # of a logit scale


def cosine_logits(z: Tensor, weights: Tensor, scale: float | Tensor = 1.0, centre: Tensor | None = None) -> Tensor:
    """s * cos(z, w), (B, Q, N), of features z (B, Q, D) and weights (B, N, D), both relative to `centre` (D,)."""
    if centre is not None:
        z, weights = z - centre, weights - centre
    lengths = torch.linalg.vector_norm(z, dim=-1, keepdim=True).clamp_min(SHORTEST)  # divided by last: Q N, not Q D
    cosines: Tensor = z @ F.normalize(weights, dim=-1).transpose(-1, -2) / lengths
    return scale * cosines


def whitened_cosines(z: Tensor, weights: Tensor, space: TaskSpace, squares: Tensor | None = None) -> Tensor:
    """Cosines (B, Q, N) of features z (B, Q, D) and weights (B, N, D), both relative to mu, in the metric S_w^-1.

    `squares` (B, Q) are `space.squares(z)` where they are known: then no image is projected.
    """
    w = space.to_task(weights)
    scaled = w * space.precision
    direction = scaled @ space.basis.T  # (B, N, D): its product with a feature is the inner product with w
    inner = z @ direction.mT - space.mean.view(-1, 1, z.shape[-1]) @ direction.mT
    squares = space.squares(z) if squares is None else squares
    lengths = squares.clamp_min(0).sqrt().unsqueeze(-1) * (w * scaled).sum(dim=-1).sqrt().unsqueeze(-2)
    return inner / lengths.clamp_min(SHORTEST)


def blend(whitened: Tensor, plain: Tensor, guidance: Tensor | float) -> Tensor:
    """(1 - r) whitened + r plain cosines, both (B, Q, N), with r = a / (a + HALF_TRUST): 0 as the prior holds.

    The guidance scale a, a number or one per task (B,), says how far the base classes' statistics hold.
    """
    a = guidance.view(-1, 1, 1) if isinstance(guidance, Tensor) else guidance
    return whitened + a / (a + HALF_TRUST) * (plain - whitened)


def task_logits(
    z: Tensor, weights: Tensor, space: TaskSpace, guidance: Tensor | float, scale: float | Tensor = 1.0,
    squares: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Logits (B, Q, N) of generated classifiers: s times the blend of the cosines of whitened and of plain features.

    Whitened, the noise within a class has the same size in every direction: the metric of linear discriminant analysis.
    `squares` are as in `whitened_cosines`.
    """
    whitened = whitened_cosines(z, weights, space, squares)
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

    def __post_init__(self) -> None:
        """Raises ValueError for a table of another shape, and for logarithms of scales that float32 cannot hold."""
        TaskTable(self.ways, self.shots, self.log_scales)
        if any(abs(log) > LARGEST_LOG for row in self.log_scales for log in row):
            raise ValueError("a logit scale is out of all bounds")

    def scale(self, way: int, shot: float) -> float:
        """s for N ways and K shots (the mean over the classes when shots differ); constant beyond the fitted points."""
        return math.exp(TaskTable(self.ways, self.shots, self.log_scales).at(way, shot))


@dataclass(frozen=True)
class Rejection:
    """Threshold on the known score of an image, below which it belongs to none of a task's classes (rejection.py).

    `offsets` in nats are added to the left-out scores of the support; `rate` is the share (0..1) of images of the
    task's own classes that fell below on the classes of the fit.
    """

    offsets: TaskTable
    rate: float


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
    support: TaskSupport, space: TaskSpace, scale: float, default: Tensor | float = 1.0
) -> Tensor:
    """Guidance scale a per task (B,), from the support alone.

    For every a of the grid, each support image is classified with its own class's weight made without it, the others'
    with all images; the a with the lowest cross-entropy is taken, `default` being favoured by LOO_PENALTY (design,
    "How far to trust the prior"). Classes with one image say nothing about a.

    `space` and `default` may be the tasks' own.
    """
    usual = torch.as_tensor(default, dtype=support.z.dtype, device=support.z.device).expand(len(support.z))
    usable = support.count.squeeze(1) >= 2  # (N,)
    if not bool(usable.any()):
        return usual
    losses = support.z.new_zeros(len(LOO_GRID), len(support.z))
    for part in support.parts():
        index = part.labels.view(1, -1, 1).expand(len(part.z), -1, 1)
        for i, (_, logits) in enumerate(leave_one_out_logits(part, space)):
            loss = -F.log_softmax(scale * logits, dim=-1).gather(2, index).squeeze(-1)  # (B, n)
            losses[i] += (loss * usable[part.labels]).sum(dim=1)
    for i, a in enumerate(LOO_GRID):
        distance = (a / usual).log().abs() / math.log(GUIDANCE_GRID[1])
        losses[i] += LOO_PENALTY * distance.clamp(max=len(LOO_GRID))
    return torch.tensor(LOO_GRID, device=losses.device)[losses.argmin(dim=0)]


def leave_one_out_logits(support: TaskSupport, space: TaskSpace) -> Iterator[tuple[float, Tensor]]:
    """(a, unscaled logits (B, n, N) of the support images) for every guidance scale a of LOO_GRID.

    Each image meets the other classes' weights made of all their images, and that of its own class made without it.
    Classes of one image have nothing left for themselves.
    """
    v, mean, labels = space.to_task(support.z), space.to_task(support.means), support.labels
    noise, left = space.precision.sqrt(), support.count[labels] - 1  # (n, 1)
    z, centres = space.plain(support.z), space.plain(support.means)
    without = left_out_means(v, mean, support)
    # what is left when the prior counts for nothing
    plain = _left_out_cosines(centres, left_out_means(z, centres, support), z, labels)
    for a in LOO_GRID:
        if a == PROTOTYPE:
            yield a, plain
            continue
        evidence, rest = (n * a * space.precision for n in (support.count, left))  # (N, D), (n, D)
        full, own = evidence / (1 + evidence) * mean, rest / (1 + rest) * without
        whitened = _left_out_cosines(full * noise, own * noise, v * noise, labels)
        full, own = (space.plain(space.to_feature(w)) for w in (full, own))
        yield a, blend(whitened, _left_out_cosines(full, own, z, labels), a)


def left_out_means(z: Tensor, means: Tensor, support: TaskSupport) -> Tensor:
    """For each image z (B, n, D), the mean of its class without it; `means` (B, N, D). Alone in its class, zero."""
    count = support.count[support.labels]  # (n, 1)
    return (count * means[:, support.labels] - z) / (count - 1).clamp_min(1)


def _left_out_cosines(full: Tensor, own: Tensor, z: Tensor, labels: Tensor) -> Tensor:
    """Cosines (B, n, N) of z (B, n, D) to the classes' weights `full` (B, N, D), to its own class's in `own`."""
    index = labels.view(1, -1, 1).expand(len(z), -1, 1)
    return cosine_logits(z, full).scatter(2, index, F.cosine_similarity(z, own, dim=-1).unsqueeze(-1))
