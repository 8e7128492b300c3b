"""pretrain, metatrain, evaluate and inspect end to end, on a few generated glyphs."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from metadiff_cli.app import app
from metadiff_cli.core.checkpoints.file import read_header
from tests.worlds import SMALL, Result, invoke, paint

CLI = Callable[..., Result]


def test_a_run_directory_holds_what_the_design_says(small_run: Path) -> None:
    names = {path.name for path in small_run.iterdir()}
    assert {"encoder.safetensors", "checkpoint.safetensors", "config.yaml", "metrics.csv", "manifest.json",
            "result.json"} <= names  # fmt: skip
    rows = list(csv.DictReader((small_run / "metrics.csv").read_text().splitlines()))
    assert [row["step"] for row in rows] == ["3", "6"]
    epochs = list(csv.DictReader((small_run / "pretrain-metrics.csv").read_text().splitlines()))
    assert [row["epoch"] for row in epochs] == ["1", "2"]  # of the encoder that had to be trained first
    manifest = json.loads((small_run / "manifest.json").read_text())
    assert manifest["versions"]["torch"] and manifest["seconds"] > 0


def test_the_configuration_of_a_run_can_be_given_back(small_run: Path, cli: CLI, tmp_path: Path) -> None:
    values = yaml.safe_load((small_run / "config.yaml").read_text())
    assert values["pretrain"]["epochs"] == 2
    result = cli("metatrain", "--config", small_run / "config.yaml", "--out", tmp_path / "again", "--json")
    assert result.code == 0, result.err
    again = (tmp_path / "again" / "checkpoint.safetensors").read_bytes()
    assert again == (small_run / "checkpoint.safetensors").read_bytes()  # same settings, same bytes


def test_neither_workers_nor_an_empty_cache_change_a_byte(
    tmp_path: Path, cli: CLI, monkeypatch: pytest.MonkeyPatch
) -> None:
    for c in range(24):
        for i in range(8):
            paint(tmp_path / "data" / f"{c:02d}" / f"{i}.png", (10 * c, 120, 250 - 10 * c), seed=100 * c + i, size=20)
    found = []
    for workers in ("1", "4"):
        monkeypatch.setenv("METADIFF_CACHE_DIR", str(tmp_path / f"cache{workers}"))
        out = tmp_path / workers
        result = cli("metatrain", "--data", tmp_path / "data", "--out", out, "--num-workers", workers, "--json",
                     "--set", "data.size=16", "--set", "metatrain.ways=[3,4]", "--set", "metatrain.shots=[1,2]",
                     "--set", "metatrain.query=3", "--set", "evaluation.way=3", *SMALL)  # fmt: skip
        assert result.code == 0, result.err
        found.append([(out / name).read_bytes() for name in ("encoder.safetensors", "checkpoint.safetensors")])
        found[-1].append(json.loads(result.out)["methods"])
    assert found[0] == found[1]


def test_the_result_has_controls_with_intervals(small_run: Path) -> None:
    document = json.loads((small_run / "result.json").read_text())
    assert document["schema"] == "metadiff.evaluate/1"
    assert (document["split"], document["protocol"], document["episodes"]) == ("test", "inductive", 20)
    assert set(document["methods"]) == {"metadiff", "prototype", "analytic", "logreg"}
    for name, values in document["methods"].items():
        assert 0 <= values["accuracy"] <= 100 and values["ci95"] > 0 and 0 <= values["ece"] <= 100
        assert ("paired_to_prototype" in values) == (name != "prototype")


def test_the_checkpoint_describes_itself(checkpoint: Path) -> None:
    header = read_header(checkpoint)
    assert header["kind"] == "model" and header["format"] == 1 and header["package"]
    assert len(header["classes"]) == 12 and header["image"]["size"] == 28 and len(header["image"]["mean"]) == 3
    assert header["config"]["name"] == "glyphs-5w1s" and "runtime" not in header["config"]
    assert set(header["metrics"]["methods"]) >= {"metadiff", "prototype"}
    assert header["metrics"]["learned"]["gain"] is not None
    assert {"analytic", "prototype", "logreg"} <= header["controls"].keys()
    assert {(s["way"], s["shot"]) for s in header["controls"]["lda"]} == {(5, shot) for shot in (1, 2, 5, 10)}


def test_no_times_paths_or_hosts_in_the_checkpoint(checkpoint: Path, small_run: Path) -> None:
    assert str(small_run.parent).encode() not in checkpoint.read_bytes()


def test_evaluate_repeats_the_final_table(checkpoint: Path, small_run: Path, cli: CLI) -> None:
    result = cli("evaluate", "--checkpoint", checkpoint, "--episodes", "20", "--query", "5", "--json")
    assert result.code == 0, result.err
    ours, theirs = json.loads(result.out), json.loads((small_run / "result.json").read_text())
    assert ours["methods"] == theirs["methods"]


def test_evaluate_json_is_all_there_is_on_stdout(checkpoint: Path) -> None:
    arguments = ["evaluate", "--checkpoint", str(checkpoint), "--episodes", "5", "--query", "3", "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0
    assert json.loads(result.stdout)["episodes"] == 5


def test_evaluate_as_a_table(checkpoint: Path, cli: CLI) -> None:
    result = cli("evaluate", "--checkpoint", checkpoint, "--episodes", "5", "--query", "3", "--shot", "2")
    assert result.code == 0
    assert "5-way 2-shot" in result.out and "logreg" in result.out and "\x1b" not in result.out


@pytest.mark.parametrize("extra", [["--transductive"], ["--imbalance", "2"], ["--transductive", "--imbalance", "0.5"]])
def test_evaluate_protocols(checkpoint: Path, cli: CLI, extra: list[str]) -> None:
    result = cli("evaluate", "--checkpoint", checkpoint, "--episodes", "5", "--query", "3", "--json", *extra)
    assert result.code == 0, result.err
    expected = "transductive" if "--transductive" in extra else "inductive"
    assert json.loads(result.out)["protocol"] == expected


def test_every_control_can_be_asked_for(checkpoint: Path, cli: CLI) -> None:
    names = "prototype,analytic,untrained,posterior,inductive,soft-kmeans,label-propagation"
    result = cli("evaluate", "--checkpoint", checkpoint, "--episodes", "3", "--query", "3", "--transductive", "--json",
                 "--controls", names)  # fmt: skip
    assert result.code == 0, result.err
    methods = json.loads(result.out)["methods"]
    assert list(methods) == ["metadiff", *names.split(",")]
    assert "paired_to_inductive" in methods["metadiff"]


def test_novelty_is_reported_beside_the_accuracy(checkpoint: Path, cli: CLI) -> None:
    common = ["evaluate", "--checkpoint", checkpoint, "--episodes", "3", "--query", "3", "--json"]
    new, seen = (json.loads(cli(*common, "--split", split).out)["novelty"] for split in ("test", "train"))
    assert new["weights"] == seen["weights"] == 15 and 0 < new["training_to_training"] < 180
    # weights for classes that the space was made of lie nearer to the training weights than those for new ones
    assert seen["generated_to_training"] < new["generated_to_training"]


def test_halves_fit_on_one_half_of_the_classes_and_measure_on_the_other(checkpoint: Path, cli: CLI) -> None:
    common = ["evaluate", "--checkpoint", checkpoint, "--split", "val", "--way", "3", "--episodes", "9", "--query", "3"]
    result = cli(*common, "--halves", "--json", "--controls", "prototype")
    assert result.code == 0, result.err
    document = json.loads(result.out)
    assert document["halves"] is True and document["classes"] == 8 and document["episodes"] == 9
    failed = cli(*common[:6], "5", *common[7:], "--halves")
    assert failed.code == 3 and "5-way" in failed.err  # four classes a half


def test_fail_under_is_a_gate(checkpoint: Path, cli: CLI) -> None:
    common = ["evaluate", "--checkpoint", checkpoint, "--episodes", "5", "--query", "3"]
    assert cli(*common, "--fail-under", "1").code == 0
    failed = cli(*common, "--fail-under", "100")
    assert failed.code == 5 and "--fail-under" in failed.err and "metadiff" in failed.out


def test_evaluate_all_classes_of_another_folder(checkpoint: Path, cli: CLI, tmp_path: Path) -> None:
    for c in range(6):
        for i in range(5):
            paint(tmp_path / "set" / f"class {c}" / f"{i}.png", (40 * c, 250 - 40 * c, 90), seed=7 * c + i)
    result = cli("evaluate", "--checkpoint", checkpoint, "--data", tmp_path / "set", "--split", "all", "--query", "3",
                 "--episodes", "10", "--json")  # fmt: skip
    assert result.code == 0, result.err
    assert json.loads(result.out)["classes"] == 6


def test_inspect(checkpoint: Path, cli: CLI) -> None:
    shown = cli("inspect", checkpoint)
    assert shown.code == 0 and "kind: model" in shown.out
    assert "1-shot metadiff: " in shown.out and "licence: " in shown.out and "glyphs: 12 base classes" in shown.out
    document: dict[str, Any] = json.loads(cli("inspect", checkpoint, "--json").out)
    assert document["schema"] == "metadiff.inspect/1" and document["kind"] == "model"


def test_a_full_run_directory_is_refused(small_run: Path, cli: CLI) -> None:
    before = (small_run / "checkpoint.safetensors").read_bytes()
    result = cli("metatrain", "--preset", "glyphs-5w1s", "--out", small_run, *SMALL)
    assert result.code == 2 and "--resume" in result.err and "--overwrite" in result.err
    assert (small_run / "checkpoint.safetensors").read_bytes() == before


def test_overwrite_never_empties_a_folder_that_is_no_run(cli: CLI, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    result = cli("metatrain", "--preset", "glyphs-5w1s", "--out", tmp_path, "--overwrite", *SMALL)
    assert result.code == 2 and (tmp_path / "thesis.tex").exists()


def test_metatrain_with_a_given_encoder(small_run: Path, tmp_path: Path, cli: CLI) -> None:
    result = cli("metatrain", "--preset", "glyphs-5w1s", "--encoder", small_run / "encoder.safetensors",
                 "--out", tmp_path / "run", "--set", "denoiser.kind=analytic", *SMALL)  # fmt: skip
    assert result.code == 0, result.err
    assert "analytic" in result.out and str(tmp_path / "run" / "checkpoint.safetensors") in result.out


@pytest.mark.parametrize("kind", ["paper", "unet"])
def test_each_denoiser_trains(kind: str, tmp_path: Path, small_run: Path) -> None:
    result = invoke("metatrain", "--preset", "glyphs-5w1s", "--encoder", small_run / "encoder.safetensors",
                    "--out", tmp_path / "run", "--json", "--set", f"denoiser.kind={kind}", *SMALL)  # fmt: skip
    assert result.code == 0, result.err
    assert json.loads(result.out)["learned"]["kind"] == kind


def test_nan_loss_in_meta_training_keeps_the_encoder_and_says_what_to_try(tmp_path: Path, small_run: Path) -> None:
    result = invoke("metatrain", "--preset", "glyphs-5w1s", "--encoder", small_run / "encoder.safetensors",
                    "--out", tmp_path / "run", *SMALL, "--set", "metatrain.lr=1e35")  # fmt: skip
    assert result.code == 1 and "loss became" in result.err and "metatrain.lr" in result.err
    assert (tmp_path / "run" / "encoder.safetensors").exists()
    assert not (tmp_path / "run" / "checkpoint.safetensors").exists()


def test_nan_loss_stops_and_keeps_the_last_state(tmp_path: Path, cli: CLI) -> None:
    result = cli("pretrain", "--preset", "glyphs-5w1s", "--out", tmp_path / "run", *SMALL,
                 "--set", "pretrain.lr=1e30", "--set", "pretrain.precision=fp32")  # fmt: skip
    assert result.code == 1
    assert "loss became" in result.err and "pretrain.lr" in result.err
    assert not (tmp_path / "run" / "encoder.safetensors").exists()
