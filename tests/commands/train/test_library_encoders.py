"""`--encoder torchvision:...` on the command line: from a weights file to a checkpoint that needs nothing else."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torchvision import models

from metadiff_cli.core.checkpoints import onnx as export
from tests.worlds import SMALL, Result, invoke

CLI = Callable[..., Result]
NAME = "torchvision:squeezenet1_1"
ANALYTIC = [*SMALL, "--set", "denoiser.kind=analytic", "--set", "features.size=64"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random ones."""
    path = tmp_path_factory.mktemp("weights") / "squeezenet.pth"
    torch.manual_seed(0)
    torch.save(models.squeezenet1_1(weights=None).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def run(weights: Path) -> Path:
    """The run directory of `metatrain` with them; the weights file is gone afterwards."""
    out, moved = weights.parent / "run", weights.rename(weights.with_name("moved.pth"))
    result = invoke("metatrain", "--preset", "glyphs-5w1s", *ANALYTIC, "--encoder", NAME, "--encoder-weights", moved,
                    "--out", out, "--json")  # fmt: skip
    assert result.code == 0, result.err
    assert "may have seen the classes" in result.err and f"come from {moved}" in result.err
    moved.unlink()
    return out


def test_the_checkpoint_holds_the_encoder(cli: CLI, run: Path, photos: Path) -> None:
    shown = json.loads(cli("inspect", run / "checkpoint.safetensors", "--json").out)
    assert shown["encoder"] == f"{NAME}.IMAGENET1K_V1"
    assert shown["image"]["size"] == 64 and shown["image"]["mean"] == [0.485, 0.456, 0.406]
    assert "may have seen the classes" in shown["card"]["encoder"]
    assert shown["card"]["summary"] == f"preset glyphs-5w1s with the encoder {NAME}.IMAGENET1K_V1"
    saved = photos / "mine.safetensors"
    adapted = cli("adapt", "-S", photos / "support", "-Q", photos / "query", "-c", run / "checkpoint.safetensors",
                  "--json", "--save", saved)  # fmt: skip
    assert adapted.code == 0, adapted.err
    again = cli("adapt", "--classifier", saved, "-Q", photos / "query", "--json")
    assert json.loads(again.out)["predictions"] == json.loads(adapted.out)["predictions"]
    pytest.importorskip("onnx", reason="the extra [onnx] is not installed")
    exported = cli("export", saved, "--onnx", photos / "mine.onnx", "--json")
    assert exported.code == 0, exported.err
    assert json.loads(exported.out)["difference"] <= export.TOLERANCE


def test_a_run_goes_on_without_the_weights(cli: CLI, run: Path) -> None:
    first = json.loads((run / "result.json").read_text())
    again = cli(
        "metatrain", "--preset", "glyphs-5w1s", *ANALYTIC, "--encoder", NAME, "--out", run, "--resume", "--json"
    )
    assert again.code == 0, again.err
    assert json.loads(again.out)["methods"] == first["methods"]


def test_a_plan_needs_no_weights(cli: CLI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = cli("metatrain", "--preset", "glyphs-5w1s", *ANALYTIC, "--encoder", NAME, "--dry-run", "--json")
    assert result.code == 0, result.err
    document = json.loads(result.out)
    assert document["encoder"] == {
        "name": f"{NAME}.IMAGENET1K_V1", "parameters": 722_496, "feature_size": 512, "kept": None,
    }  # fmt: skip
    assert "pretrain the encoder" not in [stage["stage"] for stage in document["stages"]]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["pretrain", "--encoder", NAME], "metatrain"),
        (["metatrain", "--encoder", NAME, "--method", "maml"], "comes trained"),
        (["metatrain", "--encoder-weights", "w.pth"], "torchvision:MODEL"),
        (["metatrain", "--encoder", "torchvison:resnet18"], "did you mean 'torchvision:'"),
        (["metatrain", "--encoder", "conv5"], "did you mean 'conv4'"),
        (["metatrain", "--encoder", "torchvision:resnet181"], "torchvision:resnet18"),
    ],
)
def test_what_makes_no_sense_is_refused(cli: CLI, arguments: list[str], told: str, tmp_path: Path) -> None:
    result = cli(*arguments, "--preset", "glyphs-5w1s", *SMALL, "--out", tmp_path / "run")
    assert result.code == 2 and told in result.err
    assert not (tmp_path / "run").exists()
