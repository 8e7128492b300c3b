"""The inner problem: its gradient, its minimum, and the ways to solve one step."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from metadiff_cli.core.method.descent import NO_DESCENT, Gram, InnerProblem, LowRankGram, gram_of

LABELS = torch.tensor([0, 2, 1, 0, 2, 2, 1, 0])


def features(tasks: int = 2, count: int = len(LABELS), size: int = 10, seed: int = 0) -> Tensor:
    """Joint features (B, n, J) of length 1, in float64."""
    g = torch.Generator().manual_seed(seed)
    phi = torch.randn(tasks, count, size, generator=g, dtype=torch.float64) + 0.5
    return phi / phi.norm(dim=-1, keepdim=True)


def problem(phi: Tensor, start: Tensor, importance: Tensor | None = None, labels: Tensor = LABELS) -> InnerProblem:
    """F of tasks with joint features (B, n, J) and starting weights W_0 (B, N, J)."""
    target = torch.nn.functional.one_hot(labels, start.shape[1]).to(phi)
    return InnerProblem(gram_of(phi), phi @ start.mT, target, 4.0, 0.5, importance)


def starts(tasks: int = 2, ways: int = 3, size: int = 10) -> Tensor:
    return features(tasks, ways, size, seed=9)


def loss_of(w: Tensor, phi: Tensor, start: Tensor, importance: Tensor) -> Tensor:
    """F of one task, of its classifier W (N, J)."""
    entropy = torch.nn.functional.cross_entropy(4.0 * phi @ w.T, LABELS, reduction="none")
    return (importance * entropy).sum() + 0.25 * (w - start).square().sum()


IMPORTANCE = torch.tensor([1.0, 2.0, 1.0, 0.0, 1.0, 1.0, 0.5, 1.0], dtype=torch.float64)


def test_the_loss_of_a_dual_is_that_of_its_classifier_and_the_residual_is_its_slope() -> None:
    phi, start = features(), starts()
    inner = problem(phi, start, IMPORTANCE.unsqueeze(0))
    dual = torch.randn(inner.start.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for b in range(2):
        w = (start[b] + 4.0 * dual[b].T @ phi[b]).requires_grad_()
        loss = loss_of(w, phi[b], start[b], IMPORTANCE)
        (slope,) = torch.autograd.grad(loss, w)
        torch.testing.assert_close(inner.loss(dual)[b], loss.detach())
        torch.testing.assert_close(4.0 * inner.residual(dual)[b].T @ phi[b], slope)


@pytest.mark.parametrize("importance", [torch.ones(8, dtype=torch.float64), IMPORTANCE])
def test_the_descent_ends_at_the_minimum(importance: Tensor) -> None:
    """By the L-BFGS of SciPy over all of W, whose minimum needs no dual."""
    phi, start = features(1), starts(1)

    def value(flat: np.ndarray) -> tuple[float, np.ndarray]:
        w = torch.from_numpy(flat).view_as(start[0]).requires_grad_()
        loss = loss_of(w, phi[0], start[0], importance)
        (slope,) = torch.autograd.grad(loss, w)
        return loss.item(), slope.flatten().numpy()

    exact = minimize(
        value, start.flatten().numpy(), jac=True, method="L-BFGS-B", options={"ftol": 1e-15, "gtol": 1e-10}
    )
    inner = problem(phi, start, importance.unsqueeze(0))
    dual = inner.descend(1000)
    torch.testing.assert_close(
        (start + 4.0 * dual.mT @ phi).flatten(), torch.from_numpy(exact.x), atol=1e-5, rtol=0
    )  # fmt: skip
    assert float(inner.loss(dual)) == pytest.approx(exact.fun, abs=1e-9)
    assert bool((dual[:, importance == 0] == 0).all())  # an image that is left out has no part in the classifier


def test_no_step_ever_raises_the_loss() -> None:
    """Hard cases: a large scale, a small prior, images far from their class, importance of any size."""
    g = torch.Generator().manual_seed(0)
    for seed in range(20):
        phi, start = features(4, seed=seed), 3 * torch.randn(4, 3, 10, generator=g, dtype=torch.float64)
        inner = problem(phi, start, 4 * torch.rand(1, 8, generator=g, dtype=torch.float64))
        inner = replace(inner, scale=(1.0, 3.0, 20.0)[seed % 3], prior=(1e-4, 0.1, 10.0)[seed % 3])
        losses = torch.stack([inner.loss(inner.descend(steps)) for steps in range(12)])
        assert bool((losses.diff(dim=0) <= 1e-9).all())


def test_a_step_with_noisy_weights_minimises_the_loss_with_their_pull() -> None:
    """Many steps at one noise level: the slope of F + c/2 |W - W_t|^2 is zero, c = rho abar / (1 - abar)."""
    inner, abar = problem(features(), starts()), 0.6
    observed = torch.randn(inner.start.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) / 10
    dual = torch.zeros_like(observed)
    for _ in range(500):
        dual = inner.denoise(observed, abar, dual)
    pull = 0.5 * abar / (1 - abar)
    torch.testing.assert_close(inner.residual(dual) + pull * (dual - observed), torch.zeros_like(dual))


def test_at_pure_noise_a_step_is_one_of_plain_descent_and_without_noise_it_gives_what_is_observed() -> None:
    inner = problem(features(), starts())
    first = inner.descend(1)
    torch.testing.assert_close(inner.denoise(torch.zeros_like(first), 0.0, torch.zeros_like(first)), first)
    torch.testing.assert_close(inner.denoise(first, 1.0, first), first, atol=1e-7, rtol=1e-7)


def test_an_image_that_counts_twice_is_the_image_twice() -> None:
    phi, start = features(), starts()
    twice = torch.cat([torch.arange(8), torch.tensor([1])])
    importance = torch.ones(1, 8, dtype=torch.float64)
    importance[0, 1] = 2.0
    for steps in (1, 3, 200):
        weighed = problem(phi, start, importance).descend(steps)
        doubled = problem(phi[:, twice], start, labels=LABELS[twice]).descend(steps)
        torch.testing.assert_close(weighed.mT @ phi, doubled.mT @ phi[:, twice])


def test_an_image_of_no_importance_is_no_image() -> None:
    phi, start = features(), starts()
    kept = torch.arange(8) != 3
    importance = kept.double().unsqueeze(0)
    without = problem(phi[:, kept], start, labels=LABELS[kept]).descend(5)
    torch.testing.assert_close(problem(phi, start, importance).descend(5)[:, kept], without)


def test_importance_of_each_task_is_its_own() -> None:
    phi, start = features(), starts()
    importance = torch.stack([IMPORTANCE, IMPORTANCE.flip(0)])
    both = problem(phi, start, importance).descend(4)
    for b in range(2):
        torch.testing.assert_close(both[b], problem(phi[b : b + 1], start[b : b + 1], importance[[b]]).descend(4)[0])


@pytest.mark.parametrize("tasks", [1, 3])
def test_the_form_for_many_images_is_the_form_for_few(tasks: int) -> None:
    phi, root = features(tasks, 30, 4), torch.rand(tasks, 30, dtype=torch.float64)
    right = torch.randn(tasks, 30, 3, dtype=torch.float64)
    assert isinstance(gram_of(phi), LowRankGram) and not isinstance(gram_of(phi[:, :4]), LowRankGram)
    low, full = LowRankGram(phi), Gram(phi @ phi.mT)
    torch.testing.assert_close(low.times(right), full.times(right))
    torch.testing.assert_close(low.solver(0.3, 8.0, root)(right), full.solver(0.3, 8.0, root)(right))
    system = 0.3 * torch.eye(30) + 8.0 * root[0].diag() @ phi[0] @ phi[0].T @ root[0].diag()
    step = full.solver(0.3, 8.0, root)(root.unsqueeze(-1) * right)[0]  # D system^-1 of `right`
    torch.testing.assert_close(system @ (step / root[0].unsqueeze(-1)), right[0])


def test_many_images_in_float32_reach_the_minimum_of_float64() -> None:
    """The low-rank form divides a small difference by the prior: what that costs must not show."""
    g, labels = torch.Generator().manual_seed(0), torch.arange(600) % 3
    phi = (torch.randn(1, 600, 20, generator=g, dtype=torch.float64) + starts(1, 3, 20)[:, labels] * 4).float()
    phi = torch.nn.functional.normalize(phi, dim=-1)
    start = starts(1, 3, 20)
    found = {}
    for dtype in (torch.float32, torch.float64):
        inner = replace(problem(phi.to(dtype), start.to(dtype), labels=labels), prior=0.1)
        dual = inner.descend(50)
        found[dtype] = (start.to(dtype) + 4.0 * dual.mT @ phi.to(dtype)).double()
    torch.testing.assert_close(found[torch.float32], found[torch.float64], atol=2e-3, rtol=0)


def test_a_prior_beyond_measure_holds_the_classifier_at_its_start() -> None:
    inner = replace(problem(features(), starts()), prior=NO_DESCENT)
    assert float((4.0 * inner.descend(10).mT @ features()).abs().max()) < 1e-4
