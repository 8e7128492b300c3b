"""`metadiff evaluate` from its options to its tables, gates and report."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from metadiff_cli.config.load import resolve, to_yaml
from metadiff_cli.core.checkpoints.model import load_model, save_model
from metadiff_cli.core.method.adapt import MetaDiff
from metadiff_cli.core.method.metric import Metric
from tests.worlds import CPU, SMALL, Page, Result, invoke, paint, validate

CLI = Callable[..., Result]
QUICK = ["--query", "3", "--episodes", "4", "--controls", "prototype"]


def test_tables_of_all_methods(cli: CLI, checkpoint: Path) -> None:
    shown = cli("evaluate", "-c", checkpoint, *QUICK, "--way", "3", "--open-set", "--verbose")
    assert shown.code == 0, shown.err
    assert "3-way 1-shot, 3 queries per class, test classes, 4 episodes, inductive" in shown.out
    assert "prototype" in shown.out and "AUROC of the known score" in shown.out
    assert "episodes per second" in shown.err


def test_a_gate_ends_with_5_after_the_results(cli: CLI, checkpoint: Path) -> None:
    assert cli("evaluate", "-c", checkpoint, *QUICK, "--fail-under", "0").code == 0
    failed = cli("evaluate", "-c", checkpoint, *QUICK, "--fail-under", "100", "--json")
    assert failed.code == 5 and "below --fail-under 100" in failed.err and json.loads(failed.out)["episodes"] == 4


def test_the_report_has_what_json_does_not_hold(cli: CLI, checkpoint: Path, tmp_path: Path) -> None:
    result = cli("evaluate", "-c", checkpoint, *QUICK, "--report", tmp_path / "e.html", "--json")
    assert result.code == 0 and f"report written: {tmp_path / 'e.html'}" in result.err
    document = json.loads(result.out)
    assert "pictures" not in document and {key: len(values) for key, values in document["path"].items()} == {
        "accuracy": 10, "loss": 10,
    }  # fmt: skip
    text = Page(tmp_path / "e.html").text
    assert "Weights on their way" in text and "Along the descent" in text


def test_a_report_replaces_no_other_file(cli: CLI, checkpoint: Path, tmp_path: Path) -> None:
    copy = tmp_path / "c.safetensors"
    copy.write_bytes(checkpoint.read_bytes())
    result = cli("evaluate", "-c", copy, *QUICK, "--report", copy)
    assert result.code == 2 and "not a page of metadiff" in result.err and result.out == ""
    assert copy.read_bytes() == checkpoint.read_bytes()


@pytest.mark.parametrize(
    ("options", "word"),
    [(["--open-set", "--imbalance", "1"], "--imbalance"), (["--halves", "--controls", "x.safetensors"], "--halves")],
)
def test_options_that_do_not_go_together(cli: CLI, checkpoint: Path, options: list[str], word: str) -> None:
    result = cli("evaluate", "-c", checkpoint, *options)
    assert result.code == 2 and word in result.err and result.out == ""


def test_episodes_come_from_the_configuration(
    cli: CLI, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(*options: str | Path) -> dict[str, int]:
        result = cli("evaluate", "-c", checkpoint, "--controls", "", "--json", *options)
        assert result.code == 0, result.err
        return {key: json.loads(result.out)[key] for key in ("way", "shot", "query", "episodes", "seed")}

    (tmp_path / "run.yaml").write_text(to_yaml(resolve("glyphs-5w1s", settings=[
        "evaluation.shot=3", "evaluation.way=4", "evaluation.query=2", "evaluation.episodes=5", "seed=9",
    ], environ={})))  # fmt: skip
    of_file = {"way": 4, "shot": 3, "query": 2, "episodes": 5, "seed": 9}
    assert measured("--config", tmp_path / "run.yaml") == of_file
    monkeypatch.setenv("METADIFF_EVALUATION__SHOT", "2")
    assert measured("--config", tmp_path / "run.yaml") == {**of_file, "shot": 2}
    assert measured("--config", tmp_path / "run.yaml", "--set", "evaluation.shot=1", "--way", "3") == {
        **of_file, "shot": 1, "way": 3,
    }  # fmt: skip


def test_a_setting_of_training_is_an_error(cli: CLI, checkpoint: Path) -> None:
    for setting in ("evaluation.card_shots=[5]", "features.size=64", "data.layout=omniglot"):
        result = cli("evaluate", "-c", checkpoint, "--set", setting)
        assert result.code == 2 and "has no effect here" in result.err and "evaluation.way" in result.err


@pytest.fixture(scope="module")
def baseline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a baseline on images after one training step."""
    out = tmp_path_factory.mktemp("baseline") / "run"
    few = [f"--set=baselines.images.{key}" for key in ("steps=1", "validation_episodes=2", "query=2")]
    result = invoke("metatrain", "--preset", "glyphs-5w1s", "--method", "anil", "--out", out, *SMALL, *few)
    assert result.code == 0, result.err
    return out / "checkpoint.safetensors"


