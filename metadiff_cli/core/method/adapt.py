"""Adaptation: support features in, classifier weights out; and what follows from it for many episodes at once.

A `MetaDiff` is everything that adaptation needs. `adapt_tasks` runs the sampler for B tasks; the `TaskClassifier` that
it gives turns features into predictions. Query images reach adaptation only as an explicit `pool` (protocol
"transductive").
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metadiff_cli.core.encoders.bank import Encoding, FeatureBank, ImageEncoder, extract
from metadiff_cli.core.evaluation.episodes import episode_batches
from metadiff_cli.core.method.denoisers import AnalyticDenoiser, SupportStats
from metadiff_cli.core.method.diffusion import Denoises, Noise, SamplerStep, Schedule, ddim, ddpm, finish
from metadiff_cli.core.method.domain import SHARED, Usual, domain_of, trusted_guidance
from metadiff_cli.core.method.guidance import Guide, PoolGuidance, pool_guide
from metadiff_cli.core.method.metric import Calibration, Rejection, cosine_logits, leave_one_out_guidance, task_logits
from metadiff_cli.core.method.support import TaskSupport
from metadiff_cli.core.method.task_space import TaskSpace

QUICK_WAY = 5  # of the measurement of an encoder between epochs


@dataclass(frozen=True)
class Sampling:
    """How weights are drawn. `guidance` None chooses the scale a per task from the support."""

    steps: int = 10
    samples: int = 1
    temperature: float = 0.0
    guidance: float | None = None
    method: str = "ddim"


@dataclass(frozen=True)
class Tuning:
    """What was fitted on validation classes."""

    calibration: Calibration = field(default_factory=Calibration)
    prototype_calibration: Calibration = field(default_factory=Calibration)
    centred_prototype: bool = False
    guidance: float = 1.0  # for tasks with one image per class, unless they are unusual
    shared: float = SHARED  # how much of the mean of its class means a task's domain is
    usual: Usual | None = None  # what to tell unusual tasks by; None: all are taken as usual
    pool: PoolGuidance = field(default_factory=PoolGuidance)
    rejection: Rejection | None = None  # None: never fitted


@dataclass(frozen=True)
class MetaDiff:
    """Task space, denoiser and tuning; `learned` says whether the denoiser is more than the analytic one."""

    space: TaskSpace
    denoiser: nn.Module
    learned: bool
    tuning: Tuning
    targets: Tensor | None = None  # (C, D) the training weights in task space, for measuring novelty
    schedule: Schedule = field(default_factory=Schedule)

    def tuned(self, tuning: Tuning) -> "MetaDiff":
        """With another tuning; plain cosines are centred where the prototype's are."""
        return replace(self, tuning=tuning, space=self.space.centred(tuning.centred_prototype))

    def analytic(self) -> "MetaDiff":
        """The same without the learned part."""
        return replace(self, denoiser=AnalyticDenoiser(), learned=False)


@dataclass(frozen=True)
class TaskClassifier:
    """Classifiers of B tasks: weights (M, B, N, D) in feature space, guidance scale (a number or (B,)), logit scale."""

    space: TaskSpace
    weights: Tensor
    guidance: Tensor | float
    scale: float

    def single_guidance(self) -> float:
        """The guidance scale of the only task (B = 1)."""
        return float(self.guidance)

    def logits(self, z: Tensor, sample: int = 0, squares: Tensor | None = None) -> Tensor:
        """Unscaled logits (B, Q, N) of features z (B, Q, D) under one of the M samples.

        `squares` (B, Q) are `space.squares(z)`, where they are known already.
        """
        return task_logits(z, self.weights[sample], self.space, self.guidance, squares=squares)

    @torch.inference_mode()
    def probabilities(self, z: Tensor, squares: Tensor | None = None) -> Tensor:
        """(B, Q, N), averaged over the samples, of features z (B, Q, D); `squares` as for `logits`."""
        return self.traceable(z, squares)

    def traceable(self, z: Tensor, squares: Tensor | None = None) -> Tensor:
        """The computation of `probabilities` alone, as the exporter can follow it."""
        squares = self.space.squares(z) if squares is None else squares
        each = [(self.scale * self.logits(z, m, squares)).softmax(dim=-1) for m in range(len(self.weights))]
        return torch.stack(each).mean(dim=0)


@torch.inference_mode()
def adapt_tasks(
    metadiff: MetaDiff,
    support: Tensor | TaskSupport,
    sampling: Sampling,
    *,
    ranks: Tensor,
    seeds: Sequence[int],
    pool: Tensor | None = None,
    pool_guidance: PoolGuidance | None = None,
) -> TaskClassifier:
    """Classifiers from support features (B, N, K, D), or from a `TaskSupport` where shots differ.

    `ranks` (B, N) are the positions of the classes in an order that does not depend on how they are given; `seeds` one
    per task. `pool` (B, P, D) are unlabelled images of the same tasks. (Design, section 2.)
    """
    if isinstance(support, Tensor):
        support = TaskSupport.even(support)
    stats, space, guidance, scale = _conditioning(metadiff, support, sampling)
    guide = None
    if pool is not None and pool.shape[1] > 0:
        guide = pool_guide(space, stats, pool, guidance, scale, pool_guidance or metadiff.tuning.pool)
    noise = Noise(seeds, ranks, support.z.shape[-1], sampling.temperature, support.z.device)
    samples = [finish(_sampler(metadiff, noise.draw(), stats, sampling, noise, guide)) for _ in range(sampling.samples)]
    return TaskClassifier(space, torch.stack([space.to_feature(w) for w in samples]), guidance, scale)


