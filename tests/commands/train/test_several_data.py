"""`metatrain` on several data sets: what is taken of each, where the table comes from, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from jsonschema import Draft202012Validator

from metadiff_cli.commands.train import stages
from metadiff_cli.config.schema import Config
from metadiff_cli.core.checkpoints.file import read_header
from metadiff_cli.core.checkpoints.model import load_model
from metadiff_cli.core.method.denoisers import UNetDenoiser
from tests.worlds import CPU, SCHEMAS, Result, paint

CLI = Callable[..., Result]
FEW = [
    f"--set={setting}"
    for setting in (
        "metatrain.steps=2", "metatrain.batch=2", "metatrain.validate_every=1", "metatrain.validation_episodes=5",
        "metatrain.shots=[1,2]", "metatrain.query=2", "evaluation.episodes=5", "evaluation.query=3", "evaluation.way=3",
        "denoiser.width=16", "features.views=1",
    )
]  # fmt: skip


def folder(place: Path, *names: str, images: int = 6) -> Path:
    """Class folders of pictures; classes of one name look alike."""
    for name in names:
        rng = np.random.default_rng(sum(map(ord, name)))
        colour = tuple(int(value) for value in rng.integers(0, 255, 3))
        for i in range(images):
            paint(place / name / f"{i}.png", colour, seed=int(rng.integers(2**31)) + i, size=16)  # type: ignore[arg-type]
    return place


@pytest.fixture
def sets(tmp_path: Path) -> dict[str, Path]:
    """One without splits, one with splits, one with the name and classes of the first, two for validation."""
    splits = [f"{split}/{split}{c}" for split in ("train", "val", "test") for c in range(4)]
    return {
        "birds": folder(tmp_path / "birds", *(f"b{c}" for c in range(12))),
        "signs": folder(tmp_path / "signs", *splits),
        "again": folder(tmp_path / "other" / "birds", *(f"b{c}" for c in range(6))),
        "food": folder(tmp_path / "food", *(f"f{c}" for c in range(4))),
    }


@pytest.fixture
def train(small_run: Path, tmp_path: Path, cli: CLI) -> Callable[..., Result]:
    """`metatrain` with the encoder of a small run, into tmp_path / "run"."""

    def run(*arguments: str | Path) -> Result:
        return cli("metatrain", "--encoder", small_run / "encoder.safetensors", *FEW, "--out", tmp_path / "run",
                   *arguments)  # fmt: skip

    return run


def test_base_classes_are_the_training_classes_of_each(
    sets: dict[str, Path], train: Callable[..., Result], tmp_path: Path
) -> None:
    result = train("--data", sets["birds"], "--data", sets["signs"], "--json")
    assert result.code == 0, result.err
    header = read_header(tmp_path / "run" / "checkpoint.safetensors")
    kinds = [cls.split("/")[0] for cls in header["classes"]]
    assert kinds == ["birds"] * 8 + ["signs"] * 4 and "signs/train0" in header["classes"]
    document = json.loads(result.out)
    assert (document["name"], document["split"], document["classes"]) == ("birds", "test", 2)
    assert "measured on the test classes of birds" in result.err and "episodes are 2-way" in result.err
    assert header["card"]["data"] == "birds, signs: 12 base classes" and "test classes of birds" in str(header["card"])
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["data"] == str(sets["birds"]) and manifest["further_data"] == [str(sets["signs"])]


def test_validation_data_leave_all_classes_to_the_base(
    sets: dict[str, Path], train: Callable[..., Result], tmp_path: Path, cli: CLI
) -> None:
    """The table is the mean over the validation classes of all sets; two sets of one name are told apart."""
    data = ["--data", sets["birds"], "--data", sets["signs"], "--data", sets["again"], "--val-data", sets["food"]]
    result = train(*data, "--json")
    assert result.code == 0, result.err
    header = read_header(tmp_path / "run" / "checkpoint.safetensors")
    assert [sum(cls.startswith(f"{name}/") for cls in header["classes"]) for name in ("birds", "signs", "birds-2")] == [
        12, 4, 6,
    ]  # fmt: skip
    document = json.loads(result.out)
    assert [found["name"] for found in document["data"]] == ["signs", "food"]
    mean = np.mean([found["methods"]["metadiff"]["accuracy"] for found in document["data"]])
    assert document["mean"]["metadiff"]["accuracy"] == pytest.approx(mean, abs=1e-3)
    assert header["metrics"]["methods"] == document["mean"]
    assert "val classes of each of signs, food" in header["card"]["protocol"][0]
    assert cli("inspect", tmp_path / "run" / "checkpoint.safetensors").code == 0
    assert "signs" in train(*data, "--overwrite").out  # the table has a row for each


def test_one_data_set_with_validation_data_trains_its_encoder(sets: dict[str, Path], tmp_path: Path, cli: CLI) -> None:
    small = ["--set", "pretrain.epochs=1", "--set", "pretrain.batch=8", "--set", "data.size=16"]
    result = cli("metatrain", "--data", sets["birds"], "--val-data", sets["food"], *FEW, *small, "--out",
                 tmp_path / "run", "--json")  # fmt: skip
    assert result.code == 0, result.err
    header = read_header(tmp_path / "run" / "checkpoint.safetensors")
    assert len(header["classes"]) == 12 and header["classes"][0] == "b0"
    assert json.loads(result.out)["name"] == "food"


def test_the_plan_knows_all_sets(sets: dict[str, Path], train: Callable[..., Result], tmp_path: Path) -> None:
    data = ["--data", sets["birds"], "--data", sets["signs"], "--val-data", sets["food"], "--dry-run"]
    plan = json.loads(train(*data, "--json").out)
    Draft202012Validator(SCHEMAS["metadiff.plan/1"]).validate(plan)
    further = [(of["name"], {split: found["classes"] for split, found in of["splits"].items()})
               for of in plan["further_data"]]  # fmt: skip
    assert plan["data"]["splits"].keys() == {"train"} and plan["data"]["splits"]["train"]["classes"] == 12
    assert further == [("signs", {"train": 4, "val": 4, "test": 4}), ("food", {"val": 4})]
    assert str(sets["food"]) in train(*data).out.replace("\n", "") and not (tmp_path / "run").exists()


def test_a_kept_denoiser_is_loaded_with_the_frame_of_its_space(
    sets: dict[str, Path], train: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "paired_gain", lambda *_: (1.0, 0.1))
    data = ["--data", sets["birds"], "--data", sets["signs"]]
    assert train(*data).code == 0
    metadiff = load_model(tmp_path / "run" / "checkpoint.safetensors", CPU).metadiff
    assert metadiff.learned and metadiff.most_shots == 2
    assert isinstance(metadiff.denoiser, UNetDenoiser) and metadiff.denoiser.frame is not None
    assert metadiff.denoiser_for(3) is not metadiff.denoiser
    changed = train("--data", sets["birds"], "--data", sets["again"], "--resume")
    assert changed.code == 2 and "train: " in changed.err and "val: " in changed.err
    assert train(*data, "--resume").code == 0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--method", "anil-frozen"], "takes one --data"),
        (["--report", "page.html", "--val-data", "food"], "--report shows one data set"),
        (["--preset", "glyphs-5w1s"], "draws its images"),
    ],
)
def test_what_needs_one_data_set_is_refused(
    arguments: list[str], told: str, sets: dict[str, Path], train: Callable[..., Result], tmp_path: Path
) -> None:
    arguments = [str(sets.get(word, word)) for word in arguments]
    result = train("--data", sets["birds"], "--data", sets["signs"], *arguments)
    assert result.code == 2 and told in result.err, result.err
    assert not (tmp_path / "run").exists()


def test_several_data_need_a_trained_encoder(sets: dict[str, Path], cli: CLI, tmp_path: Path) -> None:
    for more in ([], ["--dry-run"]):
        result = cli("metatrain", "--data", sets["birds"], "--data", sets["signs"], "--out", tmp_path / "run", *more)
        assert result.code == 2 and "comes trained" in result.err and Config().encoder == "conv4"


def test_a_validation_set_without_validation_classes_is_named(
    sets: dict[str, Path], train: Callable[..., Result], tmp_path: Path
) -> None:
    half = folder(tmp_path / "half", "train/a", "train/b", "test/c", "test/d")
    result = train("--data", sets["birds"], "--val-data", half)
    assert result.code == 3 and "has no val classes" in result.err
