"""Logits of a classifier: cosines of plain features and of features whitened by the noise within a class."""

import torch
import torch.nn.functional as F
from torch import Tensor

from metadiff_cli.core.method.task_space import TaskSpace

SHORTEST = 1e-12  # what a length counts for at least
HALF_TRUST = 10.0  # the guidance scale at which the two metrics weigh the same; see task_logits


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
