"""What guides the reverse process: the metric of a task, and a pool of unlabelled images.

Metric: the guidance scale a says how far the statistics of the base classes are distrusted, in the posterior and in the
whitened form (1: not at all; large: only the support counts), and the level share w how much the layers below the last
one count. With two images or more in a class both are chosen for each task by held-out cross-entropy. With one image
each they are what was fitted, but a task that lies unusually far from the base classes gives up most of their
statistics. (adapt.py decides which of the two; it also takes out the domain, what the classes of a task share.)

Pool (design, section 2): the mixture likelihood of unlabelled images joins that of the support. At each step the class
proportions of the pool are estimated by expectation-maximisation with the classifier of that step, and every image is
shared out among the classes by its responsibilities.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from metadiff_cli.core.method.calibration import TaskTable
from metadiff_cli.core.method.held_out import HeldOut
from metadiff_cli.core.method.metric import TaskSettings
from metadiff_cli.core.method.support import SupportStats

PROTOTYPE = 1e6  # a guidance scale at which nothing is left of the prior
GUIDANCE_GRID = (1.0, 4.0, 16.0, PROTOTYPE)
LEVEL_GRID = (0.0, 0.1, 0.2, 0.35, 0.5, 0.7)
GUIDANCE_PENALTY, MOST_CHARGED = (
    0.25,
    4.0,
)  # nats of held-out cross-entropy per factor of four away from the fitted scale, up to four
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


def chosen_by(held: HeldOut, fitted: TaskSettings, *, keep_guidance: bool = False) -> TaskSettings:
    """Return the settings with the level share and the guidance scale of the lowest held-out cross-entropy.

    Values away from the fitted ones are charged the penalties above.
    """
    settings = fitted
    if len(held.metric.groups) > 1 and held.metric.plain:
        tried = _candidates(fitted.level, LEVEL_GRID)
        charges = [LEVEL_PENALTY * (w - fitted.level).abs() for w in tried]
        settings = replace(settings, level=_best(held, settings, "level", tried, charges))
    if held.metric.space is not None and held.metric.plain and not keep_guidance:
        tried = _candidates(fitted.guidance, GUIDANCE_GRID)
        away = [(a / fitted.guidance).log().abs() / math.log(4) for a in tried]
        charges = [GUIDANCE_PENALTY * distance.clamp(max=MOST_CHARGED) for distance in away]
        settings = replace(settings, guidance=_best(held, settings, "guidance", tried, charges))
    return settings


def _candidates(fitted: Tensor, grid: Sequence[float]) -> list[Tensor]:
    """The fitted values (B,), and those of a grid that are not the same for all tasks."""
    others = (torch.full_like(fitted, value) for value in grid)
    return [fitted, *(other for other in others if not torch.equal(other, fitted))]


def _best(held: HeldOut, settings: TaskSettings, name: str, tried: list[Tensor], charges: list[Tensor]) -> Tensor:
    """The values (B,) among those `tried` with the lowest held-out cross-entropy plus charge."""
    losses = [
        held.loss(replace(settings, **{name: value})) + charge  # type: ignore[arg-type]
        for value, charge in zip(tried, charges, strict=True)
    ]
    return torch.stack(tried).gather(0, torch.stack(losses).argmin(dim=0, keepdim=True))[0]


def shift_of(stats: SupportStats) -> Tensor:
    """Return the shift (B,) of tasks: the log of the mean square of a task's mean, in units of its prior variance.

    Under N(0, I) with noise of variance 1 / lambda the mean of N class means has variance (1/N^2) sum (1 + 1/(K
    lambda)) in each dimension. `stats` are relative to the mean of the base classes.
    """
    ways = stats.mean.shape[1]
    variance = (1 + 1 / (stats.count * stats.precision)).mean(dim=1) / ways
    return (stats.mean.mean(dim=1).square() / variance).mean(dim=1).clamp_min(1e-12).log()


def doubt_of(stats: SupportStats, usual: Usual) -> Tensor:
    """Return how far (B,), 0 to 1, the statistics of the base classes are doubted for tasks with this shift."""
    ways, shots = stats.mean.shape[1], float(stats.count.mean())
    unusual = (shift_of(stats) - usual.shift.at(ways, shots)) / usual.deviation
    return ((unusual - DOUBT[0]) / (DOUBT[1] - DOUBT[0])).clamp(0, 1)


def doubted_guidance(doubt: Tensor, home: float) -> Tensor:
    """Return the guidance scale (B,): `home` where there is no doubt (B,), up to FOREIGN."""
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
