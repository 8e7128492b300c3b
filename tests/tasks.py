"""Made-up tasks as features, and the method written out slowly: what the tests of the method compare it with."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from torch import Tensor

from metadiff_cli.config.schema import DenoiserConfig, MetatrainConfig
from metadiff_cli.core.encoders.bank import FeatureBank
from metadiff_cli.core.method.adapt import MetaDiff, Sampling, TaskClassifier, Tuning, adapt_tasks, seeds_of
from metadiff_cli.core.method.calibration import TaskTable
from metadiff_cli.core.method.metric import Metric, TaskSettings
from metadiff_cli.core.method.support import TaskSupport
from metadiff_cli.core.method.task_space import class_statistics, cross_fitted
from metadiff_cli.core.training.metatrain import MetaTrainer, deal, images_needed, pools_of
from tests.worlds import CPU

ONE, TWO = (24,), (16, 8)  # sizes of the groups of features


def features(classes: int, images: int, seed: int, groups: Sequence[int] = ONE) -> Tensor:
    """Classes (classes, images, D) of one world: means and noise differ by direction, and each group has length 1."""
    g, size = torch.Generator().manual_seed(seed), sum(groups)
    scale = torch.linspace(2.0, 0.1, size)
    z = torch.randn(classes, 1, size, generator=g) * scale
    z = z + torch.randn(classes, images, size, generator=g) * scale.flip(0)
    return torch.cat([F.normalize(part, dim=-1) for part in z.split(list(groups), dim=-1)], dim=-1)


def bank_of(z: Tensor) -> FeatureBank:
    """The bank of classes (classes, images, D)."""
    classes, images, _ = z.shape
    labels = np.repeat(np.arange(classes), images)
    return FeatureBank(z.flatten(0, 1).numpy(), labels, tuple(f"class {c}" for c in range(classes)))


@cache
def metric_of(groups: tuple[int, ...] = ONE, base: bool = True, plain: bool = True) -> Metric:
    """The metric with the statistics of 40 base classes of that world, or of none."""
    if not base:
        return Metric(groups, None)
    return Metric(groups, class_statistics(list(features(40, 30, 0, groups)), groups).task_space(), plain)


METRICS: dict[str, Callable[[], Metric]] = {
    "one group": lambda: metric_of(ONE),
    "two groups": lambda: metric_of(TWO),
    "without base classes": lambda: metric_of(ONE, base=False),
    "two groups without base classes": lambda: metric_of(TWO, base=False),
    "whitened alone": lambda: metric_of(TWO, plain=False),
}


def support_of(metric: Metric, counts: Sequence[int], seed: int = 1, tasks: int = 1) -> TaskSupport:
    """The support of tasks whose classes have these numbers of images, in a mixed order."""
    z = torch.stack([features(len(counts), max(counts), 1000 * seed + b, metric.groups) for b in range(tasks)])
    chosen = torch.cat([z[:, c, :count] for c, count in enumerate(counts)], dim=1)
    labels = torch.repeat_interleave(torch.tensor(counts))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    return TaskSupport(metric.expand(chosen[:, order]), labels[order])


def settings_of(tasks: int = 1, **changes: Any) -> TaskSettings:
    """Hyper-parameters that are all in force; `changes` are numbers, or one per task."""
    values = {"guidance": 4.0, "level": 0.3, "domain": 0.8, "temperature": 1.5, "scale": 4.0, "prior": 0.5, **changes}
    ones, numbers = torch.ones(tasks), ("scale", "prior")
    return TaskSettings(**{name: value if name in numbers else value * ones for name, value in values.items()})


def tuned(metric: Metric, **settings: Any) -> MetaDiff:
    """A MetaDiff whose tasks have these settings of `settings_of`, as far as their support does not tell otherwise."""
    return MetaDiff(metric).tuned(**tables(settings_of(**settings)))


def tables(settings: TaskSettings) -> dict[str, TaskTable]:
    """Settings as tables of one value."""
    return {name: TaskTable.constant(float(value)) for name, value in vars(settings).items()}


def adapted(
    metadiff: MetaDiff, support: TaskSupport, sampling: Sampling | None = None, **changes: Any
) -> TaskClassifier:
    """The classifiers of tasks whose classes are ranked as they are numbered."""
    usual = {"ranks": ranks_of(support), "seeds": seeds_of(0, 0, len(support.x))}
    return adapt_tasks(metadiff, support, sampling or Sampling(), **{**usual, **changes})


def ranks_of(support: TaskSupport) -> Tensor:
    """The classes in the order of their numbers."""
    return torch.arange(support.ways).expand(len(support.x), -1)


class Slow:
    """One task as the design has it, in float64: domain, joint features, start, and the loss F of any classifier."""

    def __init__(self, metric: Metric, support: TaskSupport, settings: TaskSettings) -> None:
        self.metric, self.settings = metric, settings
        self.x, self.labels = support.x[0].double(), support.labels
        counts = torch.bincount(self.labels).double().unsqueeze(1)
        means = torch.stack([self.x[self.labels == c].mean(dim=0) for c in range(len(counts))])
        origin = torch.zeros_like(self.x[0])
        if metric.space is not None:
            origin = metric.expand(metric.space.mean).double()
        share = float(settings.domain)
        self.domain = (1 - share) * origin + share * self.x.mean(dim=0)
        self.phi = self.embed(self.x)
        moved = means - self.domain
        if metric.space is not None:
            evidence = counts * float(settings.guidance) * metric.space.precision.double()
            whole = moved.shape[1]
            moved = moved.clone()
            moved[:, whole - evidence.shape[1] :] *= evidence / (1 + evidence)
        self.start = self.embed(moved + self.domain)

    def embed(self, x: Tensor) -> Tensor:
        """phi (n, J) of x (n, J)."""
        weights = self.metric.weights(self.settings)[0].double()
        parts = self.metric.split(x.double() - self.domain)
        return torch.cat([w.sqrt() * F.normalize(p, dim=-1) for w, p in zip(weights, parts, strict=True)], dim=-1)

    def loss(self, weights: Tensor, importance: Tensor | None = None) -> Tensor:
        """F of a classifier (N, J)."""
        each = F.cross_entropy(self.settings.scale * self.phi @ weights.T, self.labels, reduction="none")
        total = each.sum() if importance is None else (importance * each).sum()
        return total + self.settings.prior / 2 * (weights - self.start).square().sum()

    def minimum(self, importance: Tensor | None = None) -> Tensor:
        """The classifier (N, J) with the least F, by SciPy."""

        def value(flat: np.ndarray) -> tuple[float, np.ndarray]:
            weights = torch.from_numpy(flat).view_as(self.start).requires_grad_()
            loss = self.loss(weights, importance)
            (slope,) = torch.autograd.grad(loss, weights)
            return loss.item(), slope.flatten().numpy()

        found = minimize(
            value, self.start.flatten().numpy(), jac=True, method="L-BFGS-B",
            options={"maxiter": 5000, "maxfun": 20000, "ftol": 1e-15, "gtol": 1e-9},
        )  # fmt: skip
        return torch.from_numpy(found.x).view_as(self.start)

    def logits(self, weights: Tensor, x: Tensor) -> Tensor:
        """s phi W' (n, N) of x (n, J)."""
        return self.settings.scale * self.embed(x) @ weights.T


def trainer_of(
    bank: FeatureBank, config: MetatrainConfig, kind: str = "unet", device: torch.device = CPU
) -> MetaTrainer:
    """A trainer of a small denoiser on one data set, as `metatrain` makes it."""
    sets, groups = [[len(rows) for rows in bank.class_indices()]], (bank.features.shape[1],)
    parts = deal(sets, images_needed(config), kind, seed=0)
    statistics = class_statistics(bank.by_class(), groups)
    others = cross_fitted(bank.by_class(), groups, parts)[1] if kind == "unet" else {0: statistics}
    return MetaTrainer(
        bank, pools_of(sets, parts), {part: of.task_space() for part, of in others.items()}, statistics.task_space(),
        DenoiserConfig.model_validate({"kind": kind, "width": 16}), config, means=statistics.means, tuning=Tuning(),
        seed=0, device=device,
    )  # fmt: skip
