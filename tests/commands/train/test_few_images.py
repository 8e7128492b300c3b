"""Small and uneven folders: what they cannot fill is lowered or told before anything is trained."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from metadiff_cli.commands.train import few_images
from metadiff_cli.config.load import resolve
from metadiff_cli.config.schema import Config
from metadiff_cli.core.checkpoints.file import read_header
from metadiff_cli.core.training.metatrain import MetaTrainer
from metadiff_cli.core.training.pretrain import Pretrainer
from metadiff_cli.data.open import Source
from metadiff_cli.errors import DataError
from tests.worlds import Result, paint

CLI = Callable[..., Result]
FEW = [
    part
    for setting in (
        "data.size=16", "encoder=conv4", "pretrain.epochs=1", "pretrain.batch=4", "metatrain.steps=2",
        "metatrain.batch=2", "metatrain.validate_every=1", "metatrain.validation_episodes=5",
        "evaluation.episodes=5", "denoiser.width=16", "baselines.frozen.steps=2", "baselines.frozen.validate_every=1",
        "baselines.frozen.validation_episodes=5", "baselines.images.steps=1", "baselines.images.validation_episodes=2",
    )
    for part in ("--set", setting)
]  # fmt: skip


def folder(place: Path, counts: dict[str, int]) -> Path:
    """Pictures by class: "val/a": 3 are three of class a below val."""
    for c, (name, count) in enumerate(counts.items()):
        for i in range(count):
            paint(place / name / f"{i}.png", (37 * c % 255, (200 - 31 * c) % 255, 90), seed=100 * c + i, size=16)
    return place


def fit(config: Config, *stages: str, **splits: list[int]) -> tuple[Config, list[str]]:
    notes: list[str] = []
    named = {split: {f"{split}-{i}": count for i, count in enumerate(counts)} for split, counts in splits.items()}
    drawn = few_images.drawn_splits(named, several=False, validated=False)
    return few_images.fitted(config, named, stages, drawn, notes.append), notes


def test_enough_data_change_nothing() -> None:
    config = resolve("folder", environ={})
    for stages in (("pretrain", "metadiff"), ("pretrain",), ("pretrain", "anil-frozen")):
        assert fit(config, *stages, train=[30] * 20, val=[30] * 5, test=[30] * 5) == (config, [])


def test_ways_and_queries_follow_the_smallest_split_and_class() -> None:
    config = resolve("folder", environ={})  # 5-way, 5 + 10
    fitted, notes = fit(config, "metadiff", train=[30] * 9, val=[30, 12, 30], test=[30] * 4)
    assert (fitted.evaluation.way, fitted.evaluation.query) == (3, 7) and len(notes) == 2
    assert "3 val classes: episodes are 3-way, not 5-way" in notes[0]
    no_test, _ = fit(config, "metadiff", train=[30] * 9, val=[30] * 4)
    assert no_test.evaluation.way == 4
    alone, _ = fit(config, "metadiff", train=[30] * 2)
    assert alone.evaluation.way == 2
    baseline, notes = fit(config, "anil-frozen", train=[30] * 3, val=[30] * 5, test=[30] * 5)
    assert baseline.evaluation.way == 3 and "3 train classes" in notes[0]  # it is measured on the ways of its training


def test_meta_training_takes_what_base_classes_have() -> None:
    config = resolve("glyphs-5w1s", environ={})  # shots 1 to 5, 5 queries
    for images in range(3, 13):
        fitted, notes = fit(config, "metadiff", train=[images] * 9, val=[20] * 5, test=[20] * 5)
        m = fitted.metatrain
        assert m.shots[0] == 1 and 1 <= m.query <= 5 and m.shots[1] + m.query < images  # one is left for the target
        assert bool(notes) == (images < 11) == (m != config.metatrain)
    analytic = resolve("glyphs-5w1s", settings=["denoiser.kind=analytic"], environ={})
    assert fit(analytic, "metadiff", train=[1] * 9, val=[20] * 5, test=[20] * 5) == (analytic, [])


def test_small_base_classes_are_left_out_of_meta_training() -> None:
    config = resolve("glyphs-5w1s", environ={})
    fitted, notes = fit(config, "metadiff", train=[20] * 9 + [1, 10], val=[20] * 5, test=[20] * 5)
    assert fitted == config and notes == ["2 base classes with fewer than 11 images make no training tasks"]


@pytest.mark.parametrize(("kind", "train"), [("unet", [30] * 3), ("unet", [2] * 9), ("unet", [30, 30, 2, 2]),
                                             ("paper", [2, 2, 30])])  # fmt: skip
def test_without_base_classes_to_train_on_the_denoiser_is_the_analytic_one(kind: str, train: list[int]) -> None:
    config = resolve("glyphs-5w1s", settings=[f"denoiser.kind={kind}"], environ={})
    fitted, notes = fit(config, "metadiff", train=train, val=[20] * 5, test=[20] * 5)
    assert fitted.denoiser.kind == "analytic" and "the analytic one is taken" in notes[-1]


def test_several_data_sets_keep_their_episodes() -> None:
    """The validation classes of each have those that they can fill, so these do not lower the ones of the table."""
    assert few_images.drawn_splits({"train", "val", "test"}, several=True, validated=False) == ["test"]
    assert few_images.drawn_splits({"train", "val"}, several=True, validated=False) == ["val"]
    assert few_images.drawn_splits({"train", "val", "test"}, several=True, validated=True) == []


def test_shots_of_the_card_are_left_out_where_images_are_few() -> None:
    config = resolve("photos", environ={})  # 1-shot with 15 queries, and 5-shot for the card
    fitted, notes = fit(config, "metadiff", train=[30] * 9, val=[16] * 5, test=[16] * 5)
    assert fitted.evaluation.card_shots == () and fitted.evaluation.query == 15 and "card_shots" in notes[0]


@pytest.mark.parametrize(
    ("splits", "told"),
    [
        ({"train": [20] * 6, "val": [20, 5, 20], "test": [20] * 3}, "val class 'val-1' has 5 images"),
        ({"train": [20] * 6, "val": [20] * 3, "test": [1, 1, 20]}, r"test class 'test-0' \(and 1 more\) has 1 image,"),
    ],
)
def test_a_class_with_too_few_images_is_named(splits: dict[str, list[int]], told: str) -> None:
    with pytest.raises(DataError, match=told):
        fit(resolve("folder", environ={}), "metadiff", **splits)


def test_pairs_need_classes_of_two_images() -> None:
    config = resolve("omniglot-20w1s", environ={})
    with pytest.raises(DataError, match="128 classes with two images; there are 24"):
        fit(config, "pretrain", train=[20] * 6 + [1] * 50)


@pytest.mark.parametrize("method", ["metadiff", "anil-frozen", "anil"])
def test_six_classes_of_twelve_images_go_from_end_to_end(method: str, tmp_path: Path, cli: CLI) -> None:
    data = folder(tmp_path / "photos", {f"c{i}": 12 for i in range(6)})
    command = ["metatrain", "--preset", "folder", "--data", data, "--method", method, *FEW, "--threads", "1",
               "--out", tmp_path / "run"]  # fmt: skip
    result = cli(*command, "--json")
    assert result.code == 0, result.err
    assert "2 / 2 / 2" in result.err and "classes: episodes are 2-way" in result.err
    document = json.loads(result.out)
    assert (document["way"], document["shot"], document["query"]) == (2, 5, 7)
    header = read_header(tmp_path / "run" / "checkpoint.safetensors")
    assert header["config"]["evaluation"]["way"] == 2  # what was measured, not what was asked for
    again = cli(*command, "--resume")
    assert again.code == 0 and ("going on after step" in again.err) == (method != "metadiff")
    if method == "metadiff":
        adapted = cli("adapt", "-S", data, "-Q", data / "c0", "-c", tmp_path / "run" / "checkpoint.safetensors")
        assert adapted.code == 0, adapted.err


@pytest.mark.parametrize("images", [2, 3, 5])
def test_tiny_classes_and_splits_of_one_class(images: int, tmp_path: Path, cli: CLI) -> None:
    counts = {"train/a": images, "train/b": images, "train/c": images, "val/d": images, "test/e": images}
    data = folder(tmp_path / "data", counts)
    result = cli("metatrain", "--preset", "folder", "--data", data, *FEW, "--set", "evaluation.shot=1",
                 "--threads", "1", "--out", tmp_path / "run", "--json")  # fmt: skip
    assert result.code == 0, result.err
    assert "1 val class, and an episode needs two" in result.err and "1 test class" in result.err
    assert "nothing is selected" in result.err
    document = json.loads(result.out)
    assert document["split"] == "train" and document["way"] == 3 and document["query"] == images - 1


@pytest.mark.parametrize(
    ("command", "counts", "told"),
    [
        (
            "metatrain",
            {"train/a": 9, "train/b": 9, "val/c": 9, "val/d": 1, "test/e": 9, "test/f": 9},
            "val class 'd' has 1 image",
        ),
        *((command, {"train/a": 9, "val/c": 9, "val/d": 9}, "1 base class") for command in ("pretrain", "metatrain")),
        *((command, {"a": 9, "b": 9, "c": 9}, "no train classes") for command in ("pretrain", "metatrain")),
    ],
)
def test_what_cannot_be_measured_is_told_before_training(
    command: str, counts: dict[str, int], told: str, tmp_path: Path, cli: CLI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan tells it in the same words."""
    for trainer in (Pretrainer, MetaTrainer):
        monkeypatch.setattr(trainer, "_train_step", lambda *_: pytest.fail("it trains"))
    data = folder(tmp_path / "data", counts)
    for more in ([], ["--dry-run"]):
        failed = cli(command, "--preset", "folder", "--data", data, *FEW, "--out", tmp_path / "run", *more)
        assert failed.code == 3 and told in failed.err, failed.err


