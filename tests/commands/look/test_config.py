"""`metadiff config show`."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from metadiff_cli.config.load import resolve
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
