"""The gradient-based family: classifiers whose starting point is learned and that gradient descent fits to a task.

anil-frozen     on frozen features: a linear head with a learned start (ANIL's inner loop, Raghu et al. 2020)
metasgd-frozen  the same, with a learned rate for each weight (Meta-SGD, Li et al. 2017)
maml            on images: every weight of encoder and head is adapted, second order (Finn et al. 2017)
fomaml          the same, first order
anil            on images: the head alone is adapted, the encoder is learned through that inner loop

The `-frozen` forms are controls of ours on MetaDiff's features, not those papers' methods. Each is a module
(support, query, steps) -> logits (B, M, N), and everything that meta-training learns is a parameter of it. The start
of the head belongs to positions of classes, as published, so a learner serves the number of ways it was trained for.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from metadiff_cli.config.schema import FrozenBaseline, ImageBaseline
from metadiff_cli.core.baselines.tasknorm import statistics_of_first, with_task_norm
from metadiff_cli.core.device import autocast
from metadiff_cli.core.encoders.image_encoder import normalise
from metadiff_cli.core.encoders.networks import Encoder
from metadiff_cli.core.evaluation.episodes import Episodes
from metadiff_cli.core.evaluation.evaluate import Method
from metadiff_cli.errors import ConfigError

ON_FEATURES, ON_IMAGES = ("anil-frozen", "metasgd-frozen"), ("maml", "fomaml", "anil")


class Head(nn.Module):
    """A linear head of N ways with a learned start, adapted by steps of gradient descent on the cross-entropy.

    The gradient is written out, which makes the inner loop a few matrix products for all tasks at once; autograd
    differentiates through it, so training is of second order and its memory grows with the number of steps.
    """

    def __init__(self, way: int, size: int, rate: float, learned_rates: bool = False) -> None:
        super().__init__()
        self.rate = rate
        self.weight = nn.Parameter(torch.zeros(way, size))
        self.bias = nn.Parameter(torch.zeros(way))
        # in units of `rate`, so that one step of the outer optimiser means the same for any rate
        self.rates = nn.Parameter(torch.ones(way, size + 1)) if learned_rates else None

    def adapt(self, z: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """Weights (B, N, D) and biases (B, 1, N) after `steps` steps on support features z (B, N, K, D)."""
        tasks, ways, shots, size = z.shape
        x = z.reshape(tasks, ways * shots, size)  # (B, M, D)
        target = torch.eye(ways, device=z.device).repeat_interleave(shots, dim=0)  # (M, N)
        weight, bias = self.weight.expand(tasks, -1, -1), self.bias.expand(tasks, 1, -1)
        weight_rate: Tensor | float = self.rate if self.rates is None else self.rate * self.rates[:, :-1]
        bias_rate: Tensor | float = self.rate if self.rates is None else self.rate * self.rates[:, -1]
        for _ in range(steps):
            error = ((x @ weight.mT + bias).softmax(dim=-1) - target) / len(target)
            weight = weight - weight_rate * (error.mT @ x)
            bias = bias - bias_rate * error.sum(dim=1, keepdim=True)
        return weight, bias

    def forward(self, support: Tensor, query: Tensor, steps: int) -> Tensor:
        """Logits (B, M, N) of query features (B, M, D) after adaptation to support features (B, N, K, D)."""
        weight, bias = self.adapt(support, steps)
        return query @ weight.mT + bias


class InnerLearner(nn.Module):
    """Base: forward(support (B, N, K, ...), query (B, M, ...), steps) -> logits (B, M, N); `at_once` tasks a pass."""

    at_once: int
    way: int


class FrozenLearner(InnerLearner):
    """A `Head` on unit-length features, relative to the mean of the base classes and of unit length again.

    ReLU features share a large common direction, on which gradient descent at any useful rate would swing.
    """

    at_once = 64
    centre: Tensor

    def __init__(self, method: str, way: int, centre: Tensor, config: FrozenBaseline) -> None:
        """`centre` (D,) is the mean of the base classes."""
        super().__init__()
        self.way = way
        self.register_buffer("centre", centre)
        self.head = Head(way, len(centre), config.rate, learned_rates=method == "metasgd-frozen")

    def forward(self, support: Tensor, query: Tensor, steps: int) -> Tensor:
        support, query = (F.normalize(z - self.centre, dim=-1) for z in (support, query))
        logits: Tensor = self.head(support, query, steps)
        return logits


class ImageLearner(InnerLearner):
    """Base of the forms on images (uint8 pixels, flat or square); one task after another, so that one is in memory.

    With statistics "queries", as published, the queries of a task are normalised together, so that a prediction depends
    on the other queries. With "support" they are normalised by the support's statistics and each stands alone.
    """

    at_once = 1
    mean: Tensor
    std: Tensor

    def __init__(
        self, way: int, size: int, mean: tuple[float, ...], std: tuple[float, ...], config: ImageBaseline
    ) -> None:
        super().__init__()
        self.way, self.size, self.config = way, size, config
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("std", torch.tensor(std), persistent=False)

    def images(self, pixels: Tensor) -> Tensor:
        """Normalised images (n, 3, S, S) of pixels (..., S * S * 3) or (..., S, S, 3)."""
        return normalise(pixels.reshape(-1, self.size, self.size, 3), self.mean, self.std)

    def forward(self, support: Tensor, query: Tensor, steps: int) -> Tensor:
        return torch.stack([self.task(s, q, steps) for s, q in zip(support, query, strict=True)])

    def task(self, support: Tensor, query: Tensor, steps: int) -> Tensor:
        """Logits (M, N) of one task from support (N, K, ...) and query (M, ...) pixels."""
        raise AssertionError("a learner defines its own task")

    def through(self, module: nn.Module, weights: dict[str, Tensor], images: Tensor) -> Tensor:
        """Outputs (n, ...) of a module under `weights` for images; in training by the configured precision."""
        with autocast(images.device, self.config.precision if self.training else "fp32"):
            out: Tensor = functional_call(module, weights, (images,))
        return out.to(self.mean.dtype)

    def run(self, module: nn.Module, weights: dict[str, Tensor], support: Tensor, query: Tensor) -> Tensor:
        """Outputs (M, ...) of a module under `weights` for query images, with the configured statistics."""
        if self.config.statistics == "queries":
            return self.through(module, weights, query)
        with statistics_of_first(module, len(support)):
            return self.through(module, weights, torch.cat([support, query]))[len(support) :]


class Anil(ImageLearner):
    """The encoder is shared, the head adapts."""

    def __init__(self, way: int, encoder: Encoder, size: int, *more: Any) -> None:
        super().__init__(way, size, *more)
        self.encoder = with_task_norm(encoder)
        self.head = Head(way, encoder.feature_size(size), self.config.rate)

    def task(self, support: Tensor, query: Tensor, steps: int) -> Tensor:
        images, queries = self.images(support), self.images(query)
        z = self.through(self.encoder, {}, images).view(1, *support.shape[:2], -1)  # (1, N, K, D)
        logits: Tensor = self.head(z, self.run(self.encoder, {}, images, queries).unsqueeze(0), steps)
        return logits.squeeze(0)


class Maml(ImageLearner):
    """Every weight adapts. In training the outer gradient passes through the inner steps, or around them (fomaml)."""

    def __init__(self, way: int, encoder: Encoder, size: int, *more: Any, second_order: bool = True) -> None:
        super().__init__(way, size, *more)
        self.second_order = second_order
        self.net = nn.Sequential(with_task_norm(encoder), nn.Linear(encoder.feature_size(size), way))

    def task(self, support: Tensor, query: Tensor, steps: int) -> Tensor:
        images, queries = self.images(support), self.images(query)
        labels = torch.arange(self.way, device=images.device).repeat_interleave(support.shape[1])
        weights = self.adapt(images, labels, steps)
        return self.run(self.net, weights, images, queries)

    def adapt(self, images: Tensor, labels: Tensor, steps: int) -> dict[str, Tensor]:
        """The weights by name after `steps` steps of gradient descent on the cross-entropy of the support."""
        keep = self.training and torch.is_grad_enabled()
        weights: dict[str, Tensor] = dict(self.net.named_parameters())
        if not keep:
            weights = {name: w.detach().requires_grad_() for name, w in weights.items()}
        for _ in range(steps):
            with torch.enable_grad():
                loss = F.cross_entropy(self.through(self.net, weights, images), labels)
            slopes = torch.autograd.grad(loss, list(weights.values()), create_graph=keep and self.second_order)
            weights = {n: w - self.config.rate * g for (n, w), g in zip(weights.items(), slopes, strict=True)}
            if not keep:
                weights = {name: w.detach().requires_grad_() for name, w in weights.items()}
        return weights


def build_image_learner(
    method: str, way: int, encoder: Encoder, size: int, mean: tuple[float, ...], std: tuple[float, ...],
    config: ImageBaseline,
) -> ImageLearner:  # fmt: skip
    """The learner of a method of ON_IMAGES over a randomly initialised encoder, which becomes part of it."""
    if method == "anil":
        return Anil(way, encoder, size, mean, std, config)
    return Maml(way, encoder, size, mean, std, config, second_order=method == "maml")


def inner_method(learner: InnerLearner, steps: int, way: int) -> Method:
    """A trained learner as a method of `evaluate`. Raises ConfigError for another number of ways than its own."""
    if way != learner.way:
        raise ConfigError(
            f"a baseline trained for {learner.way}-way tasks cannot take {way}-way ones", hint=f"--way {learner.way}"
        )
    learner.eval()

    @torch.no_grad()
    def run(support: Tensor, query: Tensor, episodes: Episodes, first: int) -> Tensor:
        starts = range(0, len(support), learner.at_once)
        parts = ((support[i : i + learner.at_once], query[i : i + learner.at_once]) for i in starts)
        return torch.cat([learner(s, q, steps).softmax(dim=-1) for s, q in parts])

    return run
