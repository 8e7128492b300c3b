"""The diffusion over weights: schedule, forward process, samplers.

A sampler is a free generator of small steps; nothing is kept of the path, and under `inference_mode` no graph either,
so memory does not grow with the number of steps. Weights are w (B, N, D) in task space.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from metadiff_cli.core.device import sent
from metadiff_cli.core.method.support import SupportStats
from metadiff_cli.errors import ConfigError

Guide = Callable[[Tensor], SupportStats]


class Denoises(Protocol):
    """(w_t (B, N, D), abar (B or 1,), stats) -> x0 (B, N, D), the estimate of the clean weights."""

    def __call__(self, w: Tensor, abar: Tensor, stats: SupportStats, /) -> Tensor: ...


@dataclass(frozen=True)
class Schedule:
    """Variance-preserving schedule of Ho et al. 2020: linear beta, T steps; `abar[t]` for t = 0..T, abar[0] = 1."""

    steps: int = 1000
    first: float = 1e-4
    last: float = 0.02

    @property
    def abar(self) -> Tensor:
        """(T + 1,) in float64: products of many factors near one."""
        beta = torch.linspace(self.first, self.last, self.steps, dtype=torch.float64)
        return torch.cat([torch.ones(1, dtype=torch.float64), torch.cumprod(1 - beta, dim=0)])


@dataclass(frozen=True)
class SamplerStep:
    """One step is done: index 0..S-1, time step t before it, estimate x0 and the weights after it, both (B, N, D)."""

    index: int
    t: int
    x0: Tensor
    w: Tensor


def add_noise(w0: Tensor, abar: Tensor, noise: Tensor) -> Tensor:
    """w_t = sqrt(abar) w_0 + sqrt(1 - abar) eps; `abar` (B,), the others (B, N, D)."""
    a = abar.to(w0.dtype).view(-1, 1, 1)
    return a.sqrt() * w0 + (1 - a).sqrt() * noise


def trailing_steps(total: int, steps: int) -> list[int]:
    """S time steps from T downwards, evenly spaced, the first at T (Lin et al. 2024, "trailing").

    Raises ConfigError unless 1 <= S <= T.
    """
    if not 1 <= steps <= total:
        raise ConfigError(f"{steps} sampling steps", hint=f"--steps takes 1 to {total}")
    return [int(t) for t in np.round(np.arange(total, 0, -total / steps))[:steps]]


@torch.inference_mode()
def ddim(
    denoiser: Denoises, w: Tensor, schedule: Schedule, steps: int, stats: SupportStats, guide: Guide | None = None
) -> Iterator[SamplerStep]:
    """DDIM (Song et al. 2021, eq. 12 with sigma = 0) from noise w (B, N, D); the last x0 is the result.

    `guide` may replace the support statistics by others that depend on the current estimate.
    """
    times = trailing_steps(schedule.steps, steps)
    abar = sent(schedule.abar.to(w.dtype), w.device)  # cast first: not every device has float64
    for i, (t, after) in enumerate(zip(times, [*times[1:], 0], strict=True)):
        a, b = abar[t], abar[after]
        x0 = denoiser(w, a.view(1), stats)
        keep = ((1 - b) / (1 - a)).sqrt()  # of eps: sqrt(1 - b) eps = keep (w - sqrt(a) x0)
        w = (keep * w).add_((b.sqrt() - keep * a.sqrt()) * x0)
        yield SamplerStep(i, t, x0, w)
        if guide is not None:
            stats = guide(x0)


@torch.inference_mode()
def ddpm(
    denoiser: Denoises,
    w: Tensor,
    schedule: Schedule,
    steps: int,
    stats: SupportStats,
    draw: Callable[[], Tensor],
    guide: Guide | None = None,
) -> Iterator[SamplerStep]:
    """Ancestral sampling (Ho et al. 2020, eq. 6 and 7, for any subset of the steps); `draw` gives noise (B, N, D)."""
    times = trailing_steps(schedule.steps, steps)
    abar = sent(schedule.abar.to(w.dtype), w.device)  # cast first: not every device has float64
    for i, (t, after) in enumerate(zip(times, [*times[1:], 0], strict=True)):
        a, b = abar[t], abar[after]
        ratio = a / b
        x0 = denoiser(w, a.view(1), stats)
        w = (b.sqrt() * (1 - ratio) * x0 + ratio.sqrt() * (1 - b) * w) / (1 - a)
        if after > 0:
            w = w + ((1 - b) / (1 - a) * (1 - ratio)).sqrt() * draw()
        yield SamplerStep(i, t, x0, w)
        if guide is not None:
            stats = guide(x0)


def finish(steps: Iterator[SamplerStep]) -> Tensor:
    """Run a sampler to its end; returns the last estimate x0 (B, N, D)."""
    last: Tensor | None = None
    for step in steps:
        last = step.x0
    assert last is not None
    return last


class Noise:
    """Noise for the classes of B tasks, drawn per task in the order of the classes' keys.

    A task's noise depends on its seed and on the set of its classes, neither on their order nor on the other tasks of
    the batch; so permuting classes permutes the result, and a batch equals its tasks one by one.
    """

    def __init__(
        self, seeds: Sequence[int], ranks: Tensor, size: int, temperature: float, device: torch.device
    ) -> None:
        """`ranks` (B, N): position of each class when the classes of its task are sorted by key; `size` D."""
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.ranks, self.size, self.temperature, self.device = ranks, size, temperature, device

    def draw(self) -> Tensor:
        """(B, N, D) with standard deviation `temperature`."""
        tasks, ways = self.ranks.shape
        if self.temperature == 0:
            return torch.zeros(tasks, ways, self.size, device=self.device)
        rows = [
            torch.randn(ways, self.size, generator=g)[rank] for g, rank in zip(self.generators, self.ranks, strict=True)
        ]
        return sent(torch.stack(rows), self.device) * self.temperature
