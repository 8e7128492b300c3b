"""Denoisers: from noisy weights and the support to an estimate of the clean weights.

analytic  the exact posterior mean under the Gaussian class model; no parameters
unet      the same plus a learned correction, a task-conditional U-Net whose output layer starts at zero
paper     the published form: epsilon from the gradient alone (arXiv 2307.16424), defects mended

All work on w (B, N, D) in task space, are told the number of shots K (per class, it may differ), and treat the classes
of a task alike: permuting them permutes the result.

A U-Net is trained in several task spaces, each made of the statistics of other classes, and used in another one. Their
bases differ, so its network reads and writes what they share: displacements in the space of features (`Frame`).
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metadiff_cli.core.device import CPU, default_noise, seeded_noise
from metadiff_cli.core.method.support import SupportStats
from metadiff_cli.core.method.task_space import TaskSpace

DEPTH, DROPOUT = 2, 0.1  # of the U-Nets: levels below the first, and share of inputs that training leaves out


def posterior_precision(abar: Tensor, stats: SupportStats) -> Tensor:
    """pi_t (B, N or 1, D) of w_0 given w_t at abar (B or 1,) and the support (design, "Denoiser, preconditioned").

    w_t itself is an observation of w_0 with precision abar / (1 - abar); the prior has precision 1.
    """
    a = abar.view(-1, 1, 1)
    return stats.count * stats.precision + (1 + a / _noise(a))


def gaussian_posterior(w: Tensor, abar: Tensor, stats: SupportStats) -> tuple[Tensor, Tensor]:
    """x0_gauss (B, N, D) and its precision, as `posterior_precision` has it, of w_t (B, N, D) at abar (B or 1,)."""
    a, pi = abar.view(-1, 1, 1), posterior_precision(abar, stats)
    # memory traffic is the cost: products of what all classes share come first
    x0 = (stats.count * stats.precision / pi * stats.mean).addcmul_(a.sqrt() / _noise(a) / pi, w)
    return x0, pi


def _noise(a: Tensor) -> Tensor:
    """1 - abar; at t = 0 nothing is noise, and w_0 itself is the answer."""
    return (1 - a).clamp_min(1e-12)


class AnalyticDenoiser(nn.Module):
    """The posterior mean, as it is."""

    def forward(self, w: Tensor, abar: Tensor, stats: SupportStats) -> Tensor:
        x0, _ = gaussian_posterior(w, abar, stats)
        return x0


class Frame(nn.Module):
    """The map between task space and displacements of features, z - mu = A^-T v, in units of a reference.

    It follows from the task space, so no checkpoint holds it.
    """

    def __init__(self, space: TaskSpace, references: Sequence[float] | None = None) -> None:
        """`references` are the units, one per group; None: those of the space itself, see `references`."""
        super().__init__()
        self.groups = list(space.groups)
        inverses = [_inverse(basis) for basis in space.bases]
        # of a feature of a class mean relative to mu, the root mean square under N(0, I)
        own = [float(inverse.square().sum(dim=0).mean().sqrt()) for inverse in inverses]
        self.references = own if references is None else list(references)
        for g, (basis, inverse, unit) in enumerate(zip(space.bases, inverses, self.references, strict=True)):
            self.register_buffer(f"reading{g}", inverse / unit, persistent=False)
            self.register_buffer(f"writing{g}", basis * unit, persistent=False)

    def read(self, v: Tensor) -> Tensor:
        """Return displacements (..., D) of v (..., D)."""
        return self._mapped(v, "reading")

    def write(self, x: Tensor) -> Tensor:
        """Return v (..., D) of displacements (..., D)."""
        return self._mapped(x, "writing")

    def _mapped(self, x: Tensor, name: str) -> Tensor:
        parts = torch.split(x, self.groups, dim=-1)
        return torch.cat([part @ self.get_buffer(f"{name}{g}") for g, part in enumerate(parts)], dim=-1)


def _inverse(basis: Tensor) -> Tensor:
    """A^-1, taken on the CPU, as not every device has float64."""
    inverse: Tensor = torch.linalg.inv(basis.cpu().double())
    return inverse.to(basis.dtype).to(basis.device)


class UNetDenoiser(nn.Module):
    """x0 = x0_gauss + pi_t^(-1/2) * net(x0_gauss, g / pi_t, t, K), with net zero at the start.

    pi_t^(-1/2) is the posterior's standard deviation, by which the correction is scaled. The network sees both inputs,
    and gives the correction, in a frame; without one it stays in task space.
    """

    def __init__(self, size: int, width: int = 256, frame: Frame | None = None) -> None:
        super().__init__()
        self.net = TaskUNet(2 * size, size, width)
        self.frame = frame
        nn.init.zeros_(self.net.out.weight)
        nn.init.zeros_(self.net.out.bias)

    def forward(self, w: Tensor, abar: Tensor, stats: SupportStats, frame: Frame | None = None) -> Tensor:
        """Return x0 (B, N, D); `frame` takes the place of the denoiser's own."""
        x0, pi = gaussian_posterior(w, abar, stats)
        gradient = stats.count * stats.precision / pi * (w - stats.mean)
        frame = self.frame if frame is None else frame
        if frame is None:
            return torch.addcmul(x0, pi.rsqrt(), self.net(torch.cat([x0, gradient], dim=-1), abar, stats.count))
        seen = torch.cat([frame.read(x0), frame.read(gradient)], dim=-1)
        return torch.addcmul(x0, pi.rsqrt(), frame.write(self.net(seen, abar, stats.count)))


