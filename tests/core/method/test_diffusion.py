"""Schedule and samplers against closed forms."""

import math
import weakref
from collections.abc import Iterator
from itertools import count, pairwise

import pytest
import torch
from torch import Tensor

from metadiff_cli.core.method.denoisers import AnalyticDenoiser, UNetDenoiser, gaussian_posterior, randomise
from metadiff_cli.core.method.diffusion import (
    Denoise,
    Noise,
    SamplerStep,
    Schedule,
    Weights,
    add_noise,
    ddim,
    ddpm,
    trailing_steps,
)
from metadiff_cli.core.method.support import SupportStats
from metadiff_cli.errors import ConfigError

SCHEDULE = Schedule()
START = SCHEDULE.abar[-1]


def stats_of(shots: float = 3, tasks: int = 2, ways: int = 4, size: int = 6, seed: int = 0) -> SupportStats:
    g = torch.Generator().manual_seed(seed)
    p = torch.randn(tasks, ways, size, generator=g)
    precision = torch.linspace(0.1, 3.0, size).view(1, 1, -1)
    return SupportStats(p, torch.full((tasks, ways, 1), shots), precision)


def noise_of(shape: torch.Size | tuple[int, ...], seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def state(w: Tensor, abar: float) -> Weights:
    """Noisy weights w_t as the samplers have them, and a dual of nothing."""
    return Weights(w / abar**0.5, torch.zeros(len(w), 1, 1))


def by(denoiser: torch.nn.Module, stats: SupportStats) -> Denoise:
    """A denoiser of w_t as one of states."""

    def denoise(weights: Weights, abar: float) -> Weights:
        assert weights.v is not None
        return Weights(denoiser(abar**0.5 * weights.v, torch.tensor([abar]), stats), weights.dual)

    return denoise


def last(steps: Iterator[SamplerStep]) -> Tensor:
    *_, step = steps
    assert step.estimate.v is not None
    return step.estimate.v


def test_abar_falls_from_one_to_nearly_zero() -> None:
    abar = SCHEDULE.abar
    assert len(abar) == 1001 and abar[0] == 1 and all(b < a for a, b in pairwise(abar))
    assert abar[-1] == pytest.approx(4.04e-5, rel=0.01)  # linear beta 1e-4 .. 0.02, T = 1000: exp of the sum of logs


@pytest.mark.parametrize(
    ("steps", "expected"), [(1, [1000]), (4, [1000, 750, 500, 250]), (1000, list(range(1000, 0, -1)))]
)
def test_trailing_steps(steps: int, expected: list[int]) -> None:
    assert trailing_steps(1000, steps) == expected


@pytest.mark.parametrize("steps", [0, 1001])
def test_impossible_steps_are_refused(steps: int) -> None:
    with pytest.raises(ConfigError, match=str(steps)):
        trailing_steps(1000, steps)


def test_the_forward_process_keeps_the_variance() -> None:
    w0, eps = noise_of((4, 50, 200), 0), noise_of((4, 50, 200), 1)
    w = add_noise(w0, torch.tensor(SCHEDULE.abar)[[1, 300, 700, 1000]], eps)
    assert torch.allclose(w.std(dim=(1, 2)), torch.ones(4), atol=0.03)


@pytest.mark.parametrize("steps", [1, 2, 10, 100])
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_an_oracle_recovers_w0(steps: int, sampler: str) -> None:
    """A denoiser that knows the clean weights and the noise: with it, every state is w_0 plus a part of the noise."""
    w0, eps = noise_of((2, 3, 8), 0).double(), noise_of((2, 3, 8), 1).double()
    dual = noise_of((2, 5, 3), 2).double()
    seen: list[float] = []

    def oracle(weights: Weights, abar: float) -> Weights:
        assert weights.v is not None
        seen.append(abar)
        if sampler == "ddim":
            torch.testing.assert_close(weights.v, w0 + math.sqrt((1 - abar) / abar) * eps)
        return Weights(w0, dual)

    start = Weights(w0 + math.sqrt((1 - START) / START) * eps, 0 * dual)
    if sampler == "ddim":
        done = list(ddim(oracle, start, SCHEDULE, steps))
    else:
        done = list(ddpm(oracle, start, SCHEDULE, steps, lambda: torch.zeros_like(w0)))
    assert seen == [SCHEDULE.abar[t] for t in trailing_steps(1000, steps)] and len(done) == steps
    assert [step.index for step in done] == list(range(steps)) and done[0].t == 1000
    final = done[-1].weights  # at t = 0 the state is the estimate
    assert final.v is not None
    torch.testing.assert_close(final.v, w0)
    torch.testing.assert_close(final.dual, dual)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_the_state_after_a_step_has_the_noise_of_its_time(sampler: str) -> None:
    """From pure noise and an estimate of zero: the noise that is left, in units of the clean weights."""
    w, draws = noise_of((1, 50, 400)), count(5)
    zero = Weights(torch.zeros(1, 50, 400), torch.zeros(1, 1, 1))
    start = Weights(w * math.sqrt((1 - START) / START), torch.zeros(1, 1, 1))
    times = trailing_steps(1000, 7)
    if sampler == "ddim":
        done = ddim(lambda weights, abar: zero, start, SCHEDULE, 7)
    else:
        done = ddpm(lambda weights, abar: zero, start, SCHEDULE, 7, lambda: noise_of(w.shape, next(draws)))
    for step, after in zip(done, [*times[1:], 0], strict=True):
        abar = SCHEDULE.abar[after]
        assert step.weights.v is not None
        wanted = math.sqrt((1 - abar) / abar)
        assert float(step.weights.v.std()) == pytest.approx(wanted, rel=0.02, abs=1e-6)


def test_the_posterior_equals_brute_force() -> None:
    """Multiply the Gaussians prior, support and w_t on a fine grid of w_0, in one dimension."""
    shots, lam, p, w, abar = 3.0, 0.7, 0.8, -0.4, 0.3
    grid = torch.linspace(-8, 8, 200_001, dtype=torch.float64)
    log = -0.5 * grid**2 - 0.5 * shots * lam * (grid - p) ** 2 - 0.5 * (w - abar**0.5 * grid) ** 2 / (1 - abar)
    weight = (log - log.max()).exp()
    mean = float((weight * grid).sum() / weight.sum())
    variance = float((weight * (grid - mean) ** 2).sum() / weight.sum())
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    stats = SupportStats(p * one, shots * one, lam * one)
    x0, pi = gaussian_posterior(w * one, torch.tensor([abar], dtype=torch.float64), stats)
    assert float(x0) == pytest.approx(mean, abs=1e-6) and 1 / float(pi) == pytest.approx(variance, rel=1e-6)


@pytest.mark.parametrize("steps", [1, 10, 1000])
def test_tau_0_ends_at_the_posterior_mean(steps: int) -> None:
    """From zero noise the path stays at the mean K lambda p / (1 + K lambda) up to what abar_T leaves of w_T."""
    stats = stats_of()
    evidence = stats.count * stats.precision
    x0 = last(ddim(by(AnalyticDenoiser(), stats), state(torch.zeros(2, 4, 6), START), SCHEDULE, steps))
    assert torch.allclose(x0, evidence * stats.mean / (1 + evidence), atol=2e-2)


WIDE = SupportStats(torch.zeros(1, 4000, 1), torch.full((1, 4000, 1), 3.0), torch.ones(1, 1, 1))  # 4,000 draws


def test_ancestral_draws_have_the_posterior_spread() -> None:
    seeds, shape = count(5), (1, 4000, 1)
    steps = ddpm(
        by(AnalyticDenoiser(), WIDE), state(noise_of(shape), START), SCHEDULE, 1000,
        lambda: noise_of(shape, next(seeds)),
    )  # fmt: skip
    assert float(last(steps).std()) == pytest.approx((1 / (1 + 3.0)) ** 0.5, rel=0.05)


def test_few_ddim_steps_draw_too_narrow() -> None:
    """The known bias that the documentation tells: spread grows with the steps toward the true one."""
    spread = [
        float(last(ddim(by(AnalyticDenoiser(), WIDE), state(noise_of((1, 4000, 1)), START), SCHEDULE, s)).std())
        for s in (10, 100, 1000)
    ]
    assert spread[0] < spread[1] < spread[2] < 0.52
    assert spread[2] == pytest.approx(0.5, rel=0.05)


def test_samplers_keep_neither_graph_nor_path() -> None:
    """A denoiser with parameters, called without `no_grad`: the sampler itself sees to it."""
    denoise = by(randomise(UNetDenoiser(6, width=16), seed=0), stats_of())
    seen, most = [], 0
    for step in ddim(denoise, state(noise_of((2, 4, 6)), START), SCHEDULE, 50):
        assert step.estimate.v is not None and step.weights.v is not None
        assert not step.estimate.v.requires_grad and not step.weights.v.requires_grad
        seen.append(weakref.ref(step.weights.v))
        most = max(most, sum(ref() is not None for ref in seen))
    assert len(seen) == 50 and most <= 2  # this step's and the one before


def test_without_a_task_space_the_dual_alone_moves() -> None:
    dual = noise_of((2, 5, 3))
    start = Weights(None, torch.zeros(2, 5, 3))
    for method in ("ddim", "ddpm"):
        if method == "ddim":
            done = list(ddim(lambda weights, abar: Weights(None, dual), start, SCHEDULE, 4))
        else:
            done = list(
                ddpm(lambda weights, abar: Weights(None, dual), start, SCHEDULE, 4, lambda: noise_of((2, 3, 6)))
            )
        assert all(step.weights.v is None for step in done)
        torch.testing.assert_close(done[-1].weights.dual, dual)


@pytest.mark.parametrize("abar", [1.0, 1 - 1e-9, 1e-9])
def test_the_ends_of_the_schedule_are_finite(abar: float) -> None:
    w, stats = noise_of((2, 4, 6)), stats_of()
    x0, _ = gaussian_posterior(w, torch.full((2,), abar), stats)
    assert torch.isfinite(x0).all()
    if abar == 1:
        assert torch.allclose(x0, w, atol=1e-5)


def test_the_posterior_leaves_its_inputs_alone() -> None:
    w, stats = noise_of((2, 4, 6)), stats_of()
    before = [t.clone() for t in (w, stats.mean, stats.count, stats.precision)]
    gaussian_posterior(w, torch.full((2,), 0.5), stats)
    assert all(torch.equal(a, b) for a, b in zip((w, stats.mean, stats.count, stats.precision), before, strict=True))


def test_noise_follows_the_class_not_its_position() -> None:
    ranks = torch.tensor([[0, 1, 2]])
    order = torch.tensor([2, 0, 1])
    straight = Noise([7], ranks, 5, 1.0, torch.device("cpu")).draw()
    turned = Noise([7], ranks[:, order], 5, 1.0, torch.device("cpu")).draw()
    assert torch.equal(turned, straight[:, order])


def test_noise_of_a_batch_is_that_of_its_tasks() -> None:
    ranks = torch.tensor([[0, 1, 2], [2, 1, 0]])
    both = Noise([7, 8], ranks, 5, 0.5, torch.device("cpu"))
    alone = Noise([8], ranks[1:], 5, 0.5, torch.device("cpu"))
    for _ in range(2):
        assert torch.equal(both.draw()[1:], alone.draw())
