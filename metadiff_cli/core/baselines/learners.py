"""The gradient-based family: classifiers whose starting point is learned and that gradient descent fits to a task.

anil-frozen     on frozen features: a linear head with a learned start (ANIL's inner loop, Raghu et al. 2020)
metasgd-frozen  the same, with a learned rate for each weight (Meta-SGD, Li et al. 2017)
maml            on images: every weight of encoder and head is adapted, second order (Finn et al. 2017)
fomaml          the same, first order
anil            on images: the head alone is adapted, the encoder is learned through that inner loop

The `-frozen` forms are controls of ours on MetaDiff's features, not those papers' methods. Each is a module
(support, query) -> logits (B, M, N), and everything that meta-training learns is a parameter of it. The start of the
head belongs to positions of classes, as published, so a learner serves the number of ways that it was trained for.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from metadiff_cli.config.schema import FrozenBaseline, ImageBaseline
from metadiff_cli.core.device import CPU, autocast, default_noise, seeded_noise
from metadiff_cli.core.encoders.image_encoder import normalise
from metadiff_cli.core.encoders.networks import Encoder
from metadiff_cli.core.evaluation.episodes import Episodes
from metadiff_cli.core.evaluation.evaluate import Method
from metadiff_cli.errors import ConfigError

ON_FEATURES, ON_IMAGES = ("anil-frozen", "metasgd-frozen"), ("maml", "fomaml", "anil")
INNER_STEPS, TEST_STEPS = 5, 10  # of gradient descent on frozen features, in training and afterwards


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
        # as multiples of `rate`, so that one step of the outer optimiser means the same for any rate
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
    """Base: forward(support (B, N, K, ...), query (B, M, ...)) -> logits (B, M, N) after the inner loop.

    `at_once` is the number of tasks that go through in one pass.
    """

    at_once: int

    def __init__(self, way: int, inner_steps: int, test_steps: int) -> None:
        super().__init__()
        self.way, self.inner_steps, self.test_steps = way, inner_steps, test_steps

    @property
    def steps(self) -> int:
        """Steps of the inner loop: `inner_steps` in training, `test_steps` afterwards."""
        return self.inner_steps if self.training else self.test_steps


class FrozenLearner(InnerLearner):
    """A `Head` on unit-length features, relative to the mean of the base classes and of unit length again.

    ReLU features share a large common direction, on which gradient descent at any useful rate would swing.
    """

    at_once = 64
    centre: Tensor

    def __init__(self, method: str, way: int, centre: Tensor, config: FrozenBaseline) -> None:
        """`centre` (D,) is the mean of the base classes."""
        super().__init__(way, INNER_STEPS, TEST_STEPS)
        self.register_buffer("centre", centre)
        self.head = Head(way, len(centre), config.rate, learned_rates=method == "metasgd-frozen")

    def forward(self, support: Tensor, query: Tensor) -> Tensor:
        support, query = (F.normalize(z - self.centre, dim=-1) for z in (support, query))
        logits: Tensor = self.head(support, query, self.steps)
        return logits


class ImageLearner(InnerLearner):
    """Base of the forms on images (uint8 pixels, flat or square); one task after another, so that one is in memory.

    BatchNorm takes the statistics of the batch at hand, as published: the queries of a task are normalised together,
    so each prediction depends on the other queries.
    """

    at_once = 1
    mean: Tensor
    std: Tensor

    def __init__(
        self, way: int, size: int, mean: tuple[float, ...], std: tuple[float, ...], config: ImageBaseline
    ) -> None:
        """`size` is in pixels; `mean` and `std` are those of the three channels, in 0..1."""
        super().__init__(way, config.inner_steps, config.test_steps)
        self.size, self.config = size, config
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("std", torch.tensor(std), persistent=False)

    @property
    def backbone(self) -> Encoder:
        """The encoder under the learner."""
        raise AssertionError("a learner has an encoder of its own")

    def forward(self, support: Tensor, query: Tensor) -> Tensor:
        return torch.stack([self.task(s, q) for s, q in zip(support, query, strict=True)])

    def task(self, support: Tensor, query: Tensor) -> Tensor:
        """Logits (M, N) of one task from support (N, K, ...) and query (M, ...) pixels."""
        raise AssertionError("a learner defines its own task")

    def images(self, pixels: Tensor) -> Tensor:
        """Normalised images (n, 3, S, S) of pixels (..., S * S * 3) or (..., S, S, 3)."""
        return normalise(pixels.reshape(-1, self.size, self.size, 3), self.mean, self.std)

    def through(self, module: nn.Module, weights: dict[str, Tensor], images: Tensor) -> Tensor:
        """Outputs (n, ...) of a module under `weights` for images; in training by the configured precision."""
        with autocast(images.device, self.config.precision if self.training else "fp32"):
            out: Tensor = functional_call(module, weights, (images,))
        return out.to(self.mean.dtype)


class Anil(ImageLearner):
    """The encoder is shared, the head adapts."""

    def __init__(
        self, way: int, encoder: Encoder, size: int, mean: tuple[float, ...], std: tuple[float, ...],
        config: ImageBaseline,
    ) -> None:  # fmt: skip
        super().__init__(way, size, mean, std, config)
        self.encoder = with_task_norm(encoder)
        self.head = Head(way, encoder.feature_size(size), config.rate)

    @property
    def backbone(self) -> Encoder:
        return self.encoder

    def task(self, support: Tensor, query: Tensor) -> Tensor:
        images, queries = self.images(support), self.images(query)
        z = self.through(self.encoder, {}, images).view(1, *support.shape[:2], -1)  # (1, N, K, D)
        logits: Tensor = self.head(z, self.through(self.encoder, {}, queries).unsqueeze(0), self.steps)
        return logits.squeeze(0)


class Maml(ImageLearner):
    """Every weight adapts. In training the outer gradient passes through the inner steps, or around them (fomaml)."""

    def __init__(
        self, way: int, encoder: Encoder, size: int, mean: tuple[float, ...], std: tuple[float, ...],
        config: ImageBaseline, *, second_order: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(way, size, mean, std, config)
        self.second_order = second_order
        self.net = nn.Sequential(with_task_norm(encoder), nn.Linear(encoder.feature_size(size), way))

    @property
    def backbone(self) -> Encoder:
        encoder = self.net[0]
        assert isinstance(encoder, Encoder)
        return encoder

    def task(self, support: Tensor, query: Tensor) -> Tensor:
        images, queries = self.images(support), self.images(query)
        labels = torch.arange(self.way, device=images.device).repeat_interleave(support.shape[1])
        return self.through(self.net, self.adapt(images, labels, self.steps), queries)

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


class TaskNorm(nn.BatchNorm2d):
    """BatchNorm without a memory: the statistics of the batch at hand, in training and afterwards, as MAML has it.

    Images in bf16 are normalised in fp32, as the second derivative would lose too much.
    """

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(self.weight.dtype)
        return F.batch_norm(wide, None, None, self.weight, self.bias, training=True, eps=self.eps).to(x.dtype)


def with_task_norm(module: Encoder) -> Encoder:
    """Replace every BatchNorm of an encoder by `TaskNorm`; returns the encoder."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d) and not isinstance(child, TaskNorm):
                setattr(parent, name, TaskNorm(child.num_features, eps=child.eps, track_running_stats=False))
    return module


def build_image_learner(
    method: str, way: int, build: Callable[[], Encoder], size: int, mean: tuple[float, ...], std: tuple[float, ...],
    config: ImageBaseline, seed: int = 0,
) -> ImageLearner:  # fmt: skip
    """The learner of a method of ON_IMAGES over the encoder that `build` makes, initialised at random by `seed`."""
    with default_noise(seeded_noise(seed, CPU), CPU):
        network = build()
        if method == "anil":
            return Anil(way, network, size, mean, std, config)
        return Maml(way, network, size, mean, std, config, second_order=method == "maml")


def inner_method(learner: InnerLearner, way: int) -> Method:
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
        return torch.cat([learner(s, q).softmax(dim=-1) for s, q in parts])

    return run
