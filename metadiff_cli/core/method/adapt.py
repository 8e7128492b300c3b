"""Adaptation: features of the support in, a classifier out; for many tasks at once.

`MetaDiff` is everything that adaptation needs. `adapt_tasks` runs the reverse process for B tasks, and the
`TaskClassifier` that it returns turns features into predictions. Query images reach adaptation only as an explicit
`pool` (protocol "transductive").

At each step of the reverse process the denoiser gives the class weights in task space, which make the start W_0 of the
inner problem together with the class means, and one proximal Newton step pulls the classifier toward the minimum of the
support's cross-entropy (descent.py).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn

from metadiff_cli.core.method.calibration import Rejection, TaskTable, task_temperatures
from metadiff_cli.core.method.denoisers import AnalyticDenoiser
from metadiff_cli.core.method.descent import Gram, InnerProblem, gram_of
from metadiff_cli.core.method.diffusion import Noise, SamplerStep, Schedule, Weights, ddim, ddpm
from metadiff_cli.core.method.guidance import (
    Choice,
    Evidence,
    PoolGuidance,
    Usual,
    level_shares,
    pool_evidence,
    trusted_guidance,
)
from metadiff_cli.core.method.held_out import HeldOut
from metadiff_cli.core.method.metric import Metric
from metadiff_cli.core.method.support import SupportStats, TaskSupport, count_of


@dataclass(frozen=True)
class Sampling:
    """How weights are drawn. `guidance` None chooses the scale a for each task."""

    steps: int = 10
    samples: int = 1
    temperature: float = 0.0
    guidance: float | None = None
    method: str = "ddim"


@dataclass(frozen=True)
class Tuning:
    """The hyper-parameters that the outer loop learns, by ways and shots, on validation classes and domains."""

    guidance: TaskTable = TaskTable.constant(1.0)  # a, for tasks whose support does not tell
    level: TaskTable = TaskTable.constant(0.0)  # w, the share of the layers below the last one
    domain: TaskTable = TaskTable.constant(1.0)  # the share of a task's mean in its domain
    scale: TaskTable = TaskTable.constant(3.0)  # s of the descent
    prior: TaskTable = TaskTable.constant(0.1)  # rho
    temperature: TaskTable = TaskTable.constant(2.0)  # T of the confidences
    usual: Usual | None = None  # what unusual tasks are told by; None: all are taken as usual
    pool: PoolGuidance = field(default_factory=PoolGuidance)
    rejection: Rejection | None = None  # None: never fitted


@dataclass(frozen=True)
class MetaDiff:
    """Metric, denoiser and tuning; `learned` says whether the denoiser is more than the analytic one.

    `most_shots` is the largest K that a learned denoiser was trained for; beyond it the analytic one takes its place.
    """

    metric: Metric
    denoiser: nn.Module = field(default_factory=AnalyticDenoiser)
    learned: bool = False
    tuning: Tuning = field(default_factory=Tuning)
    targets: Tensor | None = None  # (C, D) the class means of base classes, for novelty and rejection
    schedule: Schedule = field(default_factory=Schedule)
    most_shots: int | None = None

    def tuned(self, **changes: object) -> "MetaDiff":
        """Return the same with some of the tuning changed."""
        return replace(self, tuning=replace(self.tuning, **changes))  # type: ignore[arg-type]

    def analytic(self) -> "MetaDiff":
        """Return the same without the learned part."""
        return replace(self, denoiser=AnalyticDenoiser(), learned=False)

    def denoiser_for(self, shots: float) -> nn.Module:
        """Return the denoiser for tasks of K shots."""
        known = self.most_shots is None or shots <= self.most_shots
        return self.denoiser if known else AnalyticDenoiser()


@dataclass(frozen=True)
class TaskClassifier:
    """Classifiers of B tasks: weights W (M, B, N, J) over joint features, and what makes these of expanded features.

    `domain` is (B, 1, J), `parts` (B, P) the weights r of the parts, `temperature` (B,) the factor T of the
    confidences. `guidance` and `level` (B,) are the values that the metric was chosen with.
    """

    metric: Metric
    weights: Tensor
    domain: Tensor
    parts: Tensor
    scale: float
    temperature: Tensor
    guidance: Tensor
    level: Tensor

    def logits(self, x: Tensor, sample: int = 0) -> Tensor:
        """Return s W phi (B, Q, N) of expanded features x (B, Q, J) under one of the M samples."""
        return self.scale * self.metric.logits(x, self.domain, self.parts, self.weights[sample])

    @torch.inference_mode()
    def probabilities(self, x: Tensor) -> Tensor:
        """Return the probabilities (B, Q, N) of expanded features x (B, Q, J), averaged over the samples."""
        return self.traceable(x)

    def traceable(self, x: Tensor) -> Tensor:
        """The computation of `probabilities`, in a form that the ONNX exporter can trace."""
        sharp = self.temperature.view(-1, 1, 1)
        each = [(sharp * self.logits(x, m)).softmax(dim=-1) for m in range(len(self.weights))]
        return each[0] if len(each) == 1 else torch.stack(each).mean(dim=0)


@dataclass(frozen=True)
class PathStep:
    """One step of the reverse process: the classifier W (B, N, J) that it estimates, and its inner loss F (B,)."""

    index: int
    weights: Tensor
    loss: Tensor


@torch.inference_mode()
def adapt_tasks(
    metadiff: MetaDiff,
    support: TaskSupport,
    sampling: Sampling,
    *,
    ranks: Tensor,
    seeds: Sequence[int],
    pool: Tensor | None = None,
    pool_guidance: PoolGuidance | None = None,
) -> TaskClassifier:
    """Return the classifiers of tasks, from expanded features of their support (B, n, J).

    `ranks` (B, N) are the positions of the classes in an order that does not depend on how they are given; `seeds` are
    one per task. `pool` (B, P, J) are unlabelled images of the same tasks. (Design, sections 2 and 2b.)
    """
    process = _process(metadiff, support, sampling, pool, pool_guidance)
    noise = Noise(seeds, ranks, sum(metadiff.metric.groups), sampling.temperature, support.x.device)
    samples = [process.classifier(process.run(noise)) for _ in range(sampling.samples)]
    return replace(process.task, weights=torch.stack(samples))


@torch.inference_mode()
def trace_tasks(
    metadiff: MetaDiff, support: TaskSupport, sampling: Sampling, *, ranks: Tensor, seeds: Sequence[int]
) -> Iterator[tuple[TaskClassifier, PathStep]]:
    """Yield the classifier of one sample after each step, with its loss; arguments are those of `adapt_tasks`."""
    process = _process(metadiff, support, sampling, None, None)
    noise = Noise(seeds, ranks, sum(metadiff.metric.groups), sampling.temperature, support.x.device)
    for step in process.steps(noise):
        weights = process.classifier(step)
        loss = process.problem(process.start).loss(step.estimate.dual)
        yield replace(process.task, weights=weights.unsqueeze(0)), PathStep(step.index, weights, loss)


class _Process:
    """The reverse process of B tasks: what it is conditioned on, and where it stands."""

    def __init__(
        self, metadiff: MetaDiff, support: TaskSupport, sampling: Sampling, task: TaskClassifier, prior: float
    ) -> None:
        self.metadiff, self.sampling, self.task, self.prior = metadiff, sampling, task, prior
        self.phi = task.metric.embed(support.x, task.domain, task.parts)  # (B, n, J)
        self.gram: Gram = gram_of(self.phi)
        self.target = support.one_hot()
        self.evidence = Evidence(support.means(), count_of(support.counts))
        self.denoiser = metadiff.denoiser_for(support.shots)
        self.guide: Callable[[Weights], Evidence] | None = None
        self.start = self._start(self.evidence, None)

    def guided_by(self, pool: Tensor, how: PoolGuidance) -> None:
        """Let unlabelled images (B, P, J) guide the process."""
        phi = self.task.metric.embed(pool, self.task.domain, self.task.parts)
        update = pool_evidence(self.evidence, pool, how)
        sharp = self.task.temperature.view(-1, 1, 1) * self.task.scale
        self.guide = lambda weights: update(sharp * (phi @ self._weights(weights.dual).mT))

    def run(self, noise: Noise) -> SamplerStep:
        """Return the last step of one sample."""
        *_, last = self.steps(noise)
        return last

    def steps(self, noise: Noise) -> Iterator[SamplerStep]:
        """Run one sample of the reverse process."""
        schedule, s = self.metadiff.schedule, self.sampling
        v = None
        if self.task.metric.space is not None:
            v = noise.draw() / schedule.abar[schedule.steps] ** 0.5
        weights = Weights(v, self.phi.new_zeros(*self.phi.shape[:2], self.target.shape[1]))
        if s.method == "ddpm":
            return ddpm(self._denoise, weights, schedule, s.steps, noise.draw)
        return ddim(self._denoise, weights, schedule, s.steps)

    def classifier(self, step: SamplerStep) -> Tensor:
        """Return W (B, N, J) of the estimate of a step."""
        return self._weights(step.estimate.dual)

    def problem(self, start: Tensor) -> InnerProblem:
        """Return the inner problem from W_0 (B, N, J)."""
        return InnerProblem(self.gram, self.phi @ start.mT, self.target, self.task.scale, self.prior)

    def _denoise(self, weights: Weights, abar: float) -> Weights:
        """One step: the pool, then the denoiser in task space, then the proximal Newton step."""
        evidence = self.evidence if self.guide is None else self.guide(weights)
        v = None
        if weights.v is not None:
            level = weights.v.new_tensor([abar])
            v = self.denoiser(abar**0.5 * weights.v, level, self._stats(evidence))
        self.start = self._start(evidence, v)
        return Weights(v, self.problem(self.start).step(weights.dual, abar))

    def _stats(self, evidence: Evidence) -> SupportStats:
        """The evidence in task space, relative to the domain."""
        metric, space = self.task.metric, self.task.metric.space
        assert space is not None
        mean = metric.whitened(evidence.means - self.task.domain) / space.precision.sqrt()
        return SupportStats(mean, evidence.count, space.precision.view(1, 1, -1)).scaled(self.task.guidance)

    def _start(self, evidence: Evidence, v: Tensor | None) -> Tensor:
        """W_0 (B, N, J): class means in the plain parts, the weights v (B, N, D) in the whitened ones."""
        metric = self.task.metric
        x = evidence.means
        if v is not None and metric.space is not None:
            white = v * metric.space.precision.sqrt() + metric.whitened(self.task.domain)
            x = torch.cat([x[..., : x.shape[-1] - white.shape[-1]], white], dim=-1)
        return metric.embed(x, self.task.domain, self.task.parts)

    def _weights(self, dual: Tensor) -> Tensor:
        """W = W_0 + s A' Phi."""
        return self.start + self.task.scale * (dual.mT @ self.phi)


