"""The domain of a task: what all its classes share beside what the base classes are like, and what follows from it.

The prior says that class means are N(0, I) around the mean of the base classes. The classes of one task also share
something: all are flowers, or characters, or photos in negative colours. Taken as N(m, I) with m ~ N(0, tau^2 I), the
estimate of m from the class means of a task is a share of their mean, and weights are drawn around it.

How far a task's mean lies from the base classes, against how far it would lie under the prior, also tells whether the
prior is to be trusted at all. Unlike the spread of the images, it tells foreign images from those of new classes with
one image per class already.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from metadiff_cli.core.method.calibration import TaskTable
from metadiff_cli.core.method.denoisers import SupportStats

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
