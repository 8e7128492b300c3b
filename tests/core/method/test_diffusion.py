"""Schedule and samplers against closed forms."""

import weakref
from itertools import count

import pytest
import torch
from torch import Tensor

from metadiff_cli.core.method.denoisers import AnalyticDenoiser, UNetDenoiser, gaussian_posterior, randomise
from metadiff_cli.core.method.diffusion import Noise, Schedule, add_noise, ddim, ddpm, finish, trailing_steps
from metadiff_cli.core.method.support import SupportStats
from metadiff_cli.errors import ConfigError

SCHEDULE = Schedule()


def stats_of(shots: float = 3, tasks: int = 2, ways: int = 4, size: int = 6, seed: int = 0) -> SupportStats:
    g = torch.Generator().manual_seed(seed)
    p = torch.randn(tasks, ways, size, generator=g)
    precision = torch.linspace(0.1, 3.0, size).view(1, 1, -1)
    return SupportStats(p, torch.full((tasks, ways, 1), shots), precision)


def noise_of(shape: torch.Size | tuple[int, ...], seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_abar_falls_from_one_to_nearly_zero() -> None:
    abar = SCHEDULE.abar
    assert len(abar) == 1001 and abar[0] == 1 and (abar.diff() < 0).all()
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
    w = add_noise(w0, SCHEDULE.abar[torch.tensor([1, 300, 700, 1000])], eps)
    assert torch.allclose(w.std(dim=(1, 2)), torch.ones(4), atol=0.03)


@pytest.mark.parametrize("steps", [1, 2, 10, 100])
def test_an_oracle_recovers_w0(steps: int) -> None:
    """A denoiser that knows the noise: x0 = (w_t - sqrt(1 - abar) eps) / sqrt(abar)."""
    w0, eps = noise_of((2, 3, 8), 0).double(), noise_of((2, 3, 8), 1).double()

    def oracle(w: Tensor, abar: Tensor, stats: SupportStats) -> Tensor:
        a = abar.view(-1, 1, 1)
        return (w - (1 - a).sqrt() * eps) / a.sqrt()

    start = add_noise(w0, SCHEDULE.abar[-1:].expand(2), eps)
    assert torch.allclose(finish(ddim(oracle, start, SCHEDULE, steps, stats_of())), w0, atol=1e-8)


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
    x0 = finish(ddim(AnalyticDenoiser(), torch.zeros(2, 4, 6), SCHEDULE, steps, stats))
    assert torch.allclose(x0, evidence * stats.mean / (1 + evidence), atol=2e-2)


def test_ancestral_draws_have_the_posterior_spread() -> None:
    stats = stats_of(tasks=1, ways=4000, size=1)
    stats = SupportStats(torch.zeros_like(stats.mean), stats.count, torch.ones(1, 1, 1))
    seeds = count(5)
    x0 = finish(
        ddpm(
            AnalyticDenoiser(),
            noise_of((1, 4000, 1)),
            SCHEDULE,
            1000,
            stats,
            lambda: noise_of((1, 4000, 1), next(seeds)),
        )
    )
    assert float(x0.std()) == pytest.approx((1 / (1 + 3.0)) ** 0.5, rel=0.05)


def test_few_ddim_steps_draw_too_narrow() -> None:
    """The known bias that the documentation tells: spread grows with the steps toward the true one."""
    stats = SupportStats(torch.zeros(1, 4000, 1), torch.full((1, 4000, 1), 3.0), torch.ones(1, 1, 1))
    spread = [
        float(finish(ddim(AnalyticDenoiser(), noise_of((1, 4000, 1)), SCHEDULE, s, stats)).std())
        for s in (10, 100, 1000)
    ]
    assert spread[0] < spread[1] < spread[2] < 0.52
    assert spread[2] == pytest.approx(0.5, rel=0.05)


def test_samplers_keep_neither_graph_nor_path() -> None:
    """A denoiser with parameters, called without `no_grad`: the sampler itself sees to it."""
    denoiser, seen, most = randomise(UNetDenoiser(6, width=16), seed=0), [], 0
    for step in ddim(denoiser, noise_of((2, 4, 6)), SCHEDULE, 50, stats_of()):
        assert not step.x0.requires_grad and not step.w.requires_grad
        seen.append(weakref.ref(step.w))
        most = max(most, sum(ref() is not None for ref in seen))
    assert len(seen) == 50 and most <= 2  # this step's and the one before


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