def _process(
    metadiff: MetaDiff,
    support: TaskSupport,
    sampling: Sampling,
    pool: Tensor | None,
    pool_guidance: PoolGuidance | None,
) -> _Process:
    """Choose the metric and the confidence of each task, and make its reverse process."""
    tuning, metric, ways, shots = metadiff.tuning, metadiff.metric, support.ways, support.shots
    tasks = len(support.x)
    origin = metric.origin.to(support.x.device)
    share, scale, prior = (table.at(ways, shots) for table in (tuning.domain, tuning.scale, tuning.prior))
    usual = tuning.temperature.at(ways, shots)
    domain = torch.lerp(origin.view(1, 1, -1), support.means().mean(dim=1, keepdim=True), share)
    choice = Choice(
        _guidance(metadiff, support, sampling, origin), tuning.level.at(ways, shots), share, scale, prior, usual
    )
    level, guidance = support.x.new_full((tasks,), choice.level), choice.guidance
    temperature = support.x.new_full((tasks,), usual)
    if len(support.labels) > ways:  # some class has an image to hold out
        held = HeldOut(metric, support)
        level, guidance = choice.by_held_out(held, fixed=sampling.guidance is not None)
        logits = held.logits(level_shares(level, len(metric.groups)), guidance, share, scale, prior)
        rows = held.folds.left_out
        temperature = task_temperatures(logits[:, rows], support.one_hot()[rows], usual)
    parts = metric.weights(level_shares(level, len(metric.groups)), guidance)
    task = TaskClassifier(metric, origin, domain, parts, scale, temperature, guidance, level)
    process = _Process(metadiff, support, sampling, task, prior)
    if pool is not None and pool.shape[1] > 0:
        process.guided_by(pool, pool_guidance or tuning.pool)
    return process


