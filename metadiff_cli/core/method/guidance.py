"""What guides the sampler: the scale of the support gradient, the domain of a task, and a pool of unlabelled images.

Guidance scale: with two or more images per class it is chosen by leave-one-out on the support, with one image by how
unusual the task is.

Domain: the prior says that class means are N(0, I) around the mean of the base classes. The classes of one task also
share something: all are flowers, or characters, or photos in negative colours. With N(m, I) and m ~ N(0, tau^2 I), the
estimate of m from the class means of a task is a share of their mean, and weights are drawn around it. The distance of
a task's mean from the base classes, against its distance under the prior, also tells whether the prior is to be trusted
at all: with one image per class it already separates foreign images from those of new classes, which the spread of the
images does not.

Pool (design, section 2): the mixture likelihood of the pool joins that of the support. At each step the class
proportions of the pool are estimated, by expectation-maximisation with the classifier of that step, and every image is
shared out among the classes by its responsibilities under them.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from metadiff_cli.core.method.calibration import TaskTable
from metadiff_cli.core.method.metric import blend, cosine_logits
from metadiff_cli.core.method.support import SupportStats, TaskSupport
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


LOO_PENALTY = 0.25  # nats per factor of four away from the fitted default


PROTOTYPE = 1e6  # a guidance scale at which nothing is left of the prior


GUIDANCE_GRID = (1.0, 4.0, 16.0, 64.0, PROTOTYPE)


LOO_GRID = (1.0, 4.0, 16.0, PROTOTYPE)  # 64 is too near the prototype to be worth its maps


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


SHARED = 0.5  # of the mean of a task's class means; the estimate where tau^2 is the variance of that mean


FOREIGN = 16.0  # the guidance scale of a task from elsewhere: most of the prior is given up


DOUBT = (1.0, 2.0)  # standard deviations beyond what is usual: where doubt begins, and where it is complete


@dataclass(frozen=True)
class Usual:
    """The shift of tasks of validation classes: its mean by ways and shots, and its standard deviation over tasks."""

    shift: TaskTable
    deviation: float

    def __post_init__(self) -> None:
        """Raises ValueError unless the deviation is above 0."""
        if self.deviation <= 0:
            raise ValueError(f"a standard deviation of {self.deviation}")


def shared_of(denoiser: str) -> float:
    """SHARED, but for the published form, which knows no domains."""
    return 0.0 if denoiser == "paper" else SHARED


def domain_of(stats: SupportStats, shared: float) -> Tensor:
    """m (B, 1, D) in task space, from the class means of B tasks."""
    return shared * stats.mean.mean(dim=1, keepdim=True)


def shift_of(stats: SupportStats) -> Tensor:
    """(B,) log of the mean square of a task's mean over the dimensions, each in units of its variance under the prior.

    Under N(0, I) with noise of variance 1 / lambda the mean of N class means has variance (1/N^2) sum (1 + 1/(K
    lambda)).
    """
    ways = stats.mean.shape[1]
    variance = (1 + 1 / (stats.count * stats.precision)).mean(dim=1) / ways
    return (stats.mean.mean(dim=1).square() / variance).mean(dim=1).clamp_min(1e-12).log()


def trusted_guidance(stats: SupportStats, usual: Usual, home: float) -> Tensor:
    """The guidance scale (B,) for tasks of which nothing but their shift is known: `home` up to FOREIGN."""
    ways, shots = stats.mean.shape[1], float(stats.count.mean())
    unusual = (shift_of(stats) - usual.shift.at(ways, shots)) / usual.deviation
    doubt = ((unusual - DOUBT[0]) / (DOUBT[1] - DOUBT[0])).clamp(0, 1)
    scale = torch.exp(math.log(home) + doubt * max(0.0, math.log(FOREIGN / home)))
    return scale.clamp(max=max(home, FOREIGN))  # rounding takes the largest scale that a file may hold beyond itself
