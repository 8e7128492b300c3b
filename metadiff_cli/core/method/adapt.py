"""Adaptation: features of the support in, a classifier out; for many tasks at once.

`MetaDiff` is everything that adaptation needs. `adapt_tasks` runs the reverse process for B tasks, and the
`TaskClassifier` that it returns turns features into predictions. Query images reach adaptation only as an explicit
`pool` (protocol "transductive").

At each step of the reverse process the denoiser gives the class weights in task space, which make the start W_0 of the
inner problem together with the class means, and one Newton step brings the classifier closer to the minimum of the
support's cross-entropy (descent.py).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn

from metadiff_cli.core.method.calibration import Rejection, TaskTable, task_temperatures
from metadiff_cli.core.method.denoisers import AnalyticDenoiser
from metadiff_cli.core.method.descent import NO_DESCENT, Gram, InnerProblem, gram_of
from metadiff_cli.core.method.diffusion import Noise, SamplerStep, Schedule, Weights, ddim, ddpm
from metadiff_cli.core.method.guidance import (
    Evidence,
    PoolGuidance,
    Usual,
    chosen_by,
    doubt_of,
    doubted_guidance,
    pool_evidence,
)
from metadiff_cli.core.method.held_out import HeldOut, holdable
from metadiff_cli.core.method.metric import Metric, TaskSettings
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
    temperature: TaskTable = TaskTable.constant(2.0)  # T of the confidences, for tasks whose support does not tell
    correction: TaskTable = TaskTable.constant(1.0)  # a factor on T, whether a task chose its own or not
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

    def without_descent(self, temperature: TaskTable) -> "MetaDiff":
        """Return the posterior mean alone, without a learned part either; its confidences have a table of their own."""
        return self.analytic().tuned(
            prior=TaskTable.constant(NO_DESCENT), temperature=temperature, correction=TaskTable.constant(1.0)
        )

    def denoiser_for(self, shots: float) -> nn.Module:
        """Return the denoiser for tasks of K shots."""
        known = self.most_shots is None or shots <= self.most_shots
        return self.denoiser if known else AnalyticDenoiser()


@dataclass(frozen=True)
class TaskClassifier:
    """Classifiers of B tasks: weights W (M, B, N, J) of M samples, and what makes joint features of expanded ones.

    `domain` is (B, 1, J).
    """

    metric: Metric
    settings: TaskSettings
    domain: Tensor
    weights: Tensor

    @property
    def parts(self) -> Tensor:
        """The weights r (B, P) of the parts of the joint feature. (Kept nowhere: an exporter traces stand-ins.)"""
        return self.metric.weights(self.settings)

    @property
    def sharpness(self) -> Tensor:
        """The factor (B, 1, 1) from W phi to logits whose softmax is calibrated, s T."""
        return self.settings.scale * self.settings.temperature.view(-1, 1, 1)

    def embed(self, x: Tensor) -> Tensor:
        """Return phi (B, Q, J) of expanded features x (B, Q, J)."""
        return self.metric.embed(x, self.domain, self.parts)

    def logits(self, x: Tensor, sample: int = 0) -> Tensor:
        """Return s T W phi (B, Q, N) of expanded features x (B, Q, J) under one of the M samples."""
        return self.logits_of(self.weights[sample], x)

    def logits_of(self, weights: Tensor, x: Tensor) -> Tensor:
        """Return s T W phi (B, Q, C) of expanded features x (B, Q, J) under any weights (B, C, J)."""
        return self.sharpness * self.metric.logits(x, self.domain, self.parts, weights)

    @torch.inference_mode()
    def probabilities(self, x: Tensor) -> Tensor:
        """Return the probabilities (B, Q, N) of expanded features x (B, Q, J), averaged over the samples."""
        return self.traceable(x)

    def traceable(self, x: Tensor) -> Tensor:
        """The computation of `probabilities`, in a form that the ONNX exporter can trace."""
        each = [self.logits(x, m).softmax(dim=-1) for m in range(len(self.weights))]
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
) -> TaskClassifier:
    """Return the classifiers of tasks, from expanded features of their support (B, n, J).

    `ranks` (B, N) are the positions of the classes in an order that does not depend on how they are given; `seeds` are
    one per task. `pool` (B, P, J) are unlabelled images of the same tasks. Without statistics of classes there is
    nothing to draw, and a noise temperature has no effect. (Design, sections 2 and 2b.)
    """
    process = _prepared(metadiff, support, sampling, pool)
    noise = Noise(seeds, ranks, sum(metadiff.metric.groups), sampling.temperature, support.x.device)
    samples = [process.run(noise) for _ in range(sampling.samples)]
    return replace(process.task, weights=torch.stack(samples))


@torch.inference_mode()
def trace_tasks(
    metadiff: MetaDiff, support: TaskSupport, sampling: Sampling, *, ranks: Tensor, seeds: Sequence[int]
) -> Iterator[tuple[TaskClassifier, PathStep]]:
    """Yield the classifier of one sample after each step, with its loss; arguments are those of `adapt_tasks`."""
    process = _prepared(metadiff, support, sampling, None)
    noise = Noise(seeds, ranks, sum(metadiff.metric.groups), sampling.temperature, support.x.device)
    for step in process.steps(noise):
        weights = process.classifier(step)
        yield replace(process.task, weights=weights.unsqueeze(0)), PathStep(step.index, weights, process.loss(step))


class _Process:
    """The reverse process of B tasks: what it is conditioned on, and where it stands."""

    def __init__(
        self, metadiff: MetaDiff, support: TaskSupport, sampling: Sampling, task: TaskClassifier, pool: Tensor | None
    ) -> None:
        self.metadiff, self.sampling, self.task = metadiff, sampling, task
        self.phi = task.embed(support.x)  # (B, n, J)
        self.gram: Gram = gram_of(self.phi)
        self.target = support.one_hot()
        self.evidence = Evidence(support.means(), count_of(support.counts))
        self.denoiser = metadiff.denoiser_for(support.shots)
        self.pool = None if pool is None or pool.shape[1] == 0 else pool

    def _begin(self) -> None:
        """Stand where a sample begins: nothing of the one before has a part in it."""
        self.guide = None if self.pool is None else self._guide(self.pool)
        self.start = self._start(self.evidence, None)
        self.estimate = self.phi.new_zeros(*self.phi.shape[:2], self.target.shape[1])  # of the dual, after a step

    def _guide(self, pool: Tensor) -> Callable[[Weights], Evidence]:
        """What unlabelled images (B, P, J) add to the evidence, by the classifier of a step."""
        phi, update = self.task.embed(pool), pool_evidence(self.evidence, pool, self.metadiff.tuning.pool)
        return lambda weights: update(self.task.sharpness * (phi @ self._weights_of(weights.dual).mT))

    def run(self, noise: Noise) -> Tensor:
        """Return the classifier W (B, N, J) of one sample."""
        for step in self.steps(noise):
            last = step  # alone: memory does not grow with the number of steps
        return self.classifier(last)

    def steps(self, noise: Noise) -> Iterator[SamplerStep]:
        """Run one sample of the reverse process."""
        schedule, sampling = self.metadiff.schedule, self.sampling
        self._begin()
        v = None
        if self.task.metric.space is not None:
            v = noise.draw() / schedule.abar[schedule.steps] ** 0.5
        weights = Weights(v, self.estimate)
        if sampling.method == "ddpm":
            return ddpm(self._denoise, weights, schedule, sampling.steps, noise.draw)
        return ddim(self._denoise, weights, schedule, sampling.steps)

    def classifier(self, step: SamplerStep) -> Tensor:
        """Return W (B, N, J) of the estimate of the step just done."""
        return self._weights_of(step.estimate.dual)

    def loss(self, step: SamplerStep) -> Tensor:
        """Return the inner loss F (B,) of the estimate of the step just done."""
        return self._problem().loss(step.estimate.dual)

    def _denoise(self, weights: Weights, abar: float) -> Weights:
        """One step: the pool, then the denoiser in task space, then the Newton step."""
        evidence = self.evidence if self.guide is None else self.guide(weights)
        v = None
        if weights.v is not None:
            level = weights.v.new_tensor([abar])
            v = self.denoiser(abar**0.5 * weights.v, level, self._stats(evidence))
        self.start = self._start(evidence, v)
        self.estimate = self._problem().denoise(weights.dual, abar, self.estimate)
        return Weights(v, self.estimate)

    def _problem(self) -> InnerProblem:
        settings = self.task.settings
        return InnerProblem(self.gram, self.phi @ self.start.mT, self.target, settings.scale, settings.prior)

    def _stats(self, evidence: Evidence) -> SupportStats:
        """The evidence in task space, relative to the domain."""
        stats = self.task.metric.stats(evidence.means - self.task.domain, evidence.count)
        return stats.scaled(self.task.settings.guidance)

    def _start(self, evidence: Evidence, v: Tensor | None) -> Tensor:
        """W_0 (B, N, J): class means in the plain parts, the weights v (B, N, D) in the whitened ones."""
        metric = self.task.metric
        x = evidence.means
        if v is not None and metric.space is not None:
            white = v * metric.space.precision.sqrt() + metric.whitened(self.task.domain)
            x = torch.cat([x[..., : x.shape[-1] - white.shape[-1]], white], dim=-1)
        return self.task.embed(x)

    def _weights_of(self, dual: Tensor) -> Tensor:
        """W = W_0 + s A' Phi."""
        return self.start + self.task.settings.scale * (dual.mT @ self.phi)