def _guidance(metadiff: MetaDiff, support: TaskSupport, sampling: Sampling, origin: Tensor) -> Tensor:
    """The scale a (B,): as asked for, else what was fitted, or what an unusual task wants."""
    tuning, space, tasks = metadiff.tuning, metadiff.metric.space, len(support.x)
    home = tuning.guidance.at(support.ways, support.shots)
    if sampling.guidance is not None:
        return support.x.new_full((tasks,), sampling.guidance)
    if tuning.usual is None or space is None:
        return support.x.new_full((tasks,), home)
    mean = metadiff.metric.whitened(support.means() - origin) / space.precision.sqrt()
    stats = SupportStats(mean, count_of(support.counts), space.precision.view(1, 1, -1))
    return trusted_guidance(stats, tuning.usual, home)


def seeds_of(seed: int, first: int, count: int) -> list[int]:
    """Return the seeds of the noise of tasks first .. first + count - 1."""
    return [int(np.random.SeedSequence([seed, i]).generate_state(1)[0]) for i in range(first, first + count)]


def ranks_of(classes: np.ndarray) -> Tensor:
    """Return the position (B, N) of each class when those of its task are sorted; `classes` (B, N) are numbers."""
    return torch.from_numpy(np.argsort(np.argsort(classes, axis=1), axis=1))
