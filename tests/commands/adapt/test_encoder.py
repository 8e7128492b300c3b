"""`adapt --encoder`: any encoder, without base classes, and the best of several by images that are held out."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.worlds import Result, small_model

CLI = Callable[..., Result]


@pytest.fixture
def place(photos: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(photos)
    return photos


def test_the_encoder_of_the_package_needs_no_statistics(place: Path, cli: CLI) -> None:
    done = cli("adapt", "-S", "support", "-Q", "query", "--encoder", "lite0", "--views", "1", "--json")
    assert done.code == 0, done.err
    document = json.loads(done.out)
    assert document["checkpoint"] == "lite0"
    assert {Path(p["path"]).stem: p["label"] for p in document["predictions"]}["red"] == "red"


def test_a_saved_classifier_of_an_encoder_stands_alone(place: Path, cli: CLI) -> None:
    model = small_model(place / "m.safetensors")
    first = cli(
        "adapt", "-S", "support", "-Q", "query", "--encoder", str(model), "--views", "1", "--save", "c", "--json"
    )
    model.unlink()
    again = cli("adapt", "--classifier", "c", "-Q", "query", "--json")
    assert first.code == again.code == 0, first.err + again.err
    assert json.loads(again.out)["predictions"] == json.loads(first.out)["predictions"]


def test_of_several_encoders_the_best_is_taken_and_all_are_told(place: Path, cli: CLI) -> None:
    model = small_model(place / "m.safetensors")
    done = cli("adapt", "-S", "support", "-Q", "query", "--encoder", f"{model},lite0", "--views", "1", "--json")
    assert done.code == 0, done.err
    assert f"encoder {model}:" in done.err.replace("\n", "") and "encoder lite0:" in done.err
    assert "held-out support images" in done.err and json.loads(done.out)["checkpoint"] in ("lite0", "conv4")


def test_encoders_cannot_be_compared_on_one_image_per_class(place: Path, cli: CLI) -> None:
    for folder in (place / "support").iterdir():
        for image in sorted(folder.iterdir())[1:]:
            image.unlink()
    model = small_model(place / "m.safetensors")
    done = cli("adapt", "-S", "support", "-Q", "query", "--encoder", f"{model},lite0", "--views", "1")
    assert done.code == 3 and "each class has one image" in done.err


def test_draws_need_class_statistics(place: Path, cli: CLI) -> None:
    model = small_model(place / "m.safetensors")
    done = cli("adapt", "-S", "support", "-Q", "query", "--encoder", str(model), "--temperature", "1")
    assert done.code == 2 and "no statistics of classes" in done.err


def test_onnxruntime_gives_the_labels_of_torch(place: Path, cli: CLI, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed; it is the extra [fast]")
    model = small_model(place / "m.safetensors")
    shutil.copytree(place / "query", place / "q2")
    found = [
        json.loads(cli("adapt", "-S", "support", "-Q", "q2", "-c", str(model), "--backend", backend, "--json").out)
        for backend in ("torch", "onnxruntime")
    ]
    labels = [[(p["path"], p["label"]) for p in document["predictions"]] for document in found]
    assert labels[0] == labels[1]
