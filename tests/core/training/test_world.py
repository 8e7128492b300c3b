"""What the variables of torchrun say."""

import pytest

from metadiff_cli.console import Screen
from metadiff_cli.core.training.world import ALONE, World, alone, announced, enter, world
from metadiff_cli.errors import ConfigError

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a",
            "MASTER_PORT": "1"}  # fmt: skip


def test_a_process_alone_is_the_main_one() -> None:
    assert announced({}) == ALONE == world() and ALONE.main
    assert announced({"RANK": "1", "WORLD_SIZE": "4"}) == ALONE  # of some other tool: nobody to meet
    assert ALONE.launcher == "metadiff"


def test_the_variables_of_torchrun_are_read() -> None:
    found = announced(TORCHRUN)
    assert found == World(1, 4, 1, 2) and not found.main
    assert found.launcher == "torchrun --nnodes 2 ... --nproc-per-node 2 -m metadiff_cli"
    assert World(0, 2, 0, 2).launcher == "torchrun --nproc-per-node 2 -m metadiff_cli"


@pytest.mark.parametrize("wrong", [{"RANK": "4"}, {"RANK": "-1"}, {"WORLD_SIZE": "many"}, {"LOCAL_RANK": "x"}])
def test_variables_that_cannot_be_are_refused(wrong: dict[str, str]) -> None:
    with pytest.raises(ConfigError):
        announced({**TORCHRUN, **wrong})


def test_others_than_the_main_process_draw_nothing_but_errors(capsys: pytest.CaptureFixture[str]) -> None:
    enter(World(1, 2))
    try:
        screen = Screen(verbose=True)
        screen.text("result")
        screen.json({"a": 1})
        screen.table("title", ["a"], [["b"]])
        screen.note("note")
        screen.warn("warning")
        screen.detail("detail")
        with screen.progress("bar") as advance, screen.status("bar") as update:
            advance(1, 2)
            update(1, 2, "text")
        assert capsys.readouterr() == ("", "")
        screen.error("wrong", "right")
        assert capsys.readouterr().err == "error: wrong\n  try: right\n"
        with alone():
            assert world() == ALONE
        assert world() == World(1, 2)
    finally:
        enter(ALONE)
