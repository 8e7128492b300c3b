"""What `adapt` says before it reads anything: options without an effect, places that cannot be written, labels."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.worlds import Result, paint

CLI = Callable[..., Result]


@pytest.fixture
def place(photos: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The photos as the working folder, with a file "c.safetensors" that is not read."""
    monkeypatch.chdir(photos)
    (photos / "c.safetensors").write_bytes(b"not read")
    return photos


SAVED = ["--classifier", "c.safetensors", "-Q", "query"]
BOTH = ["-S", "support", "-Q", "query"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([*SAVED, "--guidance", "4"], "--guidance has no effect"),
        ([*SAVED, "--samples", "3", "--temperature", "1"], "--samples has no effect"),
        ([*SAVED, "--temperature", "1"], "--temperature has no effect"),
        ([*SAVED, "--steps", "5"], "--steps has no effect"),
        ([*SAVED, "--seed", "1"], "--seed has no effect"),
        ([*SAVED, "--set", "sampler.steps=5"], "--set sampler.steps has no effect"),
        ([*SAVED, "--checkpoint", "x.safetensors"], "--checkpoint has no effect"),
        ([*BOTH, "--samples", "3"], "samples have no effect at temperature 0"),
        ([*BOTH, "--set", "pretrain.epochs=3"], "pretrain.epochs has no effect"),
        ([*BOTH, "--overwrite"], "--overwrite is about the file of --save"),
        ([*BOTH, "--top-k", "2", "--format", "csv"], "--top-k has no effect"),
        ([*BOTH, "--json", "--format", "csv"], "--json contradicts --format csv"),
        ([*BOTH, "--move"], "--move needs --sort-into"),
        ([*BOTH, "-0"], "add --query -"),
        ([*BOTH, "--reject", "yes"], "--reject takes the word auto, not 'yes'"),
        ([*BOTH, "--format", "cvs"], "did you mean 'csv'?"),
        *(([*BOTH, "--guidance", a], f"--guidance {a} is not a number above 0") for a in ("nan", "inf", "-3", "much")),
        ([*BOTH, "--steps", "3", "--steps", "4"], "--steps was given 2 times"),
        ([*BOTH, "--save", "a.html", "--report", "./a.html"], "are the same file"),
        ([*BOTH, "--save", "query/red.png", "--overwrite"], "would replace a file of another kind"),
        ([*BOTH, "--save", "query/red.png"], "exists already"),
        ([*BOTH, "--report", "query/red.png"], "would replace a file that is not a page"),
        ([*BOTH, "--report", "query"], "query"),
        ([*BOTH, "--report", "c.safetensors/r.html"], "c.safetensors is not a folder"),
        ([*BOTH, "--save", "c.safetensors/x"], "c.safetensors is not a folder"),
        ([*BOTH, "--sort-into", "c.safetensors"], "c.safetensors is not a folder"),
        ([*BOTH, "--sort-into", "support/red"], "inside the support folder"),
        (["-Q", "query"], "give --support or --classifier"),
        ([*SAVED, "--encoder", "lite0"], "--encoder has no effect: --classifier"),
        ([*BOTH, "--encoder", "lite0", "--checkpoint", "c.safetensors"], "--encoder has no effect: --checkpoint"),
        ([*BOTH, "--encoder", ","], "--encoder names no encoder"),
        ([*BOTH, "--encoder", "conv4"], "'conv4' is no trained encoder"),
        ([*BOTH, "--encoder-weights", "c.safetensors"], "--encoder-weights needs one --encoder"),
        ([*SAVED, "--views", "2"], "--views has no effect"),
        ([*BOTH, "--views", "3"], "--views takes 1, 2, 5 or 6, not 3"),
        ([*BOTH, "--backend", "tensorrt"], "backend"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_that_cannot_be_meant(cli: CLI, place: Path, arguments: list[str], words: str) -> None:
    result = cli("adapt", *arguments)
    assert result.code == 2 and words in result.err and result.out == "", result.err
    assert "Traceback" not in result.err


@pytest.mark.parametrize(
    "option",
    ["--support", "--classifier", "--query", "--unlabeled", "--sort-into", "--save", "--report", "--checkpoint",
     "--config"],
)  # fmt: skip
def test_an_empty_path_is_not_the_working_folder(cli: CLI, place: Path, option: str) -> None:
    """As `--query "$UNSET" --sort-into sorted --move` would move every image below the working folder."""
    before = sorted(place.rglob("*"))
    result = cli("adapt", "-Q", "query", "--move", option, "")
    assert result.code == 2 and option in result.err and "empty" in result.err
    assert sorted(place.rglob("*")) == before
    assert cli("adapt", *BOTH, "").code == 2  # an argument without an option


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["-S", "support", "-Q", "qery"], 3, "--query qery does not exist"),
        (["-S", "suport", "-Q", "query"], 3, "folder suport does not exist"),
        (["-S", "photos.zip", "-Q", "query"], 3, "photos.zip is an archive, not a folder"),
        (["-S", "query/red.png", "-Q", "query"], 3, "query/red.png is a file, not a folder"),
        ([*BOTH, "--unlabeled", "empty"], 3, "--unlabeled empty"),
        ([*BOTH, "--unlabeled", "nosuch"], 3, "--unlabeled nosuch does not exist"),
        (["--classifier", "nosuch.safetensors", "-Q", "query"], 4, "--classifier nosuch.safetensors does not exist"),
        ([*BOTH, "--checkpoint", "nosuch.safetensors"], 4, "--checkpoint nosuch.safetensors does not exist"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_inputs_that_are_not_there(cli: CLI, place: Path, arguments: list[str], code: int, words: str) -> None:
    (place / "photos.zip").write_bytes(b"PK")
    (place / "empty").mkdir()
    result = cli("adapt", *arguments)
    assert result.code == code and words in result.err and result.out == "", result.err


def test_a_model_and_a_classifier_are_not_the_same(cli: CLI, place: Path, checkpoint: Path) -> None:
    saved = place / "saved.safetensors"
    assert cli("adapt", *BOTH, "-c", checkpoint, "--save", saved).code == 0
    wrong = cli("adapt", "--classifier", checkpoint, "-Q", "query")
    assert wrong.code == 4 and "is a full model" in wrong.err and "give it as --checkpoint" in wrong.err
    other = cli("adapt", *BOTH, "--checkpoint", saved)
    assert other.code == 4 and "is an adapted classifier" in other.err and "give it as --classifier" in other.err


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [("--report", "locked/r.html", "locked"), ("--save", "locked/deep/c.safetensors", "locked"),
     ("--sort-into", "locked/out", "locked"), ("--sort-into", "sorted", "sorted/locked")],
)  # fmt: skip
def test_a_place_without_permission_is_found_at_once(
    cli: CLI, place: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, option: str, value: str, told: str
) -> None:
    (place / "locked").mkdir()
    (place / "sorted" / "locked").mkdir(parents=True)
    (place / "support" / "red").rename(place / "support" / "locked")  # a class
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "locked")  # root may write anywhere
    result = cli("adapt", *BOTH, "-c", checkpoint, option, value)
    assert result.code == 2 and f"{told} is not a folder that you may write to" in result.err, result.err
    assert result.out == "" and "support:" not in result.err


