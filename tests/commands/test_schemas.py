"""The published JSON schemas, against what the commands really print."""

from collections.abc import Callable
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator, ValidationError

from tests.worlds import SCHEMAS, SMALL, Result, paint, validate

CLI = Callable[..., Result]


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_schema_is_one_and_refuses_an_empty_document(name: str) -> None:
    Draft202012Validator.check_schema(SCHEMAS[name])
    assert SCHEMAS[name]["properties"]["schema"] == {"const": name}
    with pytest.raises(ValidationError):
        Draft202012Validator(SCHEMAS[name]).validate({"schema": name})


def test_a_result_is_of_one_data_set_or_of_several() -> None:
    schema = Draft202012Validator(SCHEMAS["metadiff.evaluate/1"])
    common = {"schema": "metadiff.evaluate/1", "way": 5, "shot": 1, "query": 15, "episodes": 9, "seed": 0}
    rows = {"metadiff": {"accuracy": 60.0, "ci95": 1.0, "ece": None}}
    one = {**common, "protocol": "inductive", "split": "test", "methods": rows, "episodes_per_second": 1.0}
    several = {**common, "protocol": "inductive", "mean": rows, "data": [{**one, "name": "a"}, {**one, "name": "b"}]}
    for valid in (one, several):
        schema.validate(valid)
    unnamed = {**several, "data": [one, one]}
    nested = {**several, "data": [{**several, "name": "a"}] * 2}
    for invalid in ({**several, "methods": rows, "split": "test", "episodes_per_second": 1.0}, unnamed, nested,
                    {**common, "protocol": "inductive"}, {**several, "data": [{**one, "name": "a"}]}):  # fmt: skip
        with pytest.raises(ValidationError):
            schema.validate(invalid)


def test_documents_about_the_machine(cli: CLI) -> None:
    validate(cli("presets", "list", "--json"), "metadiff.presets/1")
    validate(cli("doctor", "--json"), "metadiff.doctor/1")
    validate(cli("cache", "list", "--json"), "metadiff.cache/1")
    validate(cli("config", "show", "--preset", "glyphs-5w1s", "--json"), "metadiff.config/1")


def test_documents_about_data(cli: CLI, tmp_path: Path) -> None:
    from metadiff_cli.data.benchmarks import split_lists

    validate(cli("data", "list", "--json"), "metadiff.data-list/1")
    for i, name in enumerate(split_lists("cub")["test"][:2]):
        paint(tmp_path / "root" / "cub" / "images" / name / "1.png", (9, 9, 200), seed=i)
    prepared = cli("data", "prepare", "cub", "--root", tmp_path / "root", "--json")
    validate(prepared, "metadiff.data-prepare/1")
    folder = tmp_path / "root" / "cub" / "images"
    (folder / split_lists("cub")["test"][0] / "2.png").write_bytes(b"x")
    validate(cli("data", "verify", folder, "--json"), "metadiff.data-verify/1", code=3)


def test_documents_of_a_run(cli: CLI, small_run: Path, checkpoint: Path, photos: Path) -> None:
    validate(Result(0, (small_run / "result.json").read_text(), ""), "metadiff.evaluate/1")
    evaluated = cli("evaluate", "-c", checkpoint, "--episodes", "5", "--query", "3", "--imbalance", "2", "--json")
    validate(evaluated, "metadiff.evaluate/1")
    for name in ("checkpoint", "encoder", "state", "encoder-state"):
        if (small_run / f"{name}.safetensors").is_file():
            validate(cli("inspect", small_run / f"{name}.safetensors", "--json"), "metadiff.inspect/1")
    for name, kind in {"result.json": "result", "manifest.json": "manifest"}.items():
        validate(cli("inspect", small_run / name, "--json"), "metadiff.inspect/1")
        shown = cli("inspect", small_run / name)
        assert shown.out.startswith(f"kind: {kind}\n"), shown.err
    adapted = cli("adapt", "-S", photos / "support", "-Q", photos / "query", "-c", checkpoint, "--json",
                  "--reject-below", "0.9", "--save", photos / "mine.safetensors")  # fmt: skip
    validate(adapted, "metadiff.adapt/1")
    again = cli("adapt", "--classifier", photos / "mine.safetensors", "-Q", photos / "query", "--json")
    validate(again, "metadiff.adapt/1")
    validate(cli("inspect", photos / "mine.safetensors", "--json"), "metadiff.inspect/1")


def test_a_plan_writes_nothing(cli: CLI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plans = {
        command: validate(cli(command, "--preset", "glyphs-5w1s", *SMALL, "--dry-run", "--json"), "metadiff.plan/1")
        for command in ("pretrain", "metatrain")
    }
    assert list(tmp_path.iterdir()) == []
    stages = {stage["stage"]: stage for stage in plans["metatrain"]["stages"]}
    assert plans["pretrain"]["data"]["splits"]["train"]["classes"] == 12
    assert plans["pretrain"]["encoder"]["parameters"] == 112_832  # of conv4: 4 blocks of 64 channels
    assert stages["meta-train the denoiser"]["amount"] == 6 and plans["metatrain"]["denoiser"]["parameters"] > 0
    assert [s["stage"] for s in plans["pretrain"]["stages"] if s["stage"] != "read images"] == ["pretrain the encoder"]
    assert plans["pretrain"]["stages"][-1]["amount"] == 2 * (12 * 12 // 16)
    assert abs(plans["metatrain"]["seconds"] - sum(s["seconds"] for s in stages.values())) < 1


def test_a_plan_knows_the_encoder_that_is_kept(cli: CLI, small_run: Path) -> None:
    plan = validate(cli("metatrain", "--preset", "glyphs-5w1s", *SMALL, "--dry-run", "--json"), "metadiff.plan/1")
    assert plan["encoder"]["kept"] and "pretrain the encoder" not in [stage["stage"] for stage in plan["stages"]]
    assert all(split["decoded"] for split in plan["data"]["splits"].values())
    shown = cli("metatrain", "--preset", "glyphs-5w1s", *SMALL, "--dry-run")
    assert shown.code == 0 and "in all, about" in shown.out and "nothing was written" in shown.out


def test_all_that_adapt_can_say(cli: CLI, checkpoint: Path, photos: Path) -> None:
    """Labels, rejected images, a picture that is in the support too, sorting, a pool, an error."""
    support = photos / "support"
    (support / "red" / "broken.png").write_bytes(b"x")
    adapted = cli(
        "adapt", "-S", support, "-Q", support, "-c", checkpoint, "--labelled", "--sort-into", photos / "out",
        "--unlabeled", photos / "query", "--reject-below", "0.3", "--json",
    )  # fmt: skip
    document = validate(adapted, "metadiff.adapt/1")
    optional = {"support_check", "unlabelled", "labelled", "protocol"}
    assert optional <= set(document) and all({"truth", "twin", "sorted_to"} <= set(p) for p in document["predictions"])
    assert set(document) <= set(SCHEMAS["metadiff.adapt/1"]["properties"])
