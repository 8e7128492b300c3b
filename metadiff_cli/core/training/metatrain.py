"""Meta-training: the denoiser learns on episodes of base classes.

Nothing is unrolled: each task gets one random time step, so a step costs the same for any number of sampling steps. All
randomness of a step follows from (seed, step).

A task space that was made of the classes of a task knows them, as no space knows new classes. So the base classes are
dealt into PARTS parts, and a task takes classes of one part, in the space of the statistics of all classes outside of
it (cross-fitting; design, section 2b).
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metadiff_cli.config.schema import DenoiserConfig, MetatrainConfig
from metadiff_cli.core.device import CPU, default_noise, seeded_noise, sent
from metadiff_cli.core.distributed import SINGLE, Group
from metadiff_cli.core.encoders.bank import FeatureBank
from metadiff_cli.core.evaluation.episodes import Episodes, training_batch
from metadiff_cli.core.method.adapt import Tuning
from metadiff_cli.core.method.denoisers import (
    Frame,
    PaperDenoiser,
    TaskDropout,
    UNetDenoiser,
    build_denoiser,
    posterior_precision,
)
from metadiff_cli.core.method.diffusion import Schedule, add_noise
from metadiff_cli.core.method.support import support_stats
from metadiff_cli.core.method.task_space import TaskSpace
from metadiff_cli.core.training.loop import Ema, Part, Trainer
from metadiff_cli.errors import DataError

PARTS = 4  # parts of the base classes, as far as each gets a pair of classes
PAIR = 2  # classes of the smallest task
IN_MEMORY = 1 << 30  # bytes of base images in task space; a larger bank is projected task by task
LOGIT_SCALE = 10.0  # of the cross-entropy of held-out images in training
KAPPA = 1.0  # weight of that cross-entropy in the loss
EMA, WEIGHT_DECAY = 0.99, 0.01


@dataclass(frozen=True)
class ClassPool:
    """Base classes that make tasks with each other: their numbers (C,), and the part of the classes they belong to."""

    classes: np.ndarray
    part: int


def images_needed(config: MetatrainConfig) -> int:
    """Return the images that a class of training has at least: those of an episode, and one for the target."""
    return config.shots[1] + config.query + 1


def classes_needed(kind: str) -> int:
    """Return how many classes of training a denoiser needs: one pair, or two where it is cross-fitted."""
    return 2 * PAIR if kind == "unet" else PAIR


def deal(sets: Sequence[Sequence[int]], needed: int, kind: str, seed: int) -> list[int]:
    """Return the number of the part that each base class is dealt into, -1 for a class in none.

    `sets` has the images of each class of each data set. A class with fewer than `needed` images is in no part. A data
    set gives two classes or more to a part, or none. Denoisers of a `kind` that is not cross-fitted have one part.
    Raises DataError where there are not `classes_needed`.
    """
    able, folds = sum(images >= needed for each in sets for images in each), PARTS if kind == "unet" else 1
    if able < (least := classes_needed(kind)):
        raise DataError(
            f"the training of a denoiser needs {least} base classes of {needed} images or more; there are {able}",
            hint="add images, lower metatrain.shots or metatrain.query with --set, or --set denoiser.kind=analytic",
        )
    rng, folds, parts = np.random.default_rng(seed), min(folds, able // PAIR), list[int]()
    for first, images in enumerate(sets):
        chosen = rng.permutation([c for c, count in enumerate(images) if count >= needed])
        turns = min(folds, len(chosen) // PAIR)
        part = np.full(len(images), -1)
        if turns:
            part[chosen] = (first + np.arange(len(chosen)) % turns) % folds
        parts += part.tolist()
    return parts


def pools_of(sets: Sequence[Sequence[int]], parts: Sequence[int]) -> list[ClassPool]:
    """Return the pools of tasks: the classes of each data set in each part; arguments are those of `deal`."""
    origin = np.repeat(np.arange(len(sets)), [len(images) for images in sets])
    places = sorted({(part, int(of)) for part, of in zip(parts, origin, strict=True) if part >= 0})
    return [ClassPool(np.flatnonzero((origin == of) & (np.array(parts) == part)), part) for part, of in places]


@dataclass(frozen=True)
class MetaStep:
    """Mean loss since the last validation."""

    step: int
    steps: int
    loss: float


@dataclass(frozen=True)
class MetaValidation:
    """Paired gain of the averaged denoiser over `analytic` on validation episodes, in percentage points."""

    step: int
    steps: int
    loss: float
    gain: float | None
    ci95: float | None
    best: bool


@dataclass(frozen=True)
class Queries:
    """Held-out images in task space, the largest tensor of a step, so that nothing of their size is made anew.

    Images v (B, M, D), their squared lengths (B, M) in the metric of the noise, and the domain (B, 1, D) that is
    subtracted from them.
    """

    points: Tensor
    squares: Tensor
    domain: Tensor

    def cosines(self, w: Tensor, precision: Tensor) -> Tensor:
        """Cosines (B, M, N) of v - domain to w (B, N, D) in the metric diag(precision)."""
        both = torch.cat([w, self.domain], dim=1) * precision  # (B, N + 1, D)
        # the points on the right, so that the backward pass reads them as they lie: it takes a third of the time
        products, offset = both @ self.points.mT, both @ self.domain.mT  # (B, N + 1, M), (B, N + 1, 1)
        inner = products[:, :-1] - offset[:, :-1]
        squares = self.squares.unsqueeze(1) - 2 * products[:, -1:] + offset[:, -1:]  # (B, 1, M)
        lengths = squares.clamp_min(1e-12).sqrt() * (w.square() @ precision).clamp_min(1e-12).sqrt().unsqueeze(2)
        return (inner / lengths).mT


class MetaTrainer(Trainer[MetaStep, MetaValidation]):
    """Trains a denoiser and its average; the best average is kept."""

    trained = "denoiser"
    remedy = "try a lower --set metatrain.lr=... with --overwrite or another --out"
    validation_type = MetaValidation
    module: nn.Module

    def __init__(
        self,
        bank: FeatureBank,
        pools: Sequence[ClassPool],
        spaces: Mapping[int, TaskSpace],
        space: TaskSpace,
        denoiser: DenoiserConfig,
        config: MetatrainConfig,
        *,
        means: Tensor,
        tuning: Tuning,
        seed: int,
        device: torch.device,
        group: Group = SINGLE,
    ) -> None:
        """Tasks are drawn from `pools`, in the `spaces` of their parts, and adapt as `tuning` says.

        What is trained serves tasks in `space`. `means` (C, D) are those of the classes of the bank. Each class of a
        pool has `images_needed`.
        """
        super().__init__(1, seed=seed, device=device, group=group)
        self.bank, self.config, self.tuning = bank, config, tuning
        self.pools, self.spaces = pools, {part: space.to(device) for part, space in spaces.items()}
        self.schedule = Schedule()
        self.abar = torch.tensor(self.schedule.abar, device=device)
        self.indices = bank.class_indices()
        assert all(len(self.indices[c]) >= images_needed(config) for pool in pools for c in pool.classes)
        self.counts = torch.tensor([len(rows) for rows in self.indices], device=device, dtype=torch.float32)
        self.class_sums = self._class_sums(means)
        found = self._all_points() if _is_small(bank) else (None, None)
        self.points: Tensor | None = found[0]
        self.squares: Tensor | None = found[1]
        self.frame: Frame | None = None
        self.frames: dict[int, Frame] = {}
        if denoiser.kind == "unet":
            frame = Frame(space)  # made where the spaces are, as not every device can invert a matrix
            self.frames = {part: Frame(of, frame.references).to(device) for part, of in spaces.items()}
            self.frame = frame.to(device)
        with default_noise(seeded_noise(seed, CPU), CPU):
            self.module = build_denoiser(denoiser.kind, bank.features.shape[1], denoiser.width).to(device)
        self.part = group.slice_of(config.batch, "metatrain.batch")  # this process's tasks of a step
        if group.world_size > 1:
            for module in self.module.modules():
                if isinstance(module, TaskDropout):
                    module.first, module.whole = self.part.start, config.batch
        self.parallel_loss = group.data_parallel(self.loss, self.module)
        self.optimiser = torch.optim.AdamW(
            self.module.parameters(), lr=config.lr, weight_decay=WEIGHT_DECAY, fused=device.type == "cpu"
        )
        self.ema = Ema(self.module, EMA)

    @property
    def steps(self) -> int:
        return self.config.steps

    @property
    def validate_every(self) -> int:
        return self.config.validate_every

    def start_from(self, denoiser: nn.Module) -> None:
        """Begin with the parameters of another denoiser. Raises ValueError when it is of another size."""
        try:
            self.module.load_state_dict(denoiser.state_dict())
        except RuntimeError as error:
            raise ValueError("a denoiser of another size") from error
        self.ema = Ema(self.module, EMA)

    def averaged(self) -> nn.Module:
        """The denoiser with the averaged parameters, in evaluation mode; the trained one stays as it is."""
        return self._with(self.ema.state())

    def chosen(self) -> nn.Module:
        """The denoiser with the best averaged parameters so far."""
        return self._with(self.best or self.ema.state())

    def _with(self, parameters: dict[str, Tensor]) -> nn.Module:
        module = copy.deepcopy(self.module)
        module.load_state_dict(parameters, strict=False)
        if isinstance(module, UNetDenoiser):
            module.frame = self.frame
        return module.eval()

    def _advance(self) -> None:
        self.sums.add(self._train_step(self._lr()))

    def _report(self) -> MetaStep:
        return MetaStep(self.step, self.steps, self._read()[0] / self.sums.count)

    def _validate(self, validate: Callable[[nn.Module], tuple[float, float] | None]) -> MetaValidation:
        now = self._report()
        measured = validate(self.averaged())
        gain, ci95 = measured if measured else (None, None)
        best = self._keep_best(gain, self.ema.average)
        self.sums.reset()
        return MetaValidation(**vars(now), gain=gain, ci95=ci95, best=best)

    def _lr(self) -> float:
        """Warm up over the first twentieth, then a cosine to zero."""
        progress = self.step / self.config.steps
        return self.config.lr * min(1.0, 20 * progress + 0.05) * (1 + math.cos(math.pi * progress)) / 2

    def _train_step(self, lr: float) -> Tensor:
        """Take one step at the learning rate `lr`; returns the loss (1,), the mean over all tasks."""
        number, episodes = self.draw(self.step)
        seed = int(np.random.SeedSequence([self.seed, self.step]).generate_state(1)[0])
        with default_noise(seeded_noise(seed, self.device), self.device):  # for dropout
            loss = self.parallel_loss(number, episodes, torch.Generator().manual_seed(seed))
        loss = self.group.weight_of(self.part, self.config.batch) * loss
        value = self.group.mean_(loss.detach().clone())
        for parameters in self.optimiser.param_groups:
            parameters["lr"] = lr
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimiser.step()
        self.ema.update(self.module)
        return value.view(1)

    def draw(self, step: int) -> tuple[int, Episodes]:
        """Return the number of the pool of a step, drawn by its number of classes, and the tasks of the step."""
        rng = np.random.default_rng([self.seed, step, len(self.pools)])
        sizes = np.array([len(pool.classes) for pool in self.pools])
        number = int(rng.choice(len(sizes), p=sizes / sizes.sum()))
        classes = self.pools[number].classes
        tasks = training_batch(
            [self.indices[c] for c in classes], self.config.ways, self.config.shots, self.config.query,
            batch=self.config.batch, seed=self.seed, step=step,
        )  # fmt: skip
        return number, replace(tasks, classes=classes[tasks.classes])

    def loss(self, number: int, episodes: Episodes, generator: torch.Generator) -> Tensor:
        """The training loss of tasks of a pool (design, "Training loss"), over this process's slice of them.

        The tasks have the guidance scale and the domain that adaptation would give them.
        """
        self.module.train()
        whole, place = len(episodes.classes), self.pools[number].part
        part, precision = self.group.slice_of(whole, "metatrain.batch"), self.spaces[place].precision
        episodes = episodes.part(part)
        support, query = (self._points(rows, place) for rows in (episodes.support, episodes.query))  # (B, N, K, D), ..
        stats = support_stats(support, precision)
        ways, shots = support.shape[1:3]
        domain = self.tuning.domain.at(ways, shots) * stats.mean.mean(dim=1, keepdim=True)  # (B, 1, D)
        stats = replace(stats, mean=stats.mean - domain).scaled(self.tuning.guidance.at(ways, shots))
        w0 = self.targets(episodes, support, query) - domain
        t = torch.randint(1, self.schedule.steps + 1, (whole,), generator=generator)[part]
        abar = self.abar[sent(t, self.device)]
        noise = sent(torch.randn(whole, *w0.shape[1:], generator=generator)[part], self.device)
        w = add_noise(w0, abar, noise)
        if isinstance(self.module, PaperDenoiser):
            error: Tensor = F.mse_loss(self.module.epsilon(w, abar, stats), noise)
            return error
        x0: Tensor = self.module(w, abar, stats, self.frames[place])
        labels, rows = (sent(torch.from_numpy(values), self.device) for values in (episodes.labels, episodes.query))
        squares = query.square() @ precision if self.squares is None else self.squares[rows]
        pi = posterior_precision(abar, stats)
        return _weighted_loss(x0, w0, pi, Queries(query, squares, domain), precision, labels)

    def targets(self, episodes: Episodes, support: Tensor, query: Tensor) -> Tensor:
        """w_0 (B, N, D): class means without the images of the episode at hand, `support` (B, N, K, D) and `query`."""
        tasks, ways, shots, size = support.shape
        classes = sent(torch.from_numpy(episodes.classes), self.device)
        held_out = query.view(tasks, ways, -1, size)  # balanced: the queries of a class stand together
        used = support.sum(dim=2) + held_out.sum(dim=2)
        left = self.counts[classes].unsqueeze(-1) - shots - held_out.shape[2]  # (B, N, 1), at least 1
        return (self.class_sums[classes] - used) / left

    def _points(self, rows: np.ndarray, part: int) -> Tensor:
        """Images (..., D) in the task space of a part, of rows (...) of the bank."""
        if self.points is not None:
            return F.embedding(sent(torch.from_numpy(rows), self.device), self.points)  # faster than an index
        return self.spaces[part].to_task(sent(self.bank.take(rows), self.device))

    def _all_points(self) -> tuple[Tensor, Tensor]:
        """All images (n, D), each in the task space of its part, and their squared lengths (n,) as in `Queries`.

        Both are 0 for an image that no task takes.
        """
        points = torch.zeros(self.bank.features.shape, device=self.device)
        squares = torch.zeros(len(points), device=self.device)
        for pool in self.pools:
            space = self.spaces[pool.part]
            for rows in (self.indices[c] for c in pool.classes):
                found = space.to_task(sent(self.bank.take(rows), self.device))
                points[rows], squares[rows] = found, found.square() @ space.precision
        return points, squares

    def _class_sums(self, means: Tensor) -> Tensor:
        """Sums (C, D) of the images of each class, in the task space of its part, from the means (C, D)."""
        sums = torch.zeros(means.shape, device=self.device)
        for pool in self.pools:
            found = self.spaces[pool.part].to_task(means[pool.classes].float().to(self.device))
            sums[pool.classes] = found * self.counts[pool.classes].unsqueeze(1)
        return sums

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, plain = super().state()
        average = {f"ema.{name}": t for name, t in self.ema.average.items()}
        return {**tensors, **average}, {**plain, "updates": self.ema.updates}

    def restore(self, part: Part, plain: dict[str, Any]) -> None:
        super().restore(part, plain)
        self.ema.average = {name: t.to(self.device) for name, t in part("ema").items()}
        self.ema.updates = int(plain["updates"])


def _weighted_loss(x0: Tensor, w0: Tensor, pi: Tensor, queries: Queries, precision: Tensor, labels: Tensor) -> Tensor:
    """Precision-weighted ||x0 - w0||^2 per dimension, plus KAPPA times the cross-entropy of held-out images.

    The cross-entropy is that of the whitened cosines alone, which need no product with the basis: nothing here leaves
    the task space.
    """
    loss: Tensor = (pi * (x0 - w0).square()).mean()
    logits = LOGIT_SCALE * queries.cosines(x0, precision)  # (B, M, N)
    return loss + KAPPA * F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def _is_small(bank: FeatureBank) -> bool:
    """Whether its images may stay in memory in task space, where no step has to bring them there."""
    return 4 * bank.features.size <= IN_MEMORY
