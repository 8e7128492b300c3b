"""The inner problem: gradient descent on the cross-entropy of the support, from a prior over the classifier.

A classifier is a matrix W (N, J) over joint features phi (J,), with logits s W phi. The inner loss is

    F(W) = sum_k a_k CE(softmax(s W phi_k), y_k) + rho/2 |W - W_0|^2

with an importance a_k per image: 1, 0 for an image that is left out, or 2 for one that counts twice. Its minimum lies
in the span of the support, W = W_0 + s A' Phi, so the unknown is the dual A (n, N). A problem needs the Gram matrix
G = Phi Phi' and the logits Phi W_0' of its start.

In units of the prior's standard deviation, rho^(-1/2), the deviation W - W_0 is N(0, I), so noisy weights w_t observe
it with the precision c = rho abar / (1 - abar), and the clean weights are estimated by the minimum of
F(W) + c/2 |W - w_t|^2. One step of the reverse diffusion is one Newton step toward it, from the estimate of the step
before. With the bound s^2/2 on the curvature of the cross-entropy (Boehning 1992) it never overshoots:

    A <- A - ((rho + c) I + s^2/2 G)^-1 [a (P - Y) + rho A + c (A - A_t)]       P = softmax(s Phi W_0' + s^2 G A)

In the first step A = A_t = 0, so a single step of sampling is one step of descent. Many steps end at the minimum of F.
(Design, section 2b.)
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

NO_DESCENT = 1e6  # a rho that holds the classifier at W_0
NEAREST = 1e-9  # of 1 - abar: at t = 0 nothing is noise, and the estimate is what is observed


Solver = Callable[[Tensor], Tensor]  # a slope (B, n, N) -> the step that it asks for


class Gram:
    """G = Phi Phi' of B tasks, as the matrix (B, n, n)."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix

    def times(self, dual: Tensor) -> Tensor:
        """Return G A for A (B, n, N)."""
        return self.matrix @ dual

    def solver(self, shift: float, factor: float, root: Tensor) -> Solver:
        """Return r -> D (b I + c D G D)^-1 D^-1 r for r (B, n, N): b `shift`, c `factor`, D = diag(`root`).

        `root` (B or 1, n) is the root of the importance of each image. The step of an image of no importance is 0.
        """
        system = factor * root.unsqueeze(-1) * self.matrix * root.unsqueeze(-2)
        system.diagonal(dim1=-2, dim2=-1).add_(shift)
        triangle, inverse = torch.linalg.cholesky(system), _inverse(root)
        if len(system) == 1:
            return lambda slope: root.unsqueeze(-1) * torch.cholesky_solve(inverse.unsqueeze(-1) * slope, triangle)
        # of a batch torch solves one system after the other, and multiplies all at once
        matrix = root.unsqueeze(-1) * torch.cholesky_inverse(triangle) * inverse.unsqueeze(-2)
        return lambda slope: matrix @ slope


class LowRankGram(Gram):
    """G by Phi (B, n, J), where there are more images than numbers per image: all systems are (J, J)."""

    def __init__(self, features: Tensor) -> None:
        self.features = features

    def times(self, dual: Tensor) -> Tensor:
        """Return G A for A (B, n, N)."""
        return self.features @ (self.features.mT @ dual)

    def solver(self, shift: float, factor: float, root: Tensor) -> Solver:
        """Return the solver of `Gram.solver`, by the identity of Woodbury."""
        root, inverse = root.unsqueeze(-1), _inverse(root).unsqueeze(-1)
        scaled = root * self.features  # (B, n, J)
        system = scaled.mT @ scaled
        system.diagonal(dim1=-2, dim2=-1).add_(shift / factor)
        triangle = torch.linalg.cholesky(system)

        def solve(slope: Tensor) -> Tensor:
            slope = inverse * slope
            return root * (slope - scaled @ torch.cholesky_solve(scaled.mT @ slope, triangle)) / shift

        return solve


def _inverse(root: Tensor) -> Tensor:
    """1 over the root of an importance, and 0 where there is none."""
    return torch.where(root > 0, 1 / root, 0.0)


def softmax(logits: Tensor) -> Tensor:
    """Return the softmax over the classes of logits (..., n, N).

    Torch takes five times as long over a last dimension of few numbers as over the one before it.
    """
    return logits.mT.softmax(dim=-2).mT


def log_softmax(logits: Tensor) -> Tensor:
    """Return the logarithm of `softmax`."""
    return F.log_softmax(logits.mT, dim=-2).mT


def gram_of(features: Tensor) -> Gram:
    """Return G of joint features (B, n, J), in the smaller of its two forms."""
    _, count, size = features.shape
    return Gram(features @ features.mT) if count <= size else LowRankGram(features)


@dataclass(frozen=True)
class InnerProblem:
    """F of B tasks. `start` (B, n, N) is Phi W_0', `target` (n, N) has the labels one-hot.

    `scale` is s and `prior` rho. `importance` a (B or 1, n) is at least 0; None: 1 for every image. A dual A and all
    that is of its kind has the shape (B, n, N).
    """

    gram: Gram
    start: Tensor
    target: Tensor
    scale: float
    prior: float
    importance: Tensor | None = None

    def logits(self, dual: Tensor) -> Tensor:
        """Return the logits s Phi W' of the support images."""
        return self.scale * self.start + self.scale**2 * self.gram.times(dual)

    def loss(self, dual: Tensor) -> Tensor:
        """Return F (B,) in nats."""
        entropy = -(self.target * log_softmax(self.logits(dual))).sum(dim=-1)  # (B, n)
        distance = (dual * self.gram.times(dual)).sum(dim=(1, 2))  # |W - W_0|^2 / s^2
        return (self._importance * entropy).sum(dim=1) + 0.5 * self.prior * self.scale**2 * distance

    def residual(self, dual: Tensor) -> Tensor:
        """Return a (P - Y) + rho A: the gradient of F with respect to W is s times its transpose times Phi."""
        error = softmax(self.logits(dual)) - self.target
        return self._importance.unsqueeze(-1) * error + self.prior * dual

    def step(self, dual: Tensor, solve: Solver, observed: Tensor | None = None, pull: float = 0.0) -> Tensor:
        """Return the dual after one Newton step.

        `observed` are noisy weights, which pull with the precision `pull`, and `solve` is the solver for that
        precision. An image that is left out keeps its dual of 0.
        """
        slope = self.residual(dual)
        if observed is not None:
            slope = slope + pull * (dual - observed)
        return dual - solve(slope)

    def denoise(self, observed: Tensor, abar: float, dual: Tensor) -> Tensor:
        """Return the estimate of the clean weights after one step from `dual`, given those `observed` at `abar`."""
        pull = self.prior * abar / max(1 - abar, NEAREST)
        return self.step(dual, self.solver(pull), observed, pull)

    def descend(self, steps: int) -> Tensor:
        """Return the dual after `steps` steps of plain descent from W_0."""
        dual, solve = torch.zeros_like(self.start), self.solver()
        for _ in range(steps):
            dual = self.step(dual, solve)
        return dual

    def solver(self, pull: float = 0.0) -> Solver:
        """Return the solver of a Newton step with noisy weights that pull with this precision."""
        return self.gram.solver(self.prior + pull, 0.5 * self.scale**2, self._importance.sqrt())

    @cached_property
    def _importance(self) -> Tensor:
        return self.start.new_ones(1, self.start.shape[1]) if self.importance is None else self.importance
