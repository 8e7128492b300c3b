"""Completion of names in the shell, and the lists of names against what they repeat."""

from metadiff_cli.commands import completions
from metadiff_cli.commands.look.cache import KINDS
from metadiff_cli.config import schema
from metadiff_cli.config.load import preset_names
from metadiff_cli.core.encoders import networks
from metadiff_cli.data.folders import SPLITS


def test_completion_of_names() -> None:
    assert [name for name, _ in completions.presets("mini-5w1")] == ["mini-5w1s", "mini-5w1s-resnet12"]
    every = dict(completions.presets(""))
    assert list(every) == preset_names() and all(every.values())
    assert [name for name, _ in completions.data("c")] == ["cifar-fs", "cub"]
    assert completions.splits("t") == ["train", "test"] and completions.cache_kinds("f") == ["features"]
    assert completions.encoders("t") == ["torchvision:", "timm:"]
    assert completions.controls("pro") == ["prototype"]
    assert completions.controls("prototype,an") == ["prototype,analytic"]
    assert "prototype,prototype" not in completions.controls("prototype,")


def test_the_lists_repeat_what_is_defined_elsewhere() -> None:
    assert completions.ENCODERS == schema.ENCODERS == tuple(networks.ENCODERS)
    assert tuple(KINDS) == completions.CACHE_KINDS
    assert (*SPLITS, "all") == completions.SPLITS