def _prepared(metadiff: MetaDiff, support: TaskSupport, sampling: Sampling, pool: Tensor | None) -> _Process:
    """Settle the hyper-parameters of each task, and make its reverse process."""
    metric = metadiff.metric
    settings = fitted_settings(metadiff, support, sampling.guidance)
    if len(support.labels) > support.ways:  # some class has an image to hold out
        some = holdable(support)
        held = HeldOut(metric, some)
        settings = chosen_by(held, settings, keep_guidance=sampling.guidance is not None)
        rows = held.folds.left_out
        logits, usual = held.logits(settings)[:, rows], float(settings.temperature[0])
        settings = replace(settings, temperature=task_temperatures(logits, some.one_hot()[rows], usual))
    correction = metadiff.tuning.correction.at(support.ways, support.shots)
    settings = replace(settings, temperature=correction * settings.temperature)
    middle = support.middle()
    domain = torch.lerp(metric.origin.to(middle).expand_as(middle), middle, settings.domain.view(-1, 1, 1))
    task = TaskClassifier(metric, settings, domain, middle.unsqueeze(0))  # its weights are what the process gives
    return _Process(metadiff, support, sampling, task, pool)


def doubt_about(metadiff: MetaDiff, support: TaskSupport) -> Tensor:
    """Return the doubt (B,), 0 to 1, that the statistics of the base classes fit tasks; 0 where there are none."""
    metric, usual = metadiff.metric, metadiff.tuning.usual
    if usual is None or metric.space is None:
        return support.x.new_zeros(len(support.x))
    return doubt_of(metric.stats(support.means() - metric.origin, count_of(support.counts)), usual)


