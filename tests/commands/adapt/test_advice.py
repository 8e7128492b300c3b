"""What `adapt` says of a support."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from metadiff_cli.commands.adapt.advice import HIGH, unlike_sentence
from tests.worlds import Page, Result, validate

CLI = Callable[..., Result]


def test_only_high_doubt_is_worth_a_sentence() -> None:
    assert unlike_sentence(None) == unlike_sentence(0.0) == unlike_sentence(HIGH - 0.01) == ""
    assert "unlike the classes that the model was made with" in unlike_sentence(HIGH)


def test_an_unusual_support_is_told_everywhere(
    cli: CLI, photos: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ["adapt", "-S", photos / "support", "-Q", photos / "query", "-c", checkpoint, "--json"]
    told = {}
    for doubt in (0.9, 0.1):
        monkeypatch.setattr("metadiff_cli.commands.adapt.build.doubt_about", lambda *_, d=doubt: torch.tensor([d]))
        result = cli(*common, "--report", photos / "r.html", "--save", photos / f"{doubt}.safetensors")
        assert validate(result, "metadiff.adapt/1")["doubt"] == pytest.approx(doubt)
        told[doubt] = ["are unlike the classes" in text for text in (result.err, Page(photos / "r.html").text)]
    assert told == {0.9: [True, True], 0.1: [False, False]}
    saved = ["adapt", "--classifier", photos / "0.9.safetensors", "-Q", photos / "query", "--json"]
    assert validate(cli(*saved), "metadiff.adapt/1")["doubt"] is None
