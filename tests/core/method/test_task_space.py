"""The task space: the generalised eigenproblem of each group, and odd inputs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from metadiff_cli.core.method.task_space import (
    FLOOR,
    ClassStatistics,
    TaskSpace,
    class_means,
    class_statistics,
    cross_fitted,
    identity_space,
)
from metadiff_cli.errors import DataError


def classes(count: int = 12, images: int = 20, size: int = 16, seed: int = 0) -> list[Tensor]:
    """Classes of unequal size."""
    g = torch.Generator().manual_seed(seed)
    means = torch.randn(count, size, generator=g)
    return [mean + 0.5 * torch.randn(images + c % 3, size, generator=g) for c, mean in enumerate(means)]


def equal(first: ClassStatistics, second: ClassStatistics) -> bool:
    pairs = zip((first.means, *first.within, *first.between), (second.means, *second.within, *second.between),
                strict=True)  # fmt: skip
    return all(torch.allclose(a, b, atol=1e-6) for a, b in pairs)


def shrunk(s: Tensor, share: float) -> Tensor:
    return (1 - share) * s + share * s.diagonal().mean() * torch.eye(len(s), dtype=s.dtype)


def test_statistics_are_their_definitions() -> None:
    features = classes()
    found = class_statistics(features, (16,))
    means = torch.stack([z.double().mean(dim=0) for z in features])
    rest = torch.cat([z.double() - m for z, m in zip(features, means, strict=True)])
    within = rest.T @ rest / (len(rest) - len(features))
    noise = within * sum(1 / len(z) for z in features) / len(features)
    torch.testing.assert_close(found.means, means)
    torch.testing.assert_close(found.within[0], within, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.between[0], torch.cov(means.T) - noise, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(class_means(features), means)


@pytest.mark.parametrize("groups", [(16,), (10, 6)])
def test_it_solves_the_eigenproblem_of_each_group(groups: tuple[int, ...]) -> None:
    statistics = class_statistics(classes(40), groups)
    space = statistics.task_space(0.5, 0.3)
    lambdas = space.precision.double().split(list(groups))
    for basis, lam, within, between in zip(space.bases, lambdas, statistics.within, statistics.between, strict=True):
        a = basis.double()
        kept = lam > 1.01 * FLOOR * lam.max()
        assert bool(kept.all())
        noise, spread = a.T @ shrunk(within, 0.5) @ a, a.T @ shrunk(between, 0.3) @ a
        torch.testing.assert_close(noise * lam.sqrt() * lam.sqrt().unsqueeze(1), torch.eye(len(a)).double(),
                                   atol=5e-3, rtol=0)  # fmt: skip
        torch.testing.assert_close(spread, torch.eye(len(a)).double(), atol=5e-3, rtol=0)
        assert torch.equal(lam, lam.sort(descending=True).values)


def test_groups_do_not_meet() -> None:
    """Each has the space that it would have alone."""
    features = classes()
    both = class_statistics(features, (10, 6)).task_space()
    apart = [class_statistics([z[:, rows] for z in features]).task_space() for rows in (slice(0, 10), slice(10, 16))]
    z = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    wanted = torch.cat([apart[0].to_task(z[:, :10]), apart[1].to_task(z[:, 10:])], dim=1)
    torch.testing.assert_close(both.to_task(z), wanted, atol=1e-3, rtol=1e-3)
    assert both.groups == (10, 6)


def test_whitened_noise_is_the_same_in_every_direction() -> None:
    statistics = class_statistics(classes(images=300), (16,))
    space = statistics.task_space(0.0, 0.3)
    g = torch.Generator().manual_seed(5)
    noise = torch.linalg.cholesky(statistics.within[0]).float() @ torch.randn(16, 20000, generator=g)
    white = space.whiten(space.mean + noise.T)
    torch.testing.assert_close(torch.cov(white.T), torch.eye(16), atol=0.06, rtol=0)


@settings(max_examples=20, deadline=None)
@given(size=st.integers(2, 24), count=st.integers(2, 9), images=st.integers(1, 6), seed=st.integers(0, 99))
def test_any_classes_give_a_finite_space(size: int, count: int, images: int, seed: int) -> None:
    """Few images of few classes too: one image per class has no scatter."""
    space = class_statistics(classes(count, images, size, seed)).task_space()
    z = torch.randn(5, size, generator=torch.Generator().manual_seed(seed))
    assert torch.isfinite(space.whiten(z)).all() and (space.precision > 0).all()


def test_the_floor_holds() -> None:
    space = class_statistics(classes(count=4, size=32)).task_space(shrink_between=0.0)
    assert float(space.precision.min()) >= 0.99 * FLOOR * float(space.precision.max())


def test_classes_that_vary_less_than_their_noise_are_noticed() -> None:
    none = ClassStatistics(torch.zeros(3, 8).double(), (torch.eye(8).double(),), (-torch.eye(8).double(),))
    assert none.collapsed and torch.isfinite(none.task_space().precision).all()
    assert not class_statistics(classes()).collapsed


def test_constant_features_stay_finite() -> None:
    space = class_statistics([torch.ones(5, 8), torch.ones(5, 8)]).task_space()
    assert all(torch.isfinite(t).all() for t in space.tensors().values())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_refused(value: float) -> None:
    bad = classes()
    bad[3][0, 0] = value
    with pytest.raises(DataError, match="not finite"):
        class_statistics(bad)


def test_one_class_is_refused() -> None:
    with pytest.raises(DataError, match="at least 2"):
        class_statistics(classes(count=1))


def test_a_class_without_images_is_refused() -> None:
    with pytest.raises(DataError, match="no images"):
        class_statistics([*classes(), torch.empty(0, 16)])


def test_the_identity_space_keeps_directions() -> None:
    space = identity_space(class_means(classes()))
    z = torch.randn(3, 16)
    assert torch.allclose(torch.cosine_similarity(space.to_task(z), z), torch.ones(3), atol=1e-5)
    means = space.to_task(class_means(classes()).float())
    assert float(means.square().mean()) == pytest.approx(1, rel=1e-4)


def test_a_file_holds_the_space() -> None:
    space = class_statistics(classes(), (10, 6)).task_space()
    again = TaskSpace.from_tensors(space.tensors())
    assert again.groups == (10, 6)
    assert all(torch.equal(a, b) for a, b in zip(space.tensors().values(), again.tensors().values(), strict=True))


def test_statistics_without_a_part_are_those_of_the_other_classes() -> None:
    features, parts = classes(9), [0, 1, 2, 0, 1, 2, -1, 0, 1]
    whole, rest = cross_fitted(iter(features), (10, 6), parts)
    assert equal(whole, class_statistics(features, (10, 6))) and sorted(rest) == [0, 1, 2]
    for part, statistics in rest.items():
        others = [z for z, p in zip(features, parts, strict=True) if p != part]
        assert equal(statistics, class_statistics(others, (10, 6)))