def test_images_are_read_at_the_sizes_that_are_needed(
    tmp_path: Path, cli: CLI, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, decode = [], Source._decode
    monkeypatch.setattr(Source, "_decode", lambda *given: read.append((given[1].name, given[2])) or decode(*given))
    data = folder(tmp_path / "data", {f"{split}/{split}-{c}": 6 for split in ("train", "val", "test") for c in "abc"})
    common = ["--preset", "folder", "--data", data, *FEW, "--set", "features.size=20", "--set", "evaluation.shot=1"]
    assert cli("pretrain", *common, "--out", tmp_path / "encoder").code == 0
    assert read == [("train", 16), ("val", 16)]
    read.clear()
    assert cli("metatrain", *common, "--out", tmp_path / "run").code == 0
    assert sorted(read) == [("test", 20), ("train", 16), ("train", 20), ("val", 16), ("val", 20)]


@pytest.mark.parametrize("preset", ["omniglot-5w1s", "omniglot-20w1s"])
def test_a_plan_for_pairs_needs_no_sample(preset: str, tmp_path: Path, cli: CLI) -> None:
    data = folder(tmp_path / "data", {f"c{i}": 3 for i in range(20)})
    common = ["--preset", preset, "--data", data, "--set", "data.layout=folder", "--dry-run", "--json"]
    for command in ("pretrain", "metatrain"):
        planned = cli(command, *common, "--set", "pretrain.batch=24")
        assert planned.code == 0, planned.err
        assert json.loads(planned.out)["stages"]
    refused = cli("pretrain", *common)  # few base classes and their turns make no batch of 128 pairs
    assert refused.code == 3 and "128 classes with two images; there are" in refused.err
