"""The domain of a task: what is estimated, and what follows from it."""

import pytest
import torch
from torch import Tensor

from metadiff_cli.core.method.calibration import TaskTable
from metadiff_cli.core.method.guidance import (
    FOREIGN,
    PROTOTYPE,
    SHARED,
    Usual,
    domain_of,
    shared_of,
    shift_of,
    trusted_guidance,
)
from metadiff_cli.core.method.support import SupportStats

SIZE = 64
PRECISION = torch.linspace(0.1, 5.0, SIZE)
USUAL = Usual(TaskTable((5,), (1,), ((0.0,),)), 0.2)


def tasks(count: int, ways: int, shots: float, moved: Tensor | float = 0.0) -> SupportStats:
    """As the prior has them: class means N(0, 1), noise of variance 1 / lambda, all moved together."""
    g = torch.Generator().manual_seed(0)
    means = torch.randn(count, ways, SIZE, generator=g)
    noise = torch.randn(count, ways, SIZE, generator=g) * (shots * PRECISION).rsqrt()
    return SupportStats(means + noise + moved, torch.full((count, ways, 1), shots), PRECISION.view(1, 1, -1))


@pytest.mark.parametrize(("ways", "shots"), [(2, 1.0), (5, 5.0), (20, 1.0)])
def test_the_shift_of_tasks_from_the_prior_is_none(ways: int, shots: float) -> None:
    assert float(shift_of(tasks(500, ways, shots)).exp().mean()) == pytest.approx(1, abs=0.03)


def test_moved_tasks_have_a_shift_whatever_their_classes_are() -> None:
    """The distance of a task as a whole counts, not that of its classes from one another."""
    assert bool((shift_of(tasks(50, 5, 1.0, moved=2.0)) > shift_of(tasks(50, 5, 1.0)) + 0.5).all())
    wide = tasks(50, 4, 1.0)
    apart = torch.tensor([5.0, -5.0, 5.0, -5.0]).view(1, 4, 1)
    spread = SupportStats(wide.mean + apart, wide.count, wide.precision)
    assert torch.allclose(shift_of(spread), shift_of(wide), atol=1e-4)


def test_the_domain_is_a_share_of_what_the_classes_have_in_common() -> None:
    stats = tasks(200, 20, 5.0, moved=torch.linspace(-2, 2, SIZE))
    assert torch.allclose(domain_of(stats, 0.5).mean(dim=(0, 1)), torch.linspace(-1, 1, SIZE), atol=0.1)
    assert shared_of("unet") == shared_of("analytic") == SHARED and shared_of("paper") == 0


def test_guidance_grows_with_the_shift_from_home_to_foreign() -> None:
    found = [float(trusted_guidance(tasks(1, 5, 1.0, moved=m), USUAL, 1.0)) for m in (0.0, 0.2, 0.3, 0.45, 3.0)]
    assert found == sorted(found) and found[0] == 1 and found[-1] == pytest.approx(FOREIGN)
    assert 1 < found[2] < FOREIGN


def test_a_home_beyond_foreign_stays() -> None:
    assert float(trusted_guidance(tasks(1, 5, 1.0, moved=3.0), USUAL, 64.0)) == pytest.approx(64)
    stays = float(trusted_guidance(tasks(1, 5, 1.0, moved=3.0), USUAL, PROTOTYPE))
    assert stays == pytest.approx(PROTOTYPE) and stays <= PROTOTYPE  # exp(log(a)) is more than a in fp32
