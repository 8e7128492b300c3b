"""The diffusion over weights: schedule, forward process, samplers.

A sampler is a free generator of small steps. Nothing is kept of the path, and under `inference_mode` no graph either,
so memory does not grow with the number of steps.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from metadiff_cli.core.device import sent
from metadiff_cli.errors import ConfigError


@dataclass(frozen=True)
class Schedule:
    """Variance-preserving schedule of Ho et al. 2020: linear beta, T steps; `abar[t]` for t = 0..T, abar[0] = 1."""

    steps: int = 1000
    first: float = 1e-4
    last: float = 0.02

    @cached_property
    def abar(self) -> list[float]:
        """The T + 1 values, as Python floats: products of many factors near one want double precision."""
        beta = np.linspace(self.first, self.last, self.steps)
        return [1.0, *np.cumprod(1 - beta).tolist()]


@dataclass(frozen=True)
class Weights:
    """The state of the reverse process for B tasks: class weights v (B, N, D) in task space, and the dual A (B, n, N).

    Both are divided by sqrt(abar_t), so that they estimate the clean weights at any noise level. Without a task space
    `v` is None.
    """

    v: Tensor | None
    dual: Tensor

    def mixed(self, estimate: "Weights", keep: float) -> "Weights":
        """Return (1 - keep) times the estimate plus keep times these weights."""
        v = None if self.v is None or estimate.v is None else torch.lerp(estimate.v, self.v, keep)
        return Weights(v, torch.lerp(estimate.dual, self.dual, keep))

    def disturbed(self, noise: Tensor) -> "Weights":
        """Return the weights with noise (B, N, D) added to v."""
        return self if self.v is None else Weights(self.v + noise, self.dual)


@dataclass(frozen=True)
class SamplerStep:
    """A step that is done: index 0..S-1, time step t before it, estimate of the clean weights, weights after it."""

    index: int
    t: int
    estimate: Weights
    weights: Weights


Denoise = Callable[[Weights, float], Weights]  # (weights_t, abar_t) -> estimate of the clean weights


def add_noise(w0: Tensor, abar: Tensor, noise: Tensor) -> Tensor:
    """Return w_t = sqrt(abar) w_0 + sqrt(1 - abar) eps; `abar` is (B,), the others are (B, N, D)."""
    a = abar.to(w0.dtype).view(-1, 1, 1)
    return a.sqrt() * w0 + (1 - a).sqrt() * noise


def trailing_steps(total: int, steps: int) -> list[int]:
    """Return S time steps from T downwards, evenly spaced, the first at T (Lin et al. 2024, "trailing").

    Raises ConfigError unless 1 <= S <= T.
    """
    if not 1 <= steps <= total:
        raise ConfigError(f"{steps} sampling steps", hint=f"--steps takes 1 to {total}")
    return [int(t) for t in np.round(np.arange(total, 0, -total / steps))[:steps]]


@torch.inference_mode()
def ddim(denoise: Denoise, weights: Weights, schedule: Schedule, steps: int) -> Iterator[SamplerStep]:
    """DDIM (Song et al. 2021, eq. 12 with sigma = 0); the last estimate is the result."""
    for i, t, a, b in _levels(schedule, steps):
        estimate = denoise(weights, a)
        weights = weights.mixed(estimate, math.sqrt((1 - b) / (1 - a) * a / b))
        yield SamplerStep(i, t, estimate, weights)


@torch.inference_mode()
def ddpm(
    denoise: Denoise, weights: Weights, schedule: Schedule, steps: int, draw: Callable[[], Tensor]
) -> Iterator[SamplerStep]:
    """Ancestral sampling (Ho et al. 2020, eq. 6 and 7, for any subset of the steps); `draw` gives noise (B, N, D)."""
    for i, t, a, b in _levels(schedule, steps):
        estimate = denoise(weights, a)
        weights = weights.mixed(estimate, a / b * (1 - b) / (1 - a))
        if b < 1:
            weights = weights.disturbed(math.sqrt((1 - b) / (1 - a) * (1 - a / b) / b) * draw())
        yield SamplerStep(i, t, estimate, weights)


def _levels(schedule: Schedule, steps: int) -> Iterator[tuple[int, int, float, float]]:
    """Index, time step, and abar before and after each step."""
    times, abar = trailing_steps(schedule.steps, steps), schedule.abar
    for i, (t, after) in enumerate(zip(times, [*times[1:], 0], strict=True)):
        yield i, t, abar[t], abar[after]


class Noise:
    """Noise for the classes of B tasks, drawn per task in the order of the classes' keys.

    The noise of a task depends on its seed and on the set of its classes, neither on their order nor on the other tasks
    of the batch. So permuting classes permutes the result, and a batch equals its tasks one by one.
    """

    def __init__(
        self, seeds: Sequence[int], ranks: Tensor, size: int, temperature: float, device: torch.device
    ) -> None:
        """`ranks` (B, N): position of each class when the classes of its task are sorted by key; `size` D."""
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.ranks, self.size, self.temperature, self.device = ranks, size, temperature, device

    def draw(self) -> Tensor:
        """Return noise (B, N, D) with standard deviation `temperature`."""
        tasks, ways = self.ranks.shape
        if self.temperature == 0:
            return torch.zeros(tasks, ways, self.size, device=self.device)
        rows = [
            torch.randn(ways, self.size, generator=g)[rank] for g, rank in zip(self.generators, self.ranks, strict=True)
        ]
        return sent(torch.stack(rows), self.device) * self.temperature
