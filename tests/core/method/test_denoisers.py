"""Denoisers: the untrained one is the analytic one, classes are treated alike, the average is really used."""

from dataclasses import replace

import pytest
import torch

from metadiff_cli.core.method.denoisers import (
    AnalyticDenoiser,
    Frame,
    PaperDenoiser,
    UNetDenoiser,
    build_denoiser,
    randomise,
)
from metadiff_cli.core.method.guidance import shift_of
from metadiff_cli.core.method.support import SupportStats
from metadiff_cli.core.method.task_space import TaskSpace, class_statistics


def inputs(tasks: int = 2, ways: int = 5, size: int = 16) -> tuple[torch.Tensor, torch.Tensor, SupportStats]:
    g = torch.Generator().manual_seed(0)
    w, p = torch.randn(2, tasks, ways, size, generator=g)
    shots = torch.randint(1, 6, (tasks, ways, 1), generator=g).float()
    return w, torch.rand(tasks, generator=g) * 0.98 + 0.01, SupportStats(p, shots, torch.rand(1, 1, size, generator=g))


def space_of(seed: int, groups: tuple[int, ...] = (12, 4)) -> TaskSpace:
    g = torch.Generator().manual_seed(seed)
    scale = torch.linspace(2.0, 0.2, sum(groups))
    classes = [scale * torch.randn(1, sum(groups), generator=g) + torch.randn(6, sum(groups), generator=g)
               for _ in range(20)]  # fmt: skip
    return class_statistics(classes, groups).task_space()


@pytest.mark.parametrize("size", [16, 64, 1600])
def test_a_fresh_unet_is_the_analytic_denoiser(size: int) -> None:
    w, abar, stats = inputs(size=size)
    fresh = UNetDenoiser(size, width=32).eval()
    assert torch.equal(fresh(w, abar, stats), AnalyticDenoiser()(w, abar, stats))
    if size == 16:  # in any frame
        framed = build_denoiser("unet", size, 32, space_of(0)).eval()
        assert torch.equal(framed(w, abar, stats), AnalyticDenoiser()(w, abar, stats))


@pytest.mark.parametrize("groups", [(16,), (12, 4)])
def test_a_frame_maps_to_displacements_of_features_and_back(groups: tuple[int, ...]) -> None:
    space = space_of(0, groups)
    frame = Frame(space)
    z = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    units = torch.tensor(frame.references).repeat_interleave(torch.tensor(groups))
    assert torch.allclose(frame.read(space.to_task(z)) * units, z - space.mean, atol=1e-4)
    assert torch.allclose(frame.write(frame.read(z)), z, atol=1e-4)
    v = torch.randn(20000, 16, generator=torch.Generator().manual_seed(2))
    for part in torch.split(frame.read(v), list(groups), dim=-1):  # class means are N(0, I): the unit is their spread
        assert float(part.square().mean()) == pytest.approx(1, rel=0.05)


def test_in_frames_of_one_reference_a_unet_sees_and_gives_the_same_displacements() -> None:
    """Whatever the basis of the task space: one that is turned by a rotation changes the coordinates alone."""
    space = space_of(0, (16,))
    turn = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(3)))[0]
    turned = TaskSpace(space.mean, (space.bases[0] @ turn,), torch.ones(16))
    denoiser = randomise(UNetDenoiser(16, width=32), seed=1)
    w, abar, stats = inputs()
    stats = replace(stats, precision=torch.ones(1, 1, 16), count=torch.full((1, 1, 1), 2.0))
    frame = Frame(space)
    there = denoiser(w, abar, stats, frame)
    again = denoiser(w @ turn, abar, replace(stats, mean=stats.mean @ turn), Frame(turned, frame.references))
    assert torch.allclose(again, there @ turn, atol=1e-3)
    assert not torch.allclose(denoiser(w @ turn, abar, replace(stats, mean=stats.mean @ turn)), there @ turn, atol=1e-1)


def test_a_checkpoint_holds_no_frame() -> None:
    with_frame = build_denoiser("unet", 16, 32, space_of(0))
    assert with_frame.state_dict().keys() == build_denoiser("unet", 16, 32).state_dict().keys()


@pytest.mark.parametrize("kind", ["unet", "paper"])
@pytest.mark.parametrize("ways", [2, 5, 20])
def test_permuting_the_classes_permutes_the_result(kind: str, ways: int) -> None:
    w, abar, stats = inputs(ways=ways)
    denoiser = randomise(build_denoiser(kind, 16, 32, space_of(0)), seed=1)
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
