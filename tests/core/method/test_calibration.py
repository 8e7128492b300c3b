"""Tables over ways and shots, temperatures, and how well confidences hold."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from metadiff_cli.core.method.calibration import (
    TaskTable,
    best_temperature,
    calibration_error,
    reliability,
    task_temperatures,
)

TABLE = TaskTable((5, 20), (1, 4), ((1.0, 3.0), (5.0, 7.0)))


def test_a_table_is_linear_in_the_logarithms_and_constant_beyond_its_grid() -> None:
    assert TABLE.at(5, 1) == 1 and TABLE.at(5, 4) == 3 and TABLE.at(20, 1) == 5 and TABLE.at(20, 4) == 7
    assert TABLE.at(10, 1) == pytest.approx(3) and TABLE.at(5, 2) == pytest.approx(2)
    assert TABLE.at(10, 2) == pytest.approx(4)
    assert TABLE.at(2, 0.5) == 1 and TABLE.at(100, 50) == 7
    assert TABLE.at(5, 2.5) == pytest.approx(1 + 2 * math.log(2.5) / math.log(4))  # the mean of unequal classes


def test_a_table_is_made_of_what_was_found_in_any_order() -> None:
    found = {(20, 4): 7.0, (5, 1): 1.0, (20, 1): 5.0, (5, 4): 3.0}
    assert TaskTable.of(found) == TABLE
    assert TaskTable.constant(9.0).at(2, 1) == TaskTable.constant(9.0).at(50, 30) == 9


@pytest.mark.parametrize(("ways", "shots", "values"), [
    ((5,), (1, 5), ((1.0,),)),
    ((5, 10), (1,), ((1.0,),)),
    ((0,), (1,), ((1.0,),)),
    ((), (), ()),
])  # fmt: skip
def test_a_table_of_a_wrong_shape_is_refused(
    ways: tuple[int, ...], shots: tuple[int, ...], values: tuple[tuple[float, ...], ...]
) -> None:
    with pytest.raises(ValueError, match="a table has"):
        TaskTable(ways, shots, values)


def drawn(factor: float, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits and labels that `factor` times the logits predict."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, 5, generator=g)
    return logits, torch.multinomial((factor * logits).softmax(dim=1), 1, generator=g).flatten()


@pytest.mark.parametrize("factor", [0.3, 1.0, 8.0])
def test_the_best_temperature_is_the_one_that_drew_the_labels(factor: float) -> None:
    logits, labels = drawn(factor, 40_000)
    found = best_temperature(logits, labels)
    assert found == pytest.approx(factor, rel=0.05)
    losses = [float(F.cross_entropy(found * f * logits, labels)) for f in (0.98, 1.0, 1.02)]
    assert losses[1] == min(losses)


def test_the_best_temperature_of_logits_that_are_all_right_or_say_nothing_is_finite() -> None:
    assert 0 < best_temperature(torch.eye(5), torch.arange(5)) < 1e4
    assert 0 < best_temperature(torch.zeros(4, 5), torch.zeros(4, dtype=torch.long)) < 1e4
    assert best_temperature(torch.eye(5), torch.arange(5).roll(1)) < 0.01  # sure and wrong: no confidence at all


def test_many_images_settle_the_temperature_of_a_task_and_few_leave_it_at_the_usual_one() -> None:
    usual, factor = 2.0, 5.0
    found = []
    for count in (1, 4, 40, 4000):
        logits, labels = drawn(factor, count, seed=3)
        found.append(float(task_temperatures(logits.unsqueeze(0), F.one_hot(labels, 5).float(), usual)))
    assert found[-1] == pytest.approx(factor, rel=0.1)
    assert abs(found[0] - usual) < 0.35 * usual and usual < found[2] <= factor * 1.35
    for f in found:  # within a factor of e^1.5, whatever the images say
        assert usual * math.exp(-1.51) < f < usual * math.exp(1.51)


def test_each_task_has_a_temperature_of_its_own() -> None:
    """One whose images are all right wants more, one whose images are all wrong wants less."""
    target = torch.eye(5).repeat(3, 1)
    logits = torch.stack([target, target.roll(1, dims=1), torch.zeros(15, 5)])
    sharp, flat, silent = task_temperatures(logits, target, 2.0).tolist()
    assert sharp > 2.5 and flat < 1.5 and silent == pytest.approx(2.0)


def test_calibration_error_of_known_cases() -> None:
    confidence = torch.tensor([0.9] * 10)
    assert calibration_error(confidence, torch.tensor([True] * 9 + [False])) == pytest.approx(0, abs=1e-4)
    assert calibration_error(confidence, torch.tensor([True] * 4 + [False] * 6)) == pytest.approx(50, abs=1e-4)
    assert calibration_error(torch.tensor([1.0, 0.0]), torch.tensor([True, False])) == pytest.approx(0, abs=1e-4)
    mixed = calibration_error(torch.tensor([0.9, 0.9, 0.3]), torch.tensor([True, False, True]))
    assert mixed == pytest.approx(100 * (2 * 0.4 + 0.7) / 3, abs=1e-3)


def test_bins_that_are_empty_are_left_out_and_the_others_have_all_images() -> None:
    bins = reliability(torch.tensor([0.05, 0.051, 0.97, 1.0]), torch.tensor([False, True, True, True]))
    assert [b["count"] for b in bins] == [2, 2]
    assert bins[0]["accuracy"] == 0.5 and bins[1]["confidence"] == pytest.approx(0.985)
