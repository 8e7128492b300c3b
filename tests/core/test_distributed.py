"""Processes that share work give what one process gives; what the variables of torchrun say."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from metadiff_cli.core.distributed import SINGLE, Group, announced, is_lost, joined
from metadiff_cli.errors import ConfigError
from tests.processes import begin, end

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a",
            "MASTER_PORT": "1"}  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes found in `shared_work.py`."""
    script = Path(__file__).parent / "shared_work.py"
    found = end(begin([script, tmp_path_factory.mktemp("shared")]))
    assert all(code == 0 for code, _, _ in found), found
    return [json.loads(out) for _, out, _ in found]


def test_rank_zero_decides_and_its_errors_are_those_of_all(results: list[dict[str, Any]]) -> None:
    assert [r["rank"] for r in results] == [0, 1]
    for found in results:
        assert found["broadcast"] == "of 0" and found["max"] == 1
        assert found["failing"] == "ConfigError: no such thing: try another"
    assert [r["rank_zero_first"] for r in results] == [False, True]
    assert sorted(r["tells"] for r in results) == [False, True]


def test_other_images_on_another_machine_are_refused(results: list[dict[str, Any]]) -> None:
    assert all("the images" in r["unlike"] and "rank 1" in r["unlike"] for r in results)


def test_what_cannot_be_shared_is_refused(results: list[dict[str, Any]]) -> None:
    assert all(r["too_few"].startswith("ConfigError: batch is 1") for r in results)
    assert all("pairs in equal parts" in r["odd_pairs"] for r in results)


@pytest.mark.parametrize("work", ["classes", "rotation", "pairs", "unet", "paper", "inner"])
def test_training_takes_the_steps_of_one_process(results: list[dict[str, Any]], work: str) -> None:
    assert all(r[work] < 1e-4 for r in results), [r[work] for r in results]


def test_the_feature_bank_is_the_same_to_the_bit(results: list[Mapping[str, Any]]) -> None:
    assert [r["bank"] for r in results] == [0, 0]


def test_a_group_of_one_does_nothing() -> None:
    assert SINGLE.shard([1, 2, 3]) == [1, 2, 3]
    assert SINGLE.slice_of(3, "batch") == slice(0, 3) and SINGLE.weight_of(slice(0, 3), 3) == 1
    values = torch.tensor([1.0, 2.0])
    assert SINGLE.mean_(values) is values and SINGLE.all_gather(values)[0] is values
    assert SINGLE.on_rank_zero(lambda: 7) == SINGLE.rank_zero_first(lambda: 7) == SINGLE.broadcast(7) == 7
    loss = torch.nn.Linear(2, 1)
    assert SINGLE.data_parallel(loss, loss) is loss
    assert SINGLE.max(3) == 3
    SINGLE.barrier()
    SINGLE.check_equal("a", "the images")
    with joined({}) as group:
        assert group is SINGLE


def test_a_lost_process_is_told_from_other_errors() -> None:
    assert is_lost(RuntimeError("Connection closed by peer"))
    assert not is_lost(RuntimeError("mat1 and mat2 shapes")) and not is_lost(OSError("socket"))


@pytest.mark.parametrize(("count", "size"), [(5, 2), (7, 3), (3, 3), (100, 8)])
def test_slices_cover_everything_and_weigh_what_they_hold(count: int, size: int) -> None:
    groups = [Group(rank, size) for rank in range(size)]
    parts = [group.slice_of(count, "batch") for group in groups]
    assert [i for part in parts for i in range(count)[part]] == list(range(count))
    weights = [group.weight_of(part, count) for group, part in zip(groups, parts, strict=True)]
    assert sum(weights) == pytest.approx(size)
    assert sorted(i for group in groups for i in group.shard(range(count))) == list(range(count))
    with pytest.raises(ConfigError, match=f"batch is {size - 1}, which {size} processes"):
        groups[0].slice_of(size - 1, "batch")


def test_the_variables_of_torchrun_are_read() -> None:
    assert announced(TORCHRUN) == Group(1, 4, 1, 2)
    assert announced({}) == announced({"RANK": "1", "WORLD_SIZE": "4"}) == SINGLE  # of another tool: nobody to meet


@pytest.mark.parametrize("wrong", [{"RANK": "4"}, {"RANK": "-1"}, {"WORLD_SIZE": "many"}, {"LOCAL_RANK": "x"}])
def test_variables_that_make_no_sense_are_refused(wrong: dict[str, str]) -> None:
    with pytest.raises(ConfigError):
        announced({**TORCHRUN, **wrong})
