"""Denoisers: the untrained one is the analytic one, classes are treated alike, the average is really used."""

from dataclasses import replace

import pytest
import torch

from metadiff_cli.core.method.denoisers import (
    AnalyticDenoiser,
    PaperDenoiser,
    UNetDenoiser,
    build_denoiser,
    randomise,
)
from metadiff_cli.core.method.guidance import shift_of
from metadiff_cli.core.method.support import SupportStats


def inputs(tasks: int = 2, ways: int = 5, size: int = 16) -> tuple[torch.Tensor, torch.Tensor, SupportStats]:
    g = torch.Generator().manual_seed(0)
    w, p = torch.randn(2, tasks, ways, size, generator=g)
    shots = torch.randint(1, 6, (tasks, ways, 1), generator=g).float()
    return w, torch.rand(tasks, generator=g) * 0.98 + 0.01, SupportStats(p, shots, torch.rand(1, 1, size, generator=g))


@pytest.mark.parametrize("size", [16, 64, 1600])
def test_a_fresh_unet_is_the_analytic_denoiser(size: int) -> None:
    w, abar, stats = inputs(size=size)
    fresh = UNetDenoiser(size, width=32).eval()
    assert torch.equal(fresh(w, abar, stats), AnalyticDenoiser()(w, abar, stats))


@pytest.mark.parametrize("kind", ["unet", "paper"])
@pytest.mark.parametrize("ways", [2, 5, 20])
def test_permuting_the_classes_permutes_the_result(kind: str, ways: int) -> None:
    w, abar, stats = inputs(ways=ways)
    denoiser = randomise(build_denoiser(kind, 16, 32), seed=1)
    order = torch.randperm(ways, generator=torch.Generator().manual_seed(2))
    turned = SupportStats(stats.mean[:, order], stats.count[:, order], stats.precision)
    assert torch.allclose(denoiser(w[:, order], abar, turned), denoiser(w, abar, stats)[:, order], atol=1e-4)


@pytest.mark.parametrize("kind", ["unet", "paper", "analytic"])
def test_a_batch_is_its_tasks(kind: str) -> None:
    w, abar, stats = inputs()
    denoiser = build_denoiser(kind, 16, 32)
    denoiser = denoiser.eval() if kind == "analytic" else randomise(denoiser, seed=1)
    both = denoiser(w, abar, stats)
    for b in range(2):
        alone = denoiser(
            w[b : b + 1], abar[b : b + 1], SupportStats(stats.mean[b : b + 1], stats.count[b : b + 1], stats.precision)
        )
        assert torch.allclose(both[b : b + 1], alone, atol=1e-4)


@pytest.mark.parametrize("kind", ["unet", "paper", "analytic"])
def test_a_number_of_shots_that_all_share_is_that_of_each(kind: str) -> None:
    w, abar, stats = inputs()
    denoiser = build_denoiser(kind, 16, 32)
    denoiser = denoiser.eval() if kind == "analytic" else randomise(denoiser, seed=1)
    shared, each = (replace(stats, count=torch.full(shape, 3.0)) for shape in ((1, 1, 1), (2, 5, 1)))
    assert torch.allclose(denoiser(w, abar, shared), denoiser(w, abar, each), atol=1e-5)
    assert torch.allclose(shift_of(shared), shift_of(each), atol=1e-5)
    at_once = denoiser(w, torch.full((2,), 0.5), shared)
    assert torch.allclose(denoiser(w, torch.tensor([0.5]), shared), at_once, atol=1e-5)


def test_untrained_means_every_layer() -> None:
    denoiser = randomise(UNetDenoiser(16, width=32), seed=0)
    assert isinstance(denoiser, UNetDenoiser)
    assert float(denoiser.net.out.weight.detach().abs().sum()) > 0
    same = randomise(UNetDenoiser(16, width=32), seed=0)
    assert all(torch.equal(a, b) for a, b in zip(denoiser.parameters(), same.parameters(), strict=True))


def test_paper_and_epsilon_agree() -> None:
    w, abar, stats = inputs()
    denoiser = PaperDenoiser(16, width=32).eval()
    a = abar.view(-1, 1, 1)
    x0 = denoiser(w, abar, stats)
    assert torch.allclose(a.sqrt() * x0 + (1 - a).sqrt() * denoiser.epsilon(w, abar, stats), w, atol=1e-5)


def test_guidance_scales_the_precision() -> None:
    w, abar, stats = inputs()
    prototype = AnalyticDenoiser()(w, abar, stats.scaled(1e9))
    assert torch.allclose(prototype, stats.mean, atol=1e-3)
    per_task = stats.scaled(torch.tensor([2.0, 3.0]))
    assert torch.equal(per_task.precision[1], 3 * stats.precision[0])