def test_labels(cli: CLI, place: Path, checkpoint: Path) -> None:
    common = ["-S", "support", "-c", checkpoint, "--labelled"]
    for name in ("Red", "blue"):
        shutil.copytree("support/blue", f"named/{name}")
    inside = cli("adapt", *common, "-Q", "named/blue")
    assert inside.code == 3 and "named/blue is the folder of one class" in inside.err and "--query named" in inside.err
    without = cli("adapt", *common, "-Q", "query")
    assert without.code == 3 and "no query image has a label" in without.err
    cased = cli("adapt", *common, "-Q", "named", "--json")
    assert cased.code == 0 and "'Red' and 'red' are different classes" in cased.err
    shutil.copytree("support/grey", "support/BLUE")
    (place / "support" / "grey").rename(place / "grey")
    assert "'BLUE' and 'blue' are different classes" in cli("adapt", *BOTH, "-c", checkpoint).err


def test_more_images_as_the_shell_expands_a_pattern(cli: CLI, place: Path, checkpoint: Path) -> None:
    (place / "query" / "notes.txt").write_text("no image")
    files = sorted(f"query/{path.name}" for path in (place / "query").iterdir())
    result = cli("adapt", "-c", checkpoint, "--format", "csv", "-Q", *files, "-S", "support")
    assert result.code == 0 and len(result.out.splitlines()) == 1 + 4, result.err
    assert "query: left out, as they are not images: 1 .txt" in result.err


def test_draws_take_more_steps_and_say_so(cli: CLI, place: Path, checkpoint: Path, monkeypatch: Any) -> None:
    common = ["adapt", *BOTH, "-c", checkpoint, "--json", "--temperature", "1", "--samples", "2"]
    default, hundred, few = cli(*common), cli(*common, "--steps", "100"), cli(*common, "--set", "sampler.steps=20")
    assert default.out == hundred.out != few.out
    assert "the sampler takes 100 steps at temperature 1" in default.err and "steps" not in hundred.err
    assert "20 steps draw classifiers that differ too little" in few.err
    monkeypatch.setenv("METADIFF_SAMPLER__STEPS", "20")
    assert cli(*common).out == few.out
    assert "adapted on cpu in 10 steps" in cli("adapt", *BOTH, "-c", checkpoint, "-v", "--steps", "10").err


def test_classes_with_one_image_are_not_in_the_estimate(cli: CLI, place: Path, checkpoint: Path) -> None:
    paint(place / "support" / "white" / "1.png", (250, 250, 250), seed=1)
    result = cli("adapt", *BOTH, "-c", checkpoint)
    assert "classes with one image are not in it: red, white" in result.err
