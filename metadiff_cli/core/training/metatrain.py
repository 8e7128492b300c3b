"""Meta-training: the denoiser learns on episodes of base classes.

Nothing is unrolled: each task gets one random time step, so a step costs the same for any number of sampling steps. All
randomness of a step follows from (seed, step).
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metadiff_cli.config.schema import DenoiserConfig, MetatrainConfig
from metadiff_cli.core.device import CPU, default_noise, seeded_noise, sent
from metadiff_cli.core.encoders.bank import FeatureBank
from metadiff_cli.core.evaluation.episodes import Episodes, check_episodes, training_batch
from metadiff_cli.core.method.denoisers import PaperDenoiser, TaskDropout, build_denoiser, posterior_precision
from metadiff_cli.core.method.diffusion import Schedule, add_noise
from metadiff_cli.core.method.guidance import domain_of, shared_of
from metadiff_cli.core.method.support import SupportStats, support_stats
from metadiff_cli.core.method.task_space import TaskSpace, class_means
from metadiff_cli.core.training.distributed import SINGLE, Group
from metadiff_cli.core.training.loop import Ema, Part, Trainer

IN_MEMORY = 1 << 30  # bytes of base images in task space; a larger bank is projected task by task
LOGIT_SCALE = 10.0  # of the cross-entropy of held-out images in training
KAPPA = 1.0  # weight of that cross-entropy in the loss
EMA, WEIGHT_DECAY = 0.99, 0.01


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
        space: TaskSpace,
        denoiser: DenoiserConfig,
        config: MetatrainConfig,
        *,
        seed: int,
        device: torch.device,
        means: Tensor | None = None,
        group: Group = SINGLE,
    ) -> None:
        """`means` (C, D) of the classes spare a pass through the bank where they are known.

        Raises DataError when the base classes have too few images for the episodes.
        """
        super().__init__(1, seed=seed, device=device, group=group)
        self.bank, self.config = bank, config
        self.shared = shared_of(denoiser.kind)
        self.space = space.to(device)
        self.schedule = Schedule()
        self.abar = self.schedule.abar.float().to(device)
        self.indices = bank.class_indices()
        check_episodes(self.indices, bank.classes, min(config.ways[0], 2), config.shots[1], config.query)
        means = class_means(bank.by_class()) if means is None else means
        self.counts = torch.tensor([len(rows) for rows in self.indices], device=device, dtype=torch.float32)
        self.class_sums = self.space.to_task(means.float().to(device)) * self.counts.unsqueeze(1)  # (C, D)
        self.points = self._project(np.arange(len(bank.labels))) if _is_small(bank) else None
        self.squares = None if self.points is None else self._squares(self.points)
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
        episodes = training_batch(
            self.indices, self.config.ways, self.config.shots, self.config.query,
            batch=self.config.batch, seed=self.seed, step=self.step,
        )  # fmt: skip
        seed = int(np.random.SeedSequence([self.seed, self.step]).generate_state(1)[0])
        with default_noise(seeded_noise(seed, self.device), self.device):  # for dropout
            loss = self.parallel_loss(episodes, torch.Generator().manual_seed(seed))
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

    def loss(self, episodes: Episodes, generator: torch.Generator) -> Tensor:
        """The training loss of a batch of tasks (design, "Training loss"), over this process's slice of them."""
        self.module.train()
        whole = len(episodes.classes)
        part = self.group.slice_of(whole, "metatrain.batch")
        episodes = episodes.part(part)
        support, query = self._points(episodes.support), self._points(episodes.query)  # (B, N, K, D), (B, M, D)
        stats = support_stats(support, self.space.precision)
        domain = domain_of(stats, self.shared)
        stats = replace(stats, mean=stats.mean - domain)
        w0 = self.targets(episodes, support, query) - domain
        t = torch.randint(1, self.schedule.steps + 1, (whole,), generator=generator)[part]
        abar = self.abar[sent(t, self.device)]
        noise = sent(torch.randn(whole, *w0.shape[1:], generator=generator)[part], self.device)
        w = add_noise(w0, abar, noise)
        if isinstance(self.module, PaperDenoiser):
            error: Tensor = F.mse_loss(self.module.epsilon(w, abar, stats), noise)
            return error
        labels, rows = (sent(torch.from_numpy(values), self.device) for values in (episodes.labels, episodes.query))
        squares = self._squares(query) if self.squares is None else self.squares[rows]
        return self._weighted_loss(w, w0, abar, stats, Queries(query, squares, domain), labels)

    def _weighted_loss(
        self, w: Tensor, w0: Tensor, abar: Tensor, stats: SupportStats, queries: Queries, labels: Tensor
    ) -> Tensor:
        """Precision-weighted ||x0 - w0||^2 per dimension, plus KAPPA times the cross-entropy of held-out images.

        The cross-entropy is that of the whitened cosines alone, which need no product with the basis: nothing here
        leaves the task space.
        """
        x0: Tensor = self.module(w, abar, stats)
        pi = posterior_precision(abar, stats)
        loss: Tensor = (pi * (x0 - w0).square()).mean()
        logits = LOGIT_SCALE * queries.cosines(x0, self.space.precision)  # (B, M, N)
        return loss + KAPPA * F.cross_entropy(logits.flatten(0, 1), labels.flatten())

    def targets(self, episodes: Episodes, support: Tensor, query: Tensor) -> Tensor:
        """w_0 (B, N, D): class means without the images of the episode at hand, `support` (B, N, K, D) and `query`."""
        tasks, ways, shots, size = support.shape
        classes = sent(torch.from_numpy(episodes.classes), self.device)
        held_out = query.view(tasks, ways, -1, size)  # balanced: the queries of a class stand together
        used = support.sum(dim=2) + held_out.sum(dim=2)
        counts = self.counts[classes].unsqueeze(-1)  # (B, N, 1)
        left = counts - shots - held_out.shape[2]
        some = left > 0
        sums = torch.addcmul(self.class_sums[classes], used, some.to(used), value=-1)
        return sums / torch.where(some, left, counts)

    def _points(self, rows: np.ndarray) -> Tensor:
        """Images (..., D) in task space of rows (...) of the bank."""
        if self.points is not None:
            return F.embedding(sent(torch.from_numpy(rows), self.device), self.points)  # faster than an index
        return self._project(rows)

    def _squares(self, points: Tensor) -> Tensor:
        """Squared lengths (...) of points (..., D) in the metric of the noise."""
        return points.square() @ self.space.precision

    def _project(self, rows: np.ndarray) -> Tensor:
        return self.space.to_task(sent(self.bank.take(rows), self.device))

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, plain = super().state()
        average = {f"ema.{name}": t for name, t in self.ema.average.items()}
        return {**tensors, **average}, {**plain, "updates": self.ema.updates}

    def restore(self, part: Part, plain: dict[str, Any]) -> None:
        super().restore(part, plain)
        self.ema.average = {name: t.to(self.device) for name, t in part("ema").items()}
        self.ema.updates = int(plain["updates"])


def _is_small(bank: FeatureBank) -> bool:
    """Whether its images may stay in memory in task space, where no step has to bring them there."""
    return 4 * bank.features.size <= IN_MEMORY