@torch.inference_mode()
def trace_tasks(
    metadiff: MetaDiff, support: TaskSupport, sampling: Sampling, *, ranks: Tensor, seeds: Sequence[int]
) -> Tensor:
    """The path of one sample, (S + 1, B, N, D) in feature space: the starting noise, then the weights after each step.

    Arguments are those of `adapt_tasks`. This alone keeps the path in memory.
    """
    stats, space, _, _ = _conditioning(metadiff, support, sampling)
    noise = Noise(seeds, ranks, support.z.shape[-1], sampling.temperature, support.z.device)
    start = noise.draw()
    path = [start, *(step.w for step in _sampler(metadiff, start, stats, sampling, noise, None))]
    return torch.stack([space.to_feature(w) for w in path])


def _conditioning(
    metadiff: MetaDiff, support: TaskSupport, sampling: Sampling
) -> tuple[SupportStats, TaskSpace, Tensor | float, float]:
    """What the sampler is conditioned on, guidance included; the tasks' spaces, guidance scale and logit scale."""
    ways = support.means.shape[1]
    scale = metadiff.tuning.calibration.scale(ways, float(support.count.mean()))
    base, count = metadiff.space, support.count
    count = count[:1] if bool((count == count[0]).all()) else count  # see `SupportStats`
    stats = SupportStats(base.to_task(support.means), count.unsqueeze(0), base.precision.view(1, 1, -1))
    domain = domain_of(stats, metadiff.tuning.shared)
    space = base.around(base.to_feature(domain))
    guidance = _guidance(metadiff.tuning, space, support, stats, sampling, scale)
    return replace(stats, mean=stats.mean - domain).scaled(guidance), space, guidance, scale


def _guidance(
    tuning: Tuning, space: TaskSpace, support: TaskSupport, stats: SupportStats, sampling: Sampling, scale: float
) -> Tensor | float:
    """The scale a: as asked for, else by leave-one-out, and where no class has two images by what the task looks like.

    `space` is that of the tasks, `stats` are in the space of the base classes.
    """
    if sampling.guidance is not None:
        return sampling.guidance
    default = tuning.guidance if tuning.usual is None else trusted_guidance(stats, tuning.usual, tuning.guidance)
    if len(support.labels) == len(support.count):
        return default
    return leave_one_out_guidance(support, space, scale, default)


def _sampler(
    metadiff: MetaDiff, start: Tensor, stats: SupportStats, sampling: Sampling, noise: Noise, guide: Guide | None
) -> Iterator[SamplerStep]:
    denoiser: Denoises = metadiff.denoiser
    if sampling.method == "ddpm":
        return ddpm(denoiser, start, metadiff.schedule, sampling.steps, stats, noise.draw, guide)
    return ddim(denoiser, start, metadiff.schedule, sampling.steps, stats, guide)


def seeds_of(seed: int, first: int, count: int) -> list[int]:
    """Seeds of the noise of tasks first .. first + count - 1."""
    return [int(np.random.SeedSequence([seed, i]).generate_state(1)[0]) for i in range(first, first + count)]


def ranks_of(classes: np.ndarray) -> Tensor:
    """(B, N) position of each class when those of its task are sorted; `classes` (B, N) numbers."""
    return torch.from_numpy(np.argsort(np.argsort(classes, axis=1), axis=1))


def quick_accuracy(
    encoder: ImageEncoder,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    batch: int,
    seed: int,
    per_class: int = 100,
    episodes: int = 600,
) -> float | None:
    """1-shot accuracy in percent of the cosine class mean, on at most `per_class` images per class.

    For the progress of pretraining: QUICK_WAY ways, or all classes if there are fewer. None when there are too few
    classes or images.
    """
    classes, counts = np.unique(labels, return_counts=True)
    classes = classes[counts > 1]  # one image is no support and query
    if len(classes) < 2:
        return None
    rows = np.concatenate([np.flatnonzero(labels == c)[:per_class] for c in classes])
    bank = FeatureBank(np.empty(0), np.searchsorted(classes, labels[rows]), tuple(str(c) for c in classes))
    indices = bank.class_indices()
    query = min(15, min(len(i) for i in indices) - 1)
    z = torch.cat([part.float() for part in extract(Encoding(encoder, batch), images[rows])])
    hits = []
    for part in episode_batches(indices, min(QUICK_WAY, len(classes)), 1, query, count=episodes, batch=100, seed=seed):
        support, queries = z[part.support].squeeze(2), z[part.query]
        predicted = cosine_logits(queries, F.normalize(support, dim=-1)).argmax(dim=-1)
        hits.append((predicted == torch.from_numpy(part.labels).to(predicted.device)).float().mean(dim=1))
    return 100 * float(torch.cat(hits).mean())
