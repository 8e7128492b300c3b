"""Work that processes share gives what one process gives."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from metadiff_cli.core.training import distributed as parallel
from metadiff_cli.core.training.world import ALONE, World, enter
from metadiff_cli.errors import ConfigError
from tests.processes import begin, end


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes found in `shared_work.py`."""
    script = Path(__file__).parent / "shared_work.py"
    found = end(begin([script, tmp_path_factory.mktemp("shared")]))
    assert all(code == 0 for code, _, _ in found), found
    return [json.loads(out) for _, out, _ in found]


def test_what_is_dealt_out_comes_back_in_order(results: list[dict[str, Any]]) -> None:
    assert [r["rank"] for r in results] == [0, 1]
    assert all(all(r["order"]) for r in results)


def test_the_main_process_decides_and_its_errors_are_those_of_all(results: list[dict[str, Any]]) -> None:
    for found in results:
        assert found["same"] == "of 0" and found["main"] == [0, 1]  # alone while the others wait
        assert found["failing"] == "ConfigError: no such thing: try another"
        assert found["largest"] == 1
    assert [r["main_first"] for r in results] == [False, True]
    assert sorted(r["speaks"] for r in results) == [False, True]


def test_other_images_on_another_machine_are_refused(results: list[dict[str, Any]]) -> None:
    assert all("the images" in r["unlike"] and "process 1" in r["unlike"] for r in results)


def test_what_cannot_be_shared_is_refused(results: list[dict[str, Any]]) -> None:
    assert all(r["too_few"].startswith("ConfigError: batch is 1") for r in results)
    assert all("pairs in equal parts" in r["odd_pairs"] for r in results)


@pytest.mark.parametrize("work", ["classes", "rotation", "pairs", "unet", "paper", "inner"])
def test_training_takes_the_steps_of_one_process(results: list[dict[str, Any]], work: str) -> None:
    assert all(r[work] < 1e-4 for r in results), [r[work] for r in results]


def test_the_feature_bank_is_the_same_to_the_bit(results: list[Mapping[str, Any]]) -> None:
    assert [r["bank"] for r in results] == [0, 0]


def test_alone_nothing_happens() -> None:
    assert parallel.mine([1, 2, 3]) == [1, 2, 3] == parallel.gather_in_order([1, 2, 3])
    assert parallel.part_of(3, "batch") == slice(0, 3) and parallel.weight_of(slice(0, 3), 3) == 1
    values = torch.tensor([1.0, 2.0])
    assert parallel.mean_of(values) is values and parallel.all_rows(values)[0] is values
    assert parallel.on_main(lambda: 7) == parallel.main_first(lambda: 7) == parallel.same(7) == 7
    loss = torch.nn.Linear(2, 1)
    assert parallel.synchronised(loss, loss) is loss
    assert parallel.speaks() and not parallel.lost(RuntimeError("Connection closed by peer"))
    parallel.barrier()
    parallel.stop()


@pytest.mark.parametrize(("count", "size"), [(5, 2), (7, 3), (3, 3), (100, 8)])
def test_parts_cover_everything_and_weigh_what_they_hold(count: int, size: int) -> None:
    parts, weights = [], []
    try:
        for rank in range(size):
            enter(World(rank, size))
            parts.append(parallel.part_of(count, "batch"))
            weights.append(parallel.weight_of(parts[-1], count))
        with pytest.raises(ConfigError, match=f"batch is {size - 1}, which {size} processes"):
            parallel.part_of(size - 1, "batch")
    finally:
        enter(ALONE)
    assert [i for part in parts for i in range(count)[part]] == list(range(count))
    assert sum(weights) == pytest.approx(size)
