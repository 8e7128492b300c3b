"""Encoders and models in files: the same after a round trip, and what is no fault of a file is not told as one."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from metadiff_cli.core.checkpoints.file import load_checkpoint, save_checkpoint
from metadiff_cli.core.checkpoints.model import (
    Model,
    checkpoint_errors,
    load_encoder,
    load_model,
    model_tensors,
    resized,
    save_encoder,
    save_model,
)
from metadiff_cli.core.method.adapt import MetaDiff, Tuning
from metadiff_cli.core.method.calibration import Rejection, TaskTable
from metadiff_cli.core.method.guidance import Usual
from metadiff_cli.core.method.metric import Metric
from metadiff_cli.errors import CheckpointError, ConfigError, MetaDiffError
from tests.worlds import CPU, small_encoder, small_model

PIXELS = torch.randint(0, 256, (3, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return load_model(small_model(tmp_path / "model.safetensors"), CPU)


def test_a_model_comes_back_with_all_that_was_fitted(model: Model, tmp_path: Path) -> None:
    table = TaskTable((2, 5), (1, 5), ((0.5, 1.0), (0.75, 0.25)))
    tuning = Tuning(
        table, table, table, table, table, table, table, Usual(table, 0.5), rejection=Rejection(table, 0.05)
    )
    targets = torch.randn(3, model.images.feature_size)
    metadiff = replace(model.metadiff, tuning=tuning, targets=targets, most_shots=5)
    save_model(tmp_path / "again.safetensors", model.images, metadiff, model.header)
    back = load_model(tmp_path / "again.safetensors", CPU)
    assert (
        back.metadiff.tuning == tuning
        and back.metadiff.most_shots == 5
        and back.metadiff.learned
        and back.images.key == model.images.key
    )
    assert back.metadiff.targets is not None and torch.equal(back.metadiff.targets, targets)
    save_model(tmp_path / "third.safetensors", back.images, back.metadiff, back.header)
    assert (tmp_path / "third.safetensors").read_bytes() == (tmp_path / "again.safetensors").read_bytes()


def test_a_half_precision_encoder_takes_half_the_space_and_gives_the_same_features(
    model: Model, tmp_path: Path
) -> None:
    images = load_encoder(tmp_path / "model.safetensors", CPU, views=1, half=True)
    save_model(tmp_path / "half.safetensors", images, model.metadiff, model.header)
    again = load_model(tmp_path / "half.safetensors", CPU)
    assert torch.equal(again.images.encode(PIXELS), images.encode(PIXELS))
    plain = replace(model.images, views=1)
    assert torch.allclose(images.encode(PIXELS), plain.encode(PIXELS), atol=1e-2)
    saved = load_checkpoint(tmp_path / "half.safetensors").part("encoder")
    assert all(t.dtype == torch.float16 for t in saved.values() if t.dim() > 1)


def test_views_are_kept_with_a_model(model: Model, tmp_path: Path) -> None:
    images = load_encoder(tmp_path / "model.safetensors", CPU, views=6, shift=2)
    save_model(tmp_path / "moved.safetensors", images, model.metadiff, model.header)
    back = load_model(tmp_path / "moved.safetensors", CPU)
    assert (back.images.views, back.images.shift) == (6, 2) and back.images.key == images.key
    odd = [("shift", value) for value in (-1, 1.5, True, "3", back.images.size)]
    for key, value in [*odd, ("views", 3), ("views", "2"), ("mirror", True)]:
        header = {**back.header, "image": {**back.header["image"], key: value}}
        save_checkpoint(tmp_path / "odd.safetensors", "model", model_tensors(images, model.metadiff), header)
        with pytest.raises(CheckpointError, match=r"odd\.safetensors does not hold what its header says .*image"):
            load_model(tmp_path / "odd.safetensors", CPU)


def test_tensors_that_are_no_numbers_of_that_kind_are_refused(model: Model, tmp_path: Path) -> None:
    tensors = model_tensors(model.images, model.metadiff)
    for name in ("space.mean", "space.basis.0"):
        save_checkpoint(tmp_path / "odd", "model", {**tensors, name: tensors[name].int()}, model.header)
        with pytest.raises(CheckpointError, match=name):
            load_model(tmp_path / "odd", CPU)


def test_an_encoder_that_averages_its_maps_takes_larger_images_and_conv4_says_why_not() -> None:
    pooled = small_encoder(28, "resnet10")
    pixels = torch.zeros(1, 44, 44, 3, dtype=torch.uint8)
    assert resized(pooled, 44).encode(pixels).shape == (1, 1024) and resized(pooled, 44).key != pooled.key
    with pytest.raises(ConfigError, match=r"features\.size"):
        resized(small_encoder(28), 44)


def test_an_encoder_file_is_no_model_and_a_state_is_neither(tmp_path: Path) -> None:
    save_encoder(tmp_path / "e", small_encoder(), {"weights": {"source": "here"}})
    assert load_encoder(tmp_path / "e", CPU, views=1).key == small_encoder(views=1).key
    with pytest.raises(CheckpointError, match="is an encoder"):
        load_model(tmp_path / "e", CPU)
    save_checkpoint(tmp_path / "s", "state", {}, {})
    with pytest.raises(CheckpointError, match="unfinished training"):
        load_encoder(tmp_path / "s", CPU, views=1)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("guidance", 0.0),
        ("level", 1.5),
        ("domain", -0.1),
        ("prior", 1e9),
        ("temperature", 1e300),
        ("scale", 0.0),
    ],
)
def test_a_number_that_no_fit_gives_is_refused(model: Model, tmp_path: Path, name: str, value: float) -> None:
    header = json.loads(json.dumps(model.header))
    header["tuning"][name]["values"] = [[value]]
    save_checkpoint(tmp_path / "odd", "model", model_tensors(model.images, model.metadiff), header)
    with pytest.raises(CheckpointError, match=name):
        load_model(tmp_path / "odd", CPU)


def test_a_metric_has_the_groups_of_the_encoder_and_some_part(model: Model, tmp_path: Path) -> None:
    tensors = model_tensors(model.images, model.metadiff)
    for metric in ({"groups": [32, 32]}, {"groups": []}, {"plain": False, "whitened": False}):
        header = {**model.header, "metric": {**model.header["metric"], **metric}}
        save_checkpoint(tmp_path / "odd", "model", tensors, header)
        with pytest.raises(CheckpointError, match=r"groups of features|without parts"):
            load_model(tmp_path / "odd", CPU)


def test_a_model_without_class_statistics_comes_back(model: Model, tmp_path: Path) -> None:
    header = {**model.header, "denoiser": {"kind": "analytic", "width": 8}}
    save_model(tmp_path / "plain", model.images, MetaDiff(Metric(model.images.groups)), header)
    back = load_model(tmp_path / "plain", CPU).metadiff
    assert back.metric.space is None and back.metric.plain and back.targets is None and not back.learned


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU"),
        RuntimeError("CUDA error: no kernel image is available for execution on the device"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_a_missing_driver_and_memory_are_no_damage_of_the_file(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: RuntimeError
) -> None:
    """Wherever they arise while a file is read."""

    def fail(*arguments: object, **options: object) -> None:
        raise error

    for place in ("to", "load_state_dict"):
        with monkeypatch.context() as broken:
            broken.setattr(torch.nn.Module, place, fail)
            with pytest.raises(MetaDiffError) as caught:
                load_model(tmp_path / "model.safetensors", CPU)
        assert caught.value.exit_code == 1 and str(error)[:20] in caught.value.message
        assert caught.value.hint is not None and "--device cpu" in caught.value.hint


def test_what_is_raised_for_another_reason_is_left_alone() -> None:
    for error in (MemoryError(), KeyboardInterrupt(), OSError(28, "No space"), ConfigError("x")):
        with pytest.raises(type(error)), checkpoint_errors("x"):
            raise error