def test_a_baseline_has_no_sampler(cli: CLI, baseline: Path, checkpoint: Path) -> None:
    for options in (["--guidance", "2"], ["--steps", "3"], ["--transductive"], ["--set", "sampler.method=ddpm"]):
        result = cli("evaluate", "-c", baseline, "--controls", "", *options)
        assert result.code == 2 and "anil has no sampler" in result.err and "--controls" in result.err
    beside = cli(
        "evaluate", "-c", baseline, "--query", "2", "--episodes", "2", "--controls", checkpoint, "--steps", "3"
    )
    assert beside.code == 0, beside.err


@pytest.mark.parametrize("option", ["--halves", "--open-set", "--compare"])
def test_what_a_baseline_cannot_do(cli: CLI, baseline: Path, small_run: Path, option: str) -> None:
    given = [option, small_run / "result.json"] if option == "--compare" else [option]
    result = cli("evaluate", "-c", baseline, "--controls", "", *given)
    assert result.code == 2 and option in result.err and "leave out" in result.err


@pytest.fixture
def uneven(tmp_path: Path) -> Path:
    """A folder of classes: six with four images, one with a single image, one with two."""
    for c in range(8):
        for i in range({6: 1, 7: 2}.get(c, 4)):
            paint(tmp_path / "photos" / f"kind-{c}" / f"{i}.png", (30 * c, 90, 200), seed=10 * c + i, size=24)
    return tmp_path / "photos"


def test_classes_with_too_few_images_are_left_out_and_named(cli: CLI, checkpoint: Path, uneven: Path) -> None:
    common = ("evaluate", "-c", checkpoint, "--data", uneven, "--split", "all", "--episodes", "3", "--query", "3")
    result = cli(*common, "--controls", f"prototype,logreg,{checkpoint}", "--open-set", "--json")
    document = validate(result, "metadiff.evaluate/1")
    assert document["classes"] == 6 and document["classes_left_out"] == ["kind-6", "kind-7"]
    assert "classes left out, with fewer than 4 images: kind-6, kind-7" in result.err
    same = [document["methods"][name]["accuracy"] for name in ("metadiff", "metadiff-analytic")]
    assert same[0] == same[1]  # the file among the controls reads the same rows
    assert cli(*common, "--halves", "--way", "3", "--controls", "").code == 0
    few = cli(*common, "--shot", "2")
    assert few.code == 3 and "need 5 classes of 5 images or more; 0 of 8" in few.err and "--query" in few.err
    assert cli(*common, "--way", "7").code == 3


def test_a_baseline_leaves_out_the_same_classes(cli: CLI, baseline: Path, uneven: Path) -> None:
    result = cli("evaluate", "-c", baseline, "--data", uneven, "--split", "all", "--episodes", "2", "--query", "3",
                 "--controls", "", "--json")  # fmt: skip
    assert validate(result, "metadiff.evaluate/1")["classes_left_out"] == ["kind-6", "kind-7"]


def test_split_all_says_what_it_takes(cli: CLI, checkpoint: Path, uneven: Path) -> None:
    common = ("evaluate", "-c", checkpoint, "--split", "all", "--episodes", "2", "--query", "2", "--controls", "")
    assert "--split all: 8 classes, 27 images\n" in cli(*common, "--data", uneven).err
    trained = cli(*common).err
    assert (
        "--split all: 28 classes, 336 images (train, val, test)" in trained
        and "12 of them are classes of the training" in trained
    )


def test_draws_need_class_statistics(checkpoint: Path, tmp_path: Path, cli: CLI) -> None:
    model = load_model(checkpoint, CPU)
    plain = MetaDiff(Metric(model.images.groups), tuning=model.metadiff.tuning)
    header = {**model.header, "denoiser": {"kind": "analytic", "width": 8}}
    save_model(tmp_path / "plain.safetensors", model.images, plain, header)
    done = cli("evaluate", "-c", tmp_path / "plain.safetensors", "--temperature", "1", "--episodes", "2")
    assert done.code == 2 and "no statistics of classes" in done.err
