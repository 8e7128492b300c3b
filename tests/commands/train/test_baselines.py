"""Baselines end to end: trained by metatrain, evaluated by themselves and as controls, resumed, refused where they do
not fit."""

import json
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from metadiff_cli.commands.completions import METHODS as ALL
from metadiff_cli.core.baselines.train import InnerTrainer
from metadiff_cli.core.checkpoints.file import read_header
from tests.worlds import SMALL, Result, invoke

CLI = Callable[..., Result]
METHODS = ALL[1:]  # the first is metadiff
FEW = [
    f"--set=baselines.{part}.{key}"
    for part in ("frozen", "images")
    for key in ("steps=4", "validate_every=2", "validation_episodes=5", "query=3")
] + ["--set=baselines.images.inner_steps=2", "--set=baselines.images.test_steps=3"]
EPISODES = ["--episodes", "6", "--query", "3", "--json"]


def train(method: str, out: Path, encoder: Path | None = None, *more: str) -> Result:
    given = ["--encoder", encoder] if encoder else []
    return invoke("metatrain", "--preset", "glyphs-5w1s", "--method", method, "--out", out, "--json", *given,
                  *SMALL, *FEW, "--set", "evaluation.episodes=4", *more)  # fmt: skip


def validate(document: dict[str, Any], name: str) -> None:
    schema = json.loads((files("metadiff_cli.schemas") / f"{name}.json").read_text())
    Draft202012Validator(schema).validate(document)


@pytest.fixture(scope="module")
def trained(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each baseline."""
    folder = tmp_path_factory.mktemp("methods")
    for method in METHODS:
        encoder = small_run / "encoder.safetensors" if method.endswith("frozen") else None
        result = train(method, folder / method, encoder)
        assert result.code == 0, result.err
    return {method: folder / method / "checkpoint.safetensors" for method in METHODS}


@pytest.mark.parametrize("method", METHODS)
def test_a_baseline_is_saved_and_evaluated_under_its_name(method: str, trained: dict[str, Path], cli: CLI) -> None:
    header = json.loads(cli("inspect", trained[method], "--json").out)
    validate(header, "inspect-1")
    assert header["kind"] == "baseline" and header["baseline"]["name"] == method and header["baseline"]["way"] == 5
    final = json.loads((trained[method].parent / "result.json").read_text())
    again = cli("evaluate", "-c", trained[method], "--controls", "", "--episodes", "4", "--query", "5", "--json")
    assert again.code == 0, again.err
    document = json.loads(again.out)
    validate(document, "evaluate-1")
    ours = {key: document["methods"][method][key] for key in ("accuracy", "ci95", "ece")}
    assert list(document["methods"]) == [method]
    assert ours == {key: final["methods"][method][key] for key in ours}
    assert document["methods"][method].get("statistics") == (None if method.endswith("frozen") else "queries")


def test_frozen_baselines_stand_beside_controls_of_their_features(trained: dict[str, Path], cli: CLI) -> None:
    result = cli("evaluate", "-c", trained["anil-frozen"], "--controls", "prototype,analytic,logreg,ridge", *EPISODES)
    assert result.code == 0, result.err
    methods = json.loads(result.out)["methods"]
    assert list(methods) == ["anil-frozen", "prototype", "analytic", "logreg", "ridge"]
    assert "paired_to_prototype" in methods["anil-frozen"]


def test_checkpoints_are_controls_of_a_model(trained: dict[str, Path], checkpoint: Path, cli: CLI) -> None:
    files = [trained["anil-frozen"], trained["anil"], trained["anil"], checkpoint]
    controls = ",".join(["prototype", "logreg", *map(str, files)])
    result = cli("evaluate", "-c", checkpoint, "--controls", controls, *EPISODES)
    assert result.code == 0, result.err
    methods = json.loads(result.out)["methods"]
    kind = read_header(checkpoint)["denoiser"]["kind"]
    expected = ["metadiff", "prototype", "logreg", "anil-frozen", "anil", "anil-2", f"metadiff-{kind}"]
    assert list(methods) == expected
    assert methods["anil"] == methods["anil-2"] and methods[f"metadiff-{kind}"] == methods["metadiff"]
    alone = json.loads(cli("evaluate", "-c", trained["anil"], "--controls", "", *EPISODES).out)["methods"]["anil"]
    assert {key: methods["anil"][key] for key in alone} == alone


def test_the_table_says_whose_statistics_are_used(trained: dict[str, Path], cli: CLI) -> None:
    result = cli("evaluate", "-c", trained["maml"], "--episodes", "2", "--query", "3")
    assert result.code == 0 and "maml (statistics of all queries)" in result.out
    assert "prototype, analytic, logreg need the features" in result.err


def test_training_resumes_from_its_state(trained: dict[str, Path], tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    original = InnerTrainer._train_step

    def step(self: InnerTrainer) -> object:
        if self.step == 3:
            raise Stop
        return original(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InnerTrainer, "_train_step", step)
        assert train("fomaml", tmp_path / "run").code == 1
    resumed = train("fomaml", tmp_path / "run", None, "--resume")
    assert resumed.code == 0 and "going on after step 2" in resumed.err
    assert (tmp_path / "run" / "checkpoint.safetensors").read_bytes() == trained["fomaml"].read_bytes()
    other = train("anil", tmp_path / "run", None, "--resume")
    assert other.code == 2 and "other settings" in other.err and "anil" in other.err


def test_what_does_not_fit_is_refused(
    trained: dict[str, Path], small_run: Path, photos: Path, tmp_path: Path, cli: CLI
) -> None:
    ways = cli("evaluate", "-c", trained["anil-frozen"], "--way", "3", *EPISODES)
    assert ways.code == 2 and "--way 5" in ways.err
    adapt = cli("adapt", "--support", photos / "support", "--query", photos / "query", "-c", trained["maml"])
    assert adapt.code == 4 and "trained baseline" in adapt.err
    given = cli("metatrain", "--preset", "glyphs-5w1s", "--method", "maml", "--out", tmp_path / "run",
                "--encoder", small_run / "encoder.safetensors", *SMALL)  # fmt: skip
    assert given.code == 2 and "encoder of its own" in given.err
    taken = cli("metatrain", "--preset", "glyphs-5w1s", "--out", tmp_path / "b", "--encoder", trained["maml"], *SMALL)
    assert taken.code == 4 and "no encoder" in taken.err
    unknown = cli("evaluate", "-c", trained["anil"], "--controls", "logistic")
    assert unknown.code == 2 and "logreg" in unknown.err
    halves = cli("evaluate", "-c", trained["anil"], "--halves")
    assert halves.code == 2 and "--halves" in halves.err
    planned = cli("metatrain", "--preset", "glyphs-5w1s", "--method", "maml", "--dry-run")
    assert planned.code == 2 and "--dry-run" in planned.err
    compared = cli("evaluate", "-c", trained["anil"], "--query", "5", "--compare", small_run / "result.json")
    assert compared.code == 2 and "--compare" in compared.err


def test_a_damaged_baseline_is_named(trained: dict[str, Path], tmp_path: Path, cli: CLI) -> None:
    from metadiff_cli.core.checkpoints.file import load_checkpoint, save_checkpoint

    kept = load_checkpoint(trained["anil"])
    broken = tmp_path / "broken.safetensors"
    header = {key: value for key, value in kept.header.items() if key != "kind"}
    save_checkpoint(broken, "baseline", {"inner.head.bias": kept.tensors["inner.head.bias"]}, header)
    result = cli("evaluate", "-c", broken, *EPISODES)
    assert result.code == 4 and str(broken) in result.err