def fitted_settings(metadiff: MetaDiff, support: TaskSupport, guidance: float | None = None) -> TaskSettings:
    """Return the hyper-parameters that were fitted for tasks like these; `guidance` is a where the caller asks for one.

    Tasks that lie unusually far from the base classes give up most of their statistics.
    """
    tuning, ways, shots = metadiff.tuning, support.ways, support.shots
    doubt = doubt_about(metadiff, support)
    ones = torch.ones_like(doubt)
    return TaskSettings(
        guidance=doubted_guidance(doubt, tuning.guidance.at(ways, shots)) if guidance is None else guidance * ones,
        level=tuning.level.at(ways, shots) * ones,
        domain=torch.lerp(tuning.domain.at(ways, shots) * ones, ones, doubt),
        temperature=tuning.temperature.at(ways, shots) * ones,
        scale=tuning.scale.at(ways, shots),
        prior=tuning.prior.at(ways, shots),
    )


def seeds_of(seed: int, first: int, count: int) -> list[int]:
    """Return the seeds of the noise of tasks first .. first + count - 1."""
    return [int(np.random.SeedSequence([seed, i]).generate_state(1)[0]) for i in range(first, first + count)]


def ranks_of(classes: np.ndarray) -> Tensor:
    """Return the position (B, N) of each class when those of its task are sorted; `classes` (B, N) are numbers."""
    return torch.from_numpy(np.argsort(np.argsort(classes, axis=1), axis=1))
