"""The task space: the generalised eigenproblem, its inverse, and odd inputs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from metadiff_cli.core.method.task_space import _moments, _shrink, class_statistics, fit_task_space, identity_space
from metadiff_cli.errors import DataError


def classes(count: int = 12, images: int = 20, size: int = 16, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    means = torch.randn(count, size, generator=g)
    return [mean + 0.5 * torch.randn(images, size, generator=g) for mean in means]


@pytest.mark.parametrize("size", [16, 64])
def test_it_solves_the_eigenproblem(size: int) -> None:
    features = classes(size=size)
    space = fit_task_space(features, shrink_within=0.5, shrink_between=0.3, floor=0.0)
    means, within, total, inverse = _moments(features)
    s_w = within / (total - len(means))
    centred = means - means.mean(dim=0)
    s_b = _shrink(centred.T @ centred / (len(means) - 1) - s_w * inverse, 0.3)
    a = space.basis.double()
    eye = torch.eye(size, dtype=torch.float64)
    assert torch.allclose(a.T @ _shrink(s_w, 0.5) @ a, torch.diag(1 / space.precision.double()), rtol=1e-3, atol=1e-4)
    assert torch.allclose(a.T @ s_b @ a, eye, rtol=1e-3, atol=1e-3)
    assert torch.equal(space.precision, space.precision.sort(descending=True).values)


@settings(max_examples=20, deadline=None)
@given(size=st.integers(2, 24), count=st.integers(2, 9), images=st.integers(1, 6), seed=st.integers(0, 99))
def test_there_and_back(size: int, count: int, images: int, seed: int) -> None:
    """Few images of few classes too: one image a class has no scatter, and the result is still finite."""
    features = classes(count, images, size, seed)
    space = fit_task_space(features)
    z = torch.randn(5, size, generator=torch.Generator().manual_seed(seed))
    assert torch.isfinite(space.precision).all() and (space.precision > 0).all()
    assert torch.allclose(space.to_feature(space.to_task(z)), z, rtol=1e-3, atol=1e-3)


def test_the_floor_holds() -> None:
    space = fit_task_space(classes(count=4, size=32), floor=1e-2, shrink_between=0.0)
    assert float(space.precision.min()) >= 0.99e-2 * float(space.precision.max())


def test_constant_features_stay_finite() -> None:
    space = fit_task_space([torch.ones(5, 8), torch.ones(5, 8)])
    assert all(torch.isfinite(t).all() for t in space.tensors().values())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_refused(value: float) -> None:
    bad = classes()
    bad[3][0, 0] = value
    with pytest.raises(DataError, match="not finite"):
        fit_task_space(bad)


def test_one_class_is_refused() -> None:
    with pytest.raises(DataError, match="at least 2"):
        fit_task_space(classes(count=1))


def test_a_class_without_images_is_refused() -> None:
    with pytest.raises(DataError, match="no images"):
        fit_task_space([*classes(), torch.empty(0, 16)])


def test_identity_space_keeps_directions() -> None:
    space = identity_space(classes())
    z = torch.randn(3, 16)
    assert torch.allclose(space.to_feature(space.to_task(z)), z, atol=1e-5)
    assert torch.allclose(torch.cosine_similarity(space.to_task(z), z), torch.ones(3), atol=1e-5)


def test_statistics_give_the_space_of_any_shrinkage() -> None:
    g = torch.Generator().manual_seed(0)
    classes = [torch.randn(6, 5, generator=g) + torch.randn(1, 5, generator=g) for _ in range(8)]
    statistics = class_statistics(classes)
    for within, between in ((0.5, 0.3), (0.95, 0.6)):
        space = statistics.task_space(within, between)
        again = fit_task_space(classes, shrink_within=within, shrink_between=between)
        assert all(torch.equal(a, b) for a, b in zip(space.tensors().values(), again.tensors().values(), strict=True))
    round_noise = statistics.task_space(1.0, 0.3)  # wholly shrunk, the noise is the same in every direction
    z = torch.randn(4, 5, generator=g)
    distances = torch.cdist(z, z)
    assert torch.allclose(torch.cdist(round_noise.whiten(z), round_noise.whiten(z)) / distances.clamp_min(1e-9),
                          torch.full((4, 4), float(statistics.within.diagonal().mean()) ** -0.5).fill_diagonal_(0.0),
                          rtol=1e-3, atol=1e-2)  # fmt: skip
