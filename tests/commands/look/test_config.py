"""`metadiff config show`, and completion of names."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from metadiff_cli.commands import completions
from metadiff_cli.config.load import preset_names, resolve
from tests.worlds import Result

CLI = Callable[..., Result]


def test_the_output_is_a_configuration(cli: CLI, tmp_path: Path) -> None:
    shown = cli("config", "show", "--preset", "mini-5w5s", "--set", "pretrain.epochs=3")
    assert shown.code == 0, shown.err
    (tmp_path / "own.yaml").write_text(shown.out)
    wanted = resolve("mini-5w5s", settings=["pretrain.epochs=3"])
    assert resolve(file=tmp_path / "own.yaml") == wanted


def test_every_value_has_its_origin(cli: CLI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own.yaml").write_text("pretrain: {lr: 0.2, epochs: 2, augment: {jitter: 0.1}}\n")
    monkeypatch.setenv("METADIFF_PRETRAIN__EPOCHS", "3")
    monkeypatch.setenv("METADIFF_SEED", "5")
    given = ["--preset", "glyphs-5w1s", "--config", str(tmp_path / "own.yaml"), "--set", "seed=6"]
    document = json.loads(cli("config", "show", *given, "--json").out)
    origin = document["origin"]
    assert origin["pretrain.batch"] == "preset glyphs-5w1s"
    assert origin["pretrain.lr"] == origin["pretrain.augment.jitter"] == f"--config {tmp_path / 'own.yaml'}"
    assert origin["pretrain.epochs"] == "$METADIFF_PRETRAIN__EPOCHS"
    assert origin["seed"] == "--set" and document["config"]["seed"] == 6
    assert origin["metatrain.lr"] == "default" and origin["pretrain.augment.crop"] == "preset glyphs-5w1s"
    table = cli("config", "show", *given, "--origin")
    assert table.code == 0 and "$METADIFF_PRETRAIN__EPOCHS" in table.out


def test_problems_are_told(cli: CLI) -> None:
    result = cli("config", "show", "--set", "pretrain.epoch=3")
    assert result.code == 2 and "did you mean 'pretrain.epochs'" in result.err


def test_the_folder_preset_can_be_copied_and_used(cli: CLI, tmp_path: Path) -> None:
    copy = tmp_path / "my.yaml"
    result = cli("presets", "copy", "folder", copy)
    assert result.code == 0 and f"--config {copy}" in result.err
    assert yaml.safe_load(copy.read_text())["kind"] == "own"
    assert cli("config", "show", "--config", copy).code == 0


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


def test_completion_knows_the_controls() -> None:
    from metadiff_cli.commands.evaluate.measure import CONTROLS

    assert completions.CONTROLS == CONTROLS
