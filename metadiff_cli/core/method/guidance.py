"""What guides the reverse process: the metric of a task, its domain, and a pool of unlabelled images.

Metric: the guidance scale a says how far the statistics of the base classes are trusted (1: fully, in the posterior and
in the whitened form; large: only the support counts), and the level share w how much the layers below the last one
count. With two images or more in a class both are chosen for each task by held-out cross-entropy. With one image each
they are what was fitted, but a task that lies unusually far from the base classes gives up most of their statistics.

Domain: what the classes of a task share (all are flowers, or characters, or photos in negative colours) is taken out.
It is estimated by a share of the mean of the class means.

Pool (design, section 2): the mixture likelihood of unlabelled images joins that of the support. At each step the class
proportions of the pool are estimated by expectation-maximisation with the classifier of that step, and every image is
shared out among the classes by its responsibilities.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from metadiff_cli.core.method.calibration import TaskTable
from metadiff_cli.core.method.held_out import HeldOut
from metadiff_cli.core.method.support import SupportStats

PROTOTYPE = 1e6  # a guidance scale at which nothing is left of the prior
GUIDANCE_GRID = (1.0, 4.0, 16.0, PROTOTYPE)
LEVEL_GRID = (0.0, 0.1, 0.2, 0.35, 0.5, 0.7)
GUIDANCE_PENALTY = 0.25  # nats of held-out cross-entropy per factor of four away from the fitted scale
LEVEL_PENALTY = 1.0  # the same per unit of the level share

FOREIGN = 16.0  # the guidance scale of a task from elsewhere: most of the prior is given up
DOUBT = (1.0, 2.0)  # standard deviations beyond what is usual: where doubt begins, and where it is complete

# of expectation-maximisation per step. Proportions that follow the classifier with a step's delay are still near equal
# when the first images are shared out, and a class that makes up most of the pool then drags all others to itself.
ROUNDS = 10
FEW = 2.0  # smoothing grows by this factor over the images per class: the proportions of few images are mostly chance


@dataclass(frozen=True)
class Usual:
    """The shift of tasks of validation classes: its mean by ways and shots, and its standard deviation over tasks.

    Raises ValueError unless the deviation is positive.
    """

    shift: TaskTable
    deviation: float

    def __post_init__(self) -> None:
        if not self.deviation > 0:
            raise ValueError(f"a deviation of {self.deviation}")


@dataclass(frozen=True)
class Evidence:
    """What speaks for the classes of B tasks: means (B, N, J) of expanded features, and the number of images.

    `count` is (B, N, 1), or (1, N, 1) or (1, 1, 1) where tasks or classes are alike; unlabelled images count in part.
    """

    means: Tensor
    count: Tensor


def level_shares(share: Tensor, groups: int) -> Tensor:
    """Return the shares (B, G) of the groups of features, given that (B,) of all but the first one."""
    if groups == 1:
        return torch.ones_like(share).unsqueeze(-1)
    rest = (share / (groups - 1)).unsqueeze(-1).expand(-1, groups - 1)
    return torch.cat([(1 - share).unsqueeze(-1), rest], dim=-1)


@dataclass(frozen=True)
class Choice:
    """How the metric of a task is chosen: fitted values, and the constants of the descent that is tried with them."""

    guidance: Tensor  # (B,) the fitted a, or that of an unusual task
    level: float  # the fitted w
    domain: float
    scale: float
    prior: float
    temperature: float

    def by_held_out(self, held: HeldOut, *, fixed: bool) -> tuple[Tensor, Tensor]:
        """Return the level share (B,) and the guidance scale (B,) with the lowest held-out cross-entropy.

        Values away from the fitted ones are charged the penalties above. `fixed` keeps the guidance scale.
        """
        level, guidance = torch.full_like(self.guidance, self.level), self.guidance
        if len(held.metric.groups) > 1:
            tried = torch.tensor(sorted({*LEVEL_GRID, self.level}), device=guidance.device)
            losses = [self._loss(held, w.expand_as(level), guidance) for w in tried]
            charged = torch.stack(losses) + LEVEL_PENALTY * (tried - self.level).abs().unsqueeze(1)
            level = tried[charged.argmin(dim=0)]
        if held.metric.space is not None and held.metric.plain and not fixed:
            grid = torch.tensor(GUIDANCE_GRID, device=guidance.device)
            losses = [self._loss(held, level, a.expand_as(guidance)) for a in grid]
            distance = (grid.unsqueeze(1) / guidance).log().abs() / math.log(4)
            charged = torch.stack(losses) + GUIDANCE_PENALTY * distance.clamp(max=len(grid))
            guidance = grid[charged.argmin(dim=0)]
        return level, guidance

    def _loss(self, held: HeldOut, level: Tensor, guidance: Tensor) -> Tensor:
        """Held-out cross-entropy (B,) in nats, summed over the images that are left out."""
        shares = level_shares(level, len(held.metric.groups))
        logits = held.logits(shares, guidance, self.domain, self.scale, self.prior)
        losses = -(held.support.one_hot() * F.log_softmax(self.temperature * logits, dim=-1)).sum(dim=-1)  # (B, n)
        return (losses * held.folds.left_out).sum(dim=1)


def shift_of(stats: SupportStats) -> Tensor:
    """Return the shift (B,) of tasks: the log of the mean square of a task's mean, in units of its prior variance.

    Under N(0, I) with noise of variance 1 / lambda the mean of N class means has variance (1/N^2) sum (1 + 1/(K
    lambda)) in each dimension. `stats` are relative to the mean of the base classes.
    """
    ways = stats.mean.shape[1]
    variance = (1 + 1 / (stats.count * stats.precision)).mean(dim=1) / ways
    return (stats.mean.mean(dim=1).square() / variance).mean(dim=1).clamp_min(1e-12).log()


def trusted_guidance(stats: SupportStats, usual: Usual, home: float) -> Tensor:
    """Return the guidance scale (B,) for tasks of which nothing but their shift is known: `home` up to FOREIGN."""
    ways, shots = stats.mean.shape[1], float(stats.count.mean())
    unusual = (shift_of(stats) - usual.shift.at(ways, shots)) / usual.deviation
    doubt = ((unusual - DOUBT[0]) / (DOUBT[1] - DOUBT[0])).clamp(0, 1)
    scale = torch.exp(math.log(home) + doubt * max(0.0, math.log(FOREIGN / home)))
    return scale.clamp(max=max(home, FOREIGN))  # rounding takes the largest scale that a file may hold beyond itself


@dataclass(frozen=True)
class PoolGuidance:
    """Constants of the guidance by a pool; `sharpness` is a factor on the calibrated logits of the task."""

    sharpness: float = 1.25  # s_r, of the responsibilities
    smoothing: float = 8.0  # Dirichlet smoothing of the class proportions of a large pool, in images per class
    weight: float = 0.3  # omega, of one unlabelled image beside a labelled one


def pool_evidence(evidence: Evidence, pool: Tensor, how: PoolGuidance) -> Callable[[Tensor], Evidence]:
    """Return a function from logits (B, P, N) of a pool to the evidence that takes it in by its responsibilities.

    `pool` (B, P, J) are expanded features; the logits are calibrated. Class proportions carry over from call to call.
    """
    tasks, ways, _ = evidence.means.shape
    images = pool.shape[1]
    proportions = torch.full((tasks, 1, ways), 1 / ways, device=pool.device)
    smoothing = how.smoothing * (1 + FEW * ways / images)

    def guide(logits: Tensor) -> Evidence:
        nonlocal proportions
        logits = how.sharpness * logits
        for _ in range(ROUNDS):
            total = (logits + proportions.log()).softmax(dim=-1).sum(dim=1, keepdim=True)  # (B, 1, N)
            proportions = (smoothing + total) / (ways * smoothing + images)
        share = how.weight * (logits + proportions.log()).softmax(dim=-1)  # (B, P, N)
        count = evidence.count + share.sum(dim=1).unsqueeze(-1)  # (B, N, 1)
        return Evidence((evidence.count * evidence.means + share.mT @ pool) / count, count)

    return guide
