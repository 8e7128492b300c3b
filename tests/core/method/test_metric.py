"""Cosine classifier, closed-form gradient, calibration, choice of the guidance scale."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from metadiff_cli.core.method.calibration import Calibration, best_scale, calibration_error, fit_calibration
from metadiff_cli.core.method.guidance import GUIDANCE_GRID, PROTOTYPE, leave_one_out_guidance, leave_one_out_logits
from metadiff_cli.core.method.metric import cosine_logits, task_logits, whitened_cosines
from metadiff_cli.core.method.support import TaskSupport, support_stats
from metadiff_cli.core.method.task_space import TaskSpace, fit_task_space


def test_the_order_of_support_images_does_not_matter() -> None:
    v = torch.randn(1, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    a, b = support_stats(v, torch.ones(4)), support_stats(v[:, :, torch.tensor([4, 2, 0, 1, 3])], torch.ones(4))
    assert torch.allclose(a.mean, b.mean, atol=1e-6) and torch.equal(a.count, b.count)


def test_cosines_ignore_length_and_may_be_centred() -> None:
    z, w, centre = torch.randn(1, 4, 8), torch.randn(1, 3, 8), torch.randn(8)
    assert torch.allclose(cosine_logits(3 * z, 5 * w), cosine_logits(z, w), atol=1e-5)
    assert torch.allclose(cosine_logits(z, w, 2.0, centre), cosine_logits(z - centre, w - centre, 2.0), atol=1e-6)


def test_calibration_error_of_known_cases() -> None:
    confidence = torch.tensor([0.9] * 10)
    assert calibration_error(confidence, torch.tensor([True] * 9 + [False])) == pytest.approx(0, abs=1e-4)
    assert calibration_error(confidence, torch.tensor([False] * 10)) == pytest.approx(90, abs=1e-4)
    assert calibration_error(torch.tensor([1.0, 0.2]), torch.tensor([True, False])) == pytest.approx(10, abs=1e-4)


def test_the_best_scale_recovers_a_known_one() -> None:
    g = torch.Generator().manual_seed(0)
    cosines = torch.rand(20_000, 5, generator=g)
    labels = torch.multinomial((12.0 * cosines).softmax(dim=1), 1, generator=g).squeeze(1)
    assert best_scale(cosines, labels) == pytest.approx(12.0, rel=0.05)


def test_calibration_is_smooth_in_ways_and_shots() -> None:
    def true(n: int, k: int) -> float:
        return 8.0 * k**0.3 * n**0.2

    fitted = fit_calibration({(n, k): true(n, k) for n in (5, 10, 20) for k in (1, 5)})
    assert fitted.scale(7, 3) == pytest.approx(true(7, 3), rel=1e-6)  # a power law is linear in the logarithms
    assert fitted.scale(50, 1) == pytest.approx(true(20, 1)) and fitted.scale(2, 9) == pytest.approx(true(5, 5))
    assert fit_calibration({(5, 1): 9.0}).scale(8, 3) == pytest.approx(9.0)


def test_a_calibration_of_a_wrong_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="value for each"):
        Calibration((5,), (1, 5), ((1.0,),))
    with pytest.raises(ValueError, match="bounds"):
        Calibration((5,), (1,), ((1e5,),))


def test_without_the_prior_the_logits_are_plain_cosines_and_with_it_the_whitened_ones() -> None:
    g = torch.Generator().manual_seed(0)
    z, w = torch.randn(2, 4, 8, generator=g), torch.randn(2, 3, 8, generator=g)
    space = space_of(torch.linspace(0.1, 9, 8))
    assert torch.allclose(task_logits(z, w, space, PROTOTYPE, 3.0), cosine_logits(z, w, 3.0), atol=1e-4)
    moved = replace(space, mean=torch.ones(8)).centred(True)
    assert torch.allclose(task_logits(z, w, moved, PROTOTYPE), cosine_logits(z, w, 1.0, torch.ones(8)), atol=1e-4)
    u = space.precision.sqrt()
    assert torch.allclose(task_logits(z, w, space, 0.0), cosine_logits(z * u, w * u), atol=1e-6)
    each = torch.stack([task_logits(z, w, space, a)[i] for i, a in enumerate((1.0, 16.0))])
    assert torch.allclose(task_logits(z, w, space, torch.tensor([1.0, 16.0])), each, atol=1e-6)


def test_leave_one_out_equals_adapting_without_the_image() -> None:
    """The closed form against the long way: the posterior of each class remade without the image at hand."""
    g = torch.Generator().manual_seed(0)
    z, precision = torch.randn(1, 3, 4, 6, generator=g), torch.linspace(0.2, 4, 6)
    space = replace(space_of(precision), centre=torch.full((6,), 0.5))
    for a, logits in leave_one_out_logits(TaskSupport.even(z), space):
        for c, k in ((0, 0), (2, 3)):
            kept = [torch.cat([z[0, i, :k], z[0, i, k + 1 :]]) if i == c else z[0, i] for i in range(3)]
            w = torch.stack([a * len(x) * precision / (1 + a * len(x) * precision) * x.mean(0) for x in kept])
            expected = task_logits(z[:, c, k : k + 1], w.unsqueeze(0), space, a)[0, 0]
            assert torch.allclose(logits[0, 4 * c + k], expected, atol=1e-4), a


def space_of(precision: Tensor) -> TaskSpace:
    size = len(precision)
    return TaskSpace(torch.zeros(size), torch.eye(size), torch.eye(size), precision)


def test_one_image_per_class_takes_the_default() -> None:
    z = torch.randn(3, 5, 1, 8)
    support = TaskSupport.even(z)
    assert leave_one_out_guidance(support, space_of(torch.ones(8)), 10.0, default=4.0).tolist() == [4.0] * 3


def test_a_wrong_prior_is_trusted_less_than_a_right_one() -> None:
    """Classes that differ where the prior expects only noise want a large scale."""
    g = torch.Generator().manual_seed(0)
    precision = torch.cat([torch.full((8,), 3.0), torch.full((8,), 0.01)])
    right = torch.zeros(40, 5, 1, 16)
    wrong = right.clone()
    right[..., :8] = 2 * torch.randn(40, 5, 1, 8, generator=g)
    wrong[..., 8:] = 2 * torch.randn(40, 5, 1, 8, generator=g)
    noise = torch.randn(40, 5, 5, 16, generator=g) * precision.rsqrt().clamp(max=2.0)
    chosen_right = leave_one_out_guidance(TaskSupport.even(right + noise), space_of(precision), 10.0)
    chosen_wrong = leave_one_out_guidance(TaskSupport.even(wrong + 0.3 * noise), space_of(precision), 10.0)
    assert float(chosen_wrong.log().mean()) > float(chosen_right.log().mean()) + math.log(2)
    assert set(chosen_right.tolist()) <= set(GUIDANCE_GRID)


def test_a_few_images_at_a_time_give_the_same_cosines() -> None:
    """Classes of 1, 2 and 5 images, in any order."""
    g = torch.Generator().manual_seed(0)
    labels = torch.tensor([0, 2, 1, 2, 2, 1, 2, 2])
    support = TaskSupport.of(torch.randn(1, 8, 6, generator=g), labels)
    space = space_of(torch.linspace(0.2, 4, 6))
    whole = dict(leave_one_out_logits(support, space))
    parts = [dict(leave_one_out_logits(part, space)) for part in support.parts(values=18)]
    assert len(parts) == 3
    for a, logits in whole.items():
        assert torch.allclose(torch.cat([part[a] for part in parts], dim=1), logits, atol=1e-5)


def test_known_squares_spare_the_projection_and_change_nothing() -> None:
    g = torch.Generator().manual_seed(0)
    space = fit_task_space([torch.randn(9, 6, generator=g) + 2 * torch.randn(6, generator=g) for _ in range(5)])
    z, w, mean = (torch.randn(2, n, 6, generator=g) for n in (4, 3, 1))
    around = space.around(mean)
    squares = space.squares_around(mean, z, space.squares(z))
    assert torch.allclose(squares, around.squares(z), rtol=1e-4)
    expected = cosine_logits(around.whiten(z), around.whiten(w))
    assert torch.allclose(whitened_cosines(z, w, around, squares), expected, atol=1e-5)
    assert torch.allclose(whitened_cosines(z, w, around), expected, atol=1e-5)
