"""Adaptation: support features in, classifier weights out; and what follows from it for many episodes at once.

A `Learner` is everything that adaptation needs. `adapt_weights` runs the sampler for B tasks; `class_probabilities`
turns weights into predictions. Query images reach adaptation only as an explicit `pool` (protocol "transductive").
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metadiff_cli.core.classifier import Calibration, cosine_logits, leave_one_out_guidance
from metadiff_cli.core.denoiser import AnalyticDenoiser, SupportStats
from metadiff_cli.core.diffusion import Denoises, Noise, Schedule, ddim, ddpm, finish
from metadiff_cli.core.episodes import episode_batches
from metadiff_cli.core.features import FeatureBank, ImageEncoder, extract
from metadiff_cli.core.task_space import TaskSpace


@dataclass(frozen=True)
class Sampling:
    """How weights are drawn. `guidance` None chooses the scale a per task from the support."""

    steps: int = 10
    samples: int = 1
    temperature: float = 0.0
    guidance: float | None = None
    method: str = "ddim"


@dataclass(frozen=True)
class PoolGuidance:
    """Constants of the guidance from unlabelled images (design, "Guidance from unlabelled images")."""

    sharpness: float = 20.0  # s_r, of the responsibilities
    smoothing: float = 15.0  # a, Dirichlet smoothing of the class proportions
    weight: float = 0.3  # omega, of one unlabelled image beside a labelled one


@dataclass(frozen=True)
class Tuning:
    """What was fitted on validation classes."""

    calibration: Calibration = field(default_factory=Calibration)
    prototype_calibration: Calibration = field(default_factory=Calibration)
    centred_prototype: bool = False
    guidance: float = 1.0  # for tasks with one image per class


@dataclass(frozen=True)
class Learner:
    """Task space, denoiser and tuning; `learned` says whether the denoiser is more than the analytic one."""

    space: TaskSpace
    denoiser: nn.Module
    learned: bool
    tuning: Tuning
    schedule: Schedule = field(default_factory=Schedule)

    def analytic(self) -> "Learner":
        """The same without the learned part."""
        return replace(self, denoiser=AnalyticDenoiser(), learned=False)


def class_means(z: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Means (B, N, D) and counts (B, N, 1) of support features z (B, N, K, D); `valid` (B, N, K) where shots differ."""
    tasks, ways, shots, _ = z.shape
    if valid is None:
        return z.mean(dim=2), z.new_full((tasks, ways, 1), shots)
    mask = valid.to(z).unsqueeze(-1)
    count = mask.sum(dim=2)
    return (z * mask).sum(dim=2) / count.clamp_min(1), count


@torch.inference_mode()
def adapt_weights(
    learner: Learner,
    z: Tensor,
    sampling: Sampling,
    *,
    ranks: Tensor,
    seeds: Sequence[int],
    valid: Tensor | None = None,
    pool: Tensor | None = None,
    pool_guidance: PoolGuidance | None = None,
) -> Tensor:
    """Classifier weights (M, B, N, D) in feature space from support features z (B, N, K, D).

    `ranks` (B, N) are the positions of the classes in an order that does not depend on how they are given; `seeds` one
    per task. `pool` (B, P, D) are unlabelled images of the same tasks. (Design, section 2.)
    """
    means, count = class_means(z, valid)
    mean_shots = float(count.mean())
    guidance = _guidance(learner, z, sampling, valid, mean_shots)
    stats = SupportStats(learner.space.to_task(means), count, learner.space.precision.view(1, 1, -1)).scaled(guidance)
    guide = None
    if pool is not None:
        guide = _pool_guide(learner, stats, pool, pool_guidance or PoolGuidance())
    noise = Noise(seeds, ranks, z.shape[-1], sampling.temperature, z.device)
    samples = [_sample(learner, stats, sampling, noise, guide) for _ in range(sampling.samples)]
    return learner.space.to_feature(torch.stack(samples))


def _guidance(
    learner: Learner, z: Tensor, sampling: Sampling, valid: Tensor | None, mean_shots: float
) -> Tensor | float:
    """The scale a: as asked for, else by leave-one-out, else the fitted default where no class has two images."""
    if sampling.guidance is not None:
        return sampling.guidance
    if z.shape[2] == 1:
        return learner.tuning.guidance
    scale = learner.tuning.calibration.scale(z.shape[1], mean_shots)
    return leave_one_out_guidance(z, learner.space, scale, valid, learner.tuning.guidance)


def _sample(
    learner: Learner,
    stats: SupportStats,
    sampling: Sampling,
    noise: Noise,
    guide: Callable[[Tensor], SupportStats] | None,
) -> Tensor:
    denoiser: Denoises = learner.denoiser
    start = noise.draw()
    if sampling.method == "ddpm":
        return finish(ddpm(denoiser, start, learner.schedule, sampling.steps, stats, noise.draw, guide))
    return finish(ddim(denoiser, start, learner.schedule, sampling.steps, stats, guide))


def _pool_guide(
    learner: Learner, stats: SupportStats, pool: Tensor, how: PoolGuidance
) -> Callable[[Tensor], SupportStats]:
    """Support statistics that take in a pool (B, P, D) of unlabelled images by their responsibilities."""
    points = learner.space.to_task(pool)  # (B, P, D)
    tasks, ways, _ = stats.mean.shape
    proportions = torch.full((tasks, 1, ways), 1 / ways, device=pool.device)

    def guide(x0: Tensor) -> SupportStats:
        nonlocal proportions
        logits = cosine_logits(pool, learner.space.to_feature(x0), how.sharpness) + proportions.log()
        share = logits.softmax(dim=-1)  # (B, P, N)
        total = share.sum(dim=1, keepdim=True)
        proportions = (how.smoothing + total) / (ways * how.smoothing + pool.shape[1])
        extra = how.weight * total.transpose(1, 2)  # (B, N, 1)
        count = stats.count + extra
        sums = stats.count * stats.mean + how.weight * share.transpose(1, 2) @ points
        return SupportStats(sums / count, count, stats.precision)

    return guide


def class_probabilities(z: Tensor, weights: Tensor, scale: float, centre: Tensor | None = None) -> Tensor:
    """(B, Q, N), averaged over the samples, of features z (B, Q, D) under weights (M, B, N, D)."""
    return torch.stack([cosine_logits(z, w, scale, centre).softmax(dim=-1) for w in weights]).mean(dim=0)


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
    """5-way 1-shot accuracy in percent of the cosine class mean, on at most `per_class` images of each class.

    For the progress of pretraining. None when there are too few classes or images.
    """
    classes = np.unique(labels)
    rows = np.concatenate([np.flatnonzero(labels == c)[:per_class] for c in classes])
    bank = FeatureBank(np.empty(0), np.searchsorted(classes, labels[rows]), tuple(str(c) for c in classes))
    indices = bank.class_indices()
    query = min(15, min(len(i) for i in indices) - 1)
    if len(classes) < 5 or query < 1:
        return None
    z = torch.cat([part.float() for part in extract(encoder, images[rows], batch)])
    hits = []
    for part in episode_batches(indices, 5, 1, query, count=episodes, batch=100, seed=seed):
        support, queries = z[part.support].squeeze(2), z[part.query]
        predicted = cosine_logits(queries, F.normalize(support, dim=-1)).argmax(dim=-1)
        hits.append((predicted == torch.from_numpy(part.labels).to(predicted.device)).float().mean(dim=1))
    return 100 * float(torch.cat(hits).mean())