class PaperDenoiser(nn.Module):
    """MetaDiff as published: eps from the gradient of the squared distance, whose mean over the shots is w - p.

    A time-modulated U-Net with additive skips, plus the raw gradient through a sigmoid gate.
    """

    def __init__(self, size: int, width: int = 256) -> None:
        super().__init__()
        self.net = TaskUNet(size, size, width, attention=False)
        self.gate = nn.Linear(self.net.condition, size)

    def epsilon(self, w: Tensor, abar: Tensor, stats: SupportStats) -> Tensor:
        """Predicted noise (B, N, D)."""
        gradient = w - stats.mean
        embedding = self.net.embed(abar, stats.count)
        noise: Tensor = self.net(gradient, abar, stats.count) + torch.sigmoid(self.gate(embedding)) * gradient
        return noise

    def forward(self, w: Tensor, abar: Tensor, stats: SupportStats) -> Tensor:
        a = abar.view(-1, 1, 1)
        return (w - (1 - a).sqrt() * self.epsilon(w, abar, stats)) / a.sqrt()


class TaskUNet(nn.Module):
    """An MLP U-Net over the features of each class, with attention across the classes of a task at the bottom.

    (B, N, inputs) -> (B, N, outputs); every block is modulated by the embedding of time and number of shots.
    """

    condition = 64

    def __init__(self, inputs: int, outputs: int, width: int, attention: bool = True) -> None:
        super().__init__()
        widths = [max(width >> i, 8) for i in range(DEPTH + 1)]
        self.embedding = nn.Sequential(nn.Linear(2 * 32, self.condition), nn.SiLU())
        self.inputs = nn.Linear(inputs, width)
        self.down = nn.ModuleList(Block(i, o, self.condition) for i, o in pairwise(widths))
        self.middle = ClassAttention(widths[-1]) if attention else None
        self.up = nn.ModuleList(Block(i, o, self.condition) for i, o in zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.out = nn.Linear(width, outputs)

    def embed(self, abar: Tensor, count: Tensor) -> Tensor:
        """(B or 1, N or 1, condition) from abar (B or 1,) and K (B or 1, N or 1, 1)."""
        signal, count = torch.log(abar / (1 - abar)).view(-1, 1, 1), torch.log(count.clamp_min(1e-6))
        signal, count = torch.broadcast_tensors(signal, count)  # type: ignore[no-untyped-call]
        features = torch.cat([_waves(signal / 4), _waves(count)], dim=-1)
        embedding: Tensor = self.embedding(features)
        return embedding

    def forward(self, x: Tensor, abar: Tensor, count: Tensor) -> Tensor:
        condition = self.embed(abar, count)
        h = self.inputs(x)  # (B, N, width)
        skips = []
        for block in self.down:
            skips.append(h)
            h = block(h, condition)
        h = h if self.middle is None else self.middle(h)
        for block, skip in zip(self.up, reversed(skips), strict=True):
            h = block(h, condition) + skip
        out: Tensor = self.out(F.silu(h))  # (B, N, outputs)
        return out


class TaskDropout(nn.Dropout):
    """Dropout that treats the tasks of a part of a batch as it would in the whole batch, from the same generator."""

    def __init__(self, p: float) -> None:
        super().__init__(p)
        self.first, self.whole = 0, 0  # of the part; 0 stands for no parts

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.whole == 0:
            return super().forward(x)
        factors = super().forward(x.new_ones(self.whole, *x.shape[1:]))
        return x * factors[self.first : self.first + len(x)]


class Block(nn.Module):
    """Normalise, modulate by the condition, non-linearity, linear."""

    def __init__(self, inputs: int, outputs: int, condition: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(inputs)
        self.modulation = nn.Linear(condition, 2 * inputs)
        self.dropout = TaskDropout(DROPOUT)
        self.linear = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.modulation(condition).chunk(2, dim=-1)
        out: Tensor = self.linear(self.dropout(F.silu(self.norm(x) * (1 + scale) + shift)))
        return out


class ClassAttention(nn.Module):
    """Self-attention over the N classes of a task, without positions: permuting classes permutes the result."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)  # (B, N, width) each
        mixed = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = x + self.out(mixed)
        return out


def _waves(x: Tensor, count: int = 16) -> Tensor:
    """Sine and cosine features (..., 2 * count) of x (..., 1) at geometrically spaced frequencies."""
    frequencies = torch.exp(torch.linspace(math.log(0.25), math.log(8.0), count, device=x.device))
    angles = x * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def build_denoiser(kind: str, size: int, width: int, space: TaskSpace | None = None) -> nn.Module:
    """Return the denoiser `kind` ("analytic", "unet", "paper") for feature size D and the task space it works in.

    The numbers of parameters and their shapes do not depend on the `space`, but what a U-Net gives does.
    """
    if kind == "analytic":
        return AnalyticDenoiser()
    if kind == "paper":
        return PaperDenoiser(size, width)
    return UNetDenoiser(size, width, None if space is None else Frame(space))


def randomise(denoiser: nn.Module, seed: int) -> nn.Module:
    """Every linear layer, the last included, at its ordinary random initialisation: the control `untrained`."""
    with default_noise(seeded_noise(seed, CPU), CPU):
        for part in denoiser.modules():
            if isinstance(part, nn.Linear | nn.LayerNorm):
                part.reset_parameters()
    return denoiser.eval()
