"""Sampling with few and many steps, accuracy beside the speed; evaluation beside a loop over single tasks."""

import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from metadiff_cli.core.encoders.bank import FeatureBank
from metadiff_cli.core.evaluation.episodes import sample_episode
from metadiff_cli.core.evaluation.evaluate import (
    Protocol,
    Scores,
    evaluate,
    expanded,
    mean_interval,
    method_of,
    run_through,
)
from metadiff_cli.core.method.adapt import MetaDiff, Sampling
from metadiff_cli.core.method.metric import Metric
from tests.benchmarks.common import CPU, Ratio, Report, Sizes, feature_bank, rates
from tests.benchmarks.learning import metadiff_trainer


@dataclass(frozen=True)
class Timed:
    """Accuracy of each episode in percent, and episodes per second."""

    accuracy: Tensor
    speed: float


def trained_learner(sizes: Sizes) -> MetaDiff:
    """A U-Net denoiser after a short training, so that the path of the sampler is not that of the closed form."""
    trainer, space = metadiff_trainer(sizes, 1000)
    for _ in range(sizes.train_steps):
        trainer._train_step(1e-3)
        trainer.step += 1
    return MetaDiff(Metric(space.groups, space), trainer.averaged(), True)


def sampling(sizes: Sizes) -> Report:
    """S = 10 against S = 1000 on the path to the posterior mean, and 100 against 1000 ancestral steps with draws."""
    metadiff, bank = trained_learner(sizes), feature_bank(sizes, seed=1)
    plans = {
        f"DDIM, S = {sizes.fast_steps}, tau = 0": (Sampling(sizes.fast_steps), sizes.episodes),
        f"DDIM, S = {sizes.slow_steps}, tau = 0": (Sampling(sizes.slow_steps), sizes.episodes),
        f"DDPM, S = {sizes.draw_steps}, tau = 1, M = {sizes.samples}": (
            Sampling(sizes.draw_steps, sizes.samples, 1.0, method="ddpm"), sizes.draw_episodes),
        f"DDPM, S = {sizes.slow_steps}, tau = 1, M = {sizes.samples}": (
            Sampling(sizes.slow_steps, sizes.samples, 1.0, method="ddpm"), sizes.draw_episodes),
    }  # fmt: skip
    found = {name: _timed(metadiff, bank, how, episodes, sizes) for name, (how, episodes) in plans.items()}
    rows = []
    for name, timed in found.items():
        mean, half = mean_interval(timed.accuracy)
        rows.append((name, f"{mean:.2f} ± {half:.2f}", round(timed.speed, 2)))
    quick, slow, draws, slow_draws = found
    return Report(
        "Sampling", ("sampler", "accuracy %", "episodes/s"), rows,
        [Ratio(f"speed, {quick} / {slow}", found[quick].speed / found[slow].speed, least=50),
         Ratio(f"speed, {draws} / {slow_draws}", found[draws].speed / found[slow_draws].speed)],
        tuple(
            _difference(a, b, found[a].accuracy - found[b].accuracy) for a, b in ((quick, slow), (draws, slow_draws))
        ),
    )  # fmt: skip


def _difference(first: str, second: str, values: Tensor) -> str:
    mean, half = mean_interval(values)
    return f"accuracy, {first} minus {second}: {mean:+.2f} ± {half:.2f} points, same episodes"


def _timed(metadiff: MetaDiff, bank: FeatureBank, how: Sampling, episodes: int, sizes: Sizes) -> Timed:
    """The features are expanded before, and a first run with a single step is not timed."""
    protocol = Protocol(sizes.way, sizes.shot, sizes.query, episodes)
    x = expanded(metadiff.metric, bank, CPU)
    method = method_of(metadiff, bank, how, protocol, CPU, x)
    run_through(evaluate(bank, {"m": method_of(metadiff, bank, Sampling(1), protocol, CPU, x)}, protocol, CPU))
    started = time.perf_counter()
    scores = run_through(evaluate(bank, {"m": method}, protocol, CPU))
    return Timed(100 * torch.cat(scores["m"].accuracy), episodes / (time.perf_counter() - started))


def evaluation(sizes: Sizes) -> Report:
    """Episodes per second of `evaluate` on cached features, beside the same tasks one at a time."""
    bank, metadiff = feature_bank(sizes, seed=1), trained_learner(sizes)
    protocol = Protocol(sizes.way, sizes.shot, sizes.query, sizes.episodes)
    method, indices = method_of(metadiff, bank, Sampling(), protocol, CPU), bank.class_indices()
    results: dict[str, Tensor] = {}

    def together() -> int:
        scores = run_through(evaluate(bank, {"m": method}, protocol, CPU))
        results["together"] = torch.cat(scores["m"].accuracy)
        return sizes.episodes

    def one_by_one() -> int:
        scores = Scores()
        for i in range(sizes.episodes):
            e = sample_episode(indices, sizes.way, sizes.shot, sizes.query, seed=0, index=i)
            support, query = (torch.from_numpy(np.array(bank.features[rows])) for rows in (e.support, e.query))
            scores.add(method(support, query, e, i), torch.from_numpy(e.labels))
        results["alone"] = torch.cat(scores.accuracy)
        return sizes.episodes

    found = rates({"evaluate": together, "one task at a time": one_by_one}, sizes)
    gap = 100 * float((results["together"] - results["alone"]).abs().max())
    return Report(
        "Evaluation on cached features, episodes per second", ("how", "episodes/s"),
        [(name, round(speed, 1)) for name, speed in found.items()],
        [Ratio("evaluate / one task at a time", found["evaluate"] / found["one task at a time"], least=20)],
        (f"largest difference of an episode's accuracy between the two: {gap:.2f} points",),
    )  # fmt: skip
