"""Meta-training: a denoiser on episodes of base classes, and what is fitted on validation classes afterwards.

Nothing is unrolled: one random time step a task, so a step costs the same for any number of sampling steps. All
randomness of a step follows from (seed, step). `MetaTrainer.run` is a generator of records.
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
from metadiff_cli.core.device import sent
from metadiff_cli.core.encoders.bank import FeatureBank
from metadiff_cli.core.evaluation.episodes import Episodes, check_episodes, training_batch
from metadiff_cli.core.method.denoisers import Ema, PaperDenoiser, TaskDropout, build_denoiser, posterior_precision
from metadiff_cli.core.method.diffusion import Schedule, add_noise
from metadiff_cli.core.method.guidance import domain_of, shared_of
from metadiff_cli.core.method.support import SupportStats, support_stats
from metadiff_cli.core.method.task_space import TaskSpace, class_means
from metadiff_cli.core.training.distributed import mean_of, part_of, synchronised, weight_of
from metadiff_cli.core.training.loop import StepTrainer, Validate, adam_tensors, restore_adam
from metadiff_cli.core.training.world import world

IN_MEMORY = 1 << 30  # bytes of base images in task space; a larger bank is projected task by task
LOGIT_SCALE = 10.0  # of the cross-entropy of held-out images in training


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
    """Held-out images v (B, M, D) in task space, their squared lengths (B, M) in the metric of the noise, and the
    domain (B, 1, D) that they are taken relative to. They are the largest thing of a step, so nothing of their size is
    made anew."""

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


class MetaTrainer(StepTrainer[MetaStep, MetaValidation]):
    """The state of a meta-training run: denoiser, its average, optimiser, and the best average so far."""

    config: MetatrainConfig
    trained = "denoiser"
    remedy = "try a lower --set metatrain.lr=... with --overwrite or another --out"

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
    ) -> None:
        """`means` (C, D) of the classes spare a pass through the bank where they are known.

        Raises DataError when the base classes have too few images for the episodes asked for.
        """
        self.bank, self.config, self.seed, self.device = bank, config, seed, device
        self.shared = shared_of(denoiser.kind)
        self.space = space.to(device)
        self.schedule = Schedule()
        self.abar = self.schedule.abar.float().to(device)
        self.indices = bank.class_indices()
        check_episodes(self.indices, bank.classes, min(config.ways[0], 2), config.shots[1], config.query)
        means = class_means(bank.by_class()) if means is None else means
        self.counts = torch.tensor([len(rows) for rows in self.indices], device=device, dtype=torch.float32)
        self.sums = self.space.to_task(means.float().to(device)) * self.counts.unsqueeze(1)  # (C, D)
        self.points = self._project(np.arange(len(bank.labels))) if _is_small(bank) else None
        self.squares = None if self.points is None else self._squares(self.points)
        torch.manual_seed(seed)
        size = bank.features.shape[1]
        self.denoiser = build_denoiser(denoiser.kind, size, denoiser.width, denoiser.depth, denoiser.dropout).to(device)
        self.part = part_of(config.batch, "metatrain.batch")  # of a step's tasks, those of this process
        if world().size > 1:
            for module in self.denoiser.modules():
                if isinstance(module, TaskDropout):
                    module.first, module.whole = self.part.start, config.batch
        self.synchronised = synchronised(self.loss, self.denoiser)
        self.optimiser = torch.optim.AdamW(
            self.denoiser.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=device.type == "cpu"
        )
        self.ema = Ema(self.denoiser, config.ema)
        self.step = 0
        self.total = torch.zeros((), dtype=torch.float64, device=device)  # of the losses since the last validation
        self.count = 0  # of those losses
        self.best: dict[str, Tensor] = {}
        self.best_gain: float | None = None
        self.history: list[dict[str, Any]] = []

    def start_from(self, denoiser: nn.Module) -> None:
        """Begin with the parameters of another denoiser. Raises ValueError when it is of another size."""
        try:
            self.denoiser.load_state_dict(denoiser.state_dict())
        except RuntimeError as error:
            raise ValueError("a denoiser of another size") from error
        self.ema = Ema(self.denoiser, self.config.ema)

    def averaged(self) -> nn.Module:
        """The denoiser with the averaged parameters, in evaluation mode; the trained one stays as it is."""
        return self._with(self.ema.state())

    def chosen(self) -> nn.Module:
        """The denoiser with the best averaged parameters so far."""
        return self._with(self.best or self.ema.state())

    def _advance(self) -> None:
        self.total += self._train_step(self._lr())
        self.count += 1

    def _now(self) -> MetaStep:
        return MetaStep(self.step, self.config.steps, self._finite(float(self.total)) / self.count)

    def _validate(self, validate: Validate) -> MetaValidation:
        now = self._now()
        measured = validate(self.averaged())
        gain, ci95 = measured if measured else (None, None)
        best = gain is None or self.best_gain is None or gain > self.best_gain
        if best:
            self.best_gain, self.best = gain, self.ema.state()
        record = MetaValidation(**vars(now), gain=gain, ci95=ci95, best=best)
        self.total.zero_()
        self.count = 0
        return record

    def _train_step(self, lr: float) -> Tensor:
        episodes = training_batch(
            self.indices, self.config.ways, self.config.shots, self.config.query,
            batch=self.config.batch, seed=self.seed, step=self.step,
        )  # fmt: skip
        generator = torch.Generator().manual_seed(
            int(np.random.SeedSequence([self.seed, self.step]).generate_state(1)[0])
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator.initial_seed())  # dropout draws from the default generator
            loss = weight_of(self.part, self.config.batch) * self.synchronised(episodes, generator)
        value = mean_of(loss.detach().clone())
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.denoiser.parameters(), 1.0)
        self.optimiser.step()
        self.ema.update(self.denoiser)
        return value

    def loss(self, episodes: Episodes, generator: torch.Generator) -> Tensor:
        """The training loss of a batch of tasks (design, "Training loss"); each process takes its part."""
        self.denoiser.train()
        whole = len(episodes.classes)
        part = part_of(whole, "metatrain.batch")
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
        if isinstance(self.denoiser, PaperDenoiser):
            error: Tensor = F.mse_loss(self.denoiser.epsilon(w, abar, stats), noise)
            return error
        labels, rows = (sent(torch.from_numpy(values), self.device) for values in (episodes.labels, episodes.query))
        squares = self._squares(query) if self.squares is None else self.squares[rows]
        return self._weighted_loss(w, w0, abar, stats, Queries(query, squares, domain), labels)

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

    def _weighted_loss(
        self, w: Tensor, w0: Tensor, abar: Tensor, stats: SupportStats, queries: Queries, labels: Tensor
    ) -> Tensor:
        """Precision-weighted ||x0 - w0||^2 per dimension, plus kappa times the held-out cross-entropy.

        That is of the whitened cosines alone, which need no product with the basis: nothing here leaves the task space.
        """
        x0: Tensor = self.denoiser(w, abar, stats)
        pi = posterior_precision(abar, stats)
        loss: Tensor = (pi * (x0 - w0).square()).mean()
        if self.config.kappa == 0:
            return loss
        logits = LOGIT_SCALE * queries.cosines(x0, self.space.precision)  # (B, M, N)
        return loss + self.config.kappa * F.cross_entropy(logits.flatten(0, 1), labels.flatten())

    def targets(self, episodes: Episodes, support: Tensor, query: Tensor) -> Tensor:
        """w_0 (B, N, D): class means without the images of the episode at hand, `support` (B, N, K, D) and `query`."""
        tasks, ways, shots, size = support.shape
        classes = sent(torch.from_numpy(episodes.classes), self.device)
        held_out = query.view(tasks, ways, -1, size)  # balanced: the queries of a class stand together
        used = support.sum(dim=2) + held_out.sum(dim=2)
        counts = self.counts[classes].unsqueeze(-1)  # (B, N, 1)
        left = counts - shots - held_out.shape[2]
        some = left > 0
        sums = torch.addcmul(self.sums[classes], used, some.to(used), value=-1)
        return sums / torch.where(some, left, counts)

    def _lr(self) -> float:
        """Warm up over the first twentieth, then a cosine to zero."""
        progress = self.step / self.config.steps
        return self.config.lr * min(1.0, 20 * progress + 0.05) * (1 + math.cos(math.pi * progress)) / 2

    def _with(self, parameters: dict[str, Tensor]) -> nn.Module:
        module = copy.deepcopy(self.denoiser)
        module.load_state_dict(parameters, strict=False)
        return module.eval()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that the next step depends on, as tensors by name and plain values."""
        tensors = {f"denoiser.{n}": t for n, t in self.denoiser.state_dict().items()}
        tensors |= {f"ema.{n}": t for n, t in self.ema.average.items()} | {f"best.{n}": t for n, t in self.best.items()}
        tensors |= adam_tensors(self.denoiser, self.optimiser)
        plain = {
            "step": self.step, "total": self._finite(float(self.total)), "count": self.count,
            "updates": self.ema.updates, "best": self.best_gain, "history": self.history,
        }  # fmt: skip
        return tensors, plain

    def restore(self, part: Callable[[str], dict[str, Tensor]], plain: dict[str, Any]) -> None:
        """Go on from a `state`; `part(prefix)` gives the tensors below a prefix."""
        self.denoiser.load_state_dict(part("denoiser"))
        self.ema.average = {n: t.to(self.device) for n, t in part("ema").items()}
        self.ema.updates, self.best = int(plain["updates"]), part("best")
        restore_adam(self.denoiser, self.optimiser, part)
        self.step, self.best_gain = int(plain["step"]), plain["best"]
        self.history = [vars(MetaValidation(**row)).copy() for row in plain["history"]]  # a file has keys sorted
        self.total.fill_(float(plain["total"]))
        self.count = int(plain["count"])


def _is_small(bank: FeatureBank) -> bool:
    """Whether its images may stay in memory in task space, where no step has to bring them there."""
    return 4 * bank.features.size <= IN_MEMORY
