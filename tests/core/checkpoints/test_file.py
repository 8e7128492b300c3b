"""Checkpoints: exact round trip, equal bytes, one metadata key, nothing half-written."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from metadiff_cli.core.checkpoints.file import load_checkpoint, read_header, save_checkpoint
from metadiff_cli.core.checkpoints.model import load_encoder, load_model, model_tensors, resized, save_model
from metadiff_cli.core.encoders.bank import ImageEncoder
from metadiff_cli.core.encoders.networks import build_encoder
from metadiff_cli.errors import CheckpointError, ConfigError

TENSORS = {
    "a.x": torch.randn(3, 4),
    "a.y": torch.arange(5),
    "b": torch.randn(2, dtype=torch.float64).to(torch.bfloat16),
}
HEADER = {"classes": ["ß", "日本"], "metrics": {"z": 1.5, "a": None}}


def test_round_trip(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c.safetensors", "encoder", TENSORS, HEADER)
    back = load_checkpoint(tmp_path / "c.safetensors", "encoder")
    assert all(torch.equal(back.tensors[n], t) and back.tensors[n].dtype == t.dtype for n, t in TENSORS.items())
    assert {key: back.header[key] for key in HEADER} == HEADER
    assert set(back.part("a")) == {"x", "y"}


def test_equal_content_gives_equal_bytes(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "1", "encoder", TENSORS, HEADER)
    save_checkpoint(tmp_path / "2", "encoder", dict(reversed(TENSORS.items())), dict(reversed(HEADER.items())))
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    with safe_open(tmp_path / "1", framework="pt") as file:
        assert set(file.metadata()) == {"metadiff"}


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import metadiff_cli.core.checkpoints.file as module

    path = tmp_path / "c.safetensors"
    save_checkpoint(path, "encoder", TENSORS, HEADER)
    before = path.read_bytes()

    def half(tensors: object, file: Path, metadata: object) -> None:
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_file", half)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(path, "encoder", TENSORS, HEADER)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]


def test_views_are_written_as_they_are(tmp_path: Path) -> None:
    whole = torch.randn(4, 6)
    save_checkpoint(tmp_path / "c", "state", {"view": whole[:, 1:3], "twin": whole}, {})
    assert torch.equal(load_checkpoint(tmp_path / "c").tensors["view"], whole[:, 1:3])


@pytest.mark.parametrize(
    "content", [b"", b"abc", b"\x80\x04.", b"PK\x03\x04....", b"\xff" * 64, (2).to_bytes(8, "little") + b"{}"]
)
def test_other_files_are_checkpoint_errors(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(CheckpointError):
        read_header(tmp_path / "x")


def test_a_folder_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is a folder"):
        read_header(tmp_path)


def test_a_half_precision_encoder_takes_half_the_space_and_gives_the_same_features(
    small_run: Path, tmp_path: Path
) -> None:
    device = torch.device("cpu")
    model = load_model(small_run / "checkpoint.safetensors", device)
    images = load_encoder(small_run / "encoder.safetensors", device, mirror=False, half=True)
    save_model(tmp_path / "half.safetensors", images, model.metadiff, model.header)
    again = load_model(tmp_path / "half.safetensors", device)
    pixels = torch.randint(0, 256, (3, 28, 28, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.images.encode(pixels), images.encode(pixels))
    assert torch.allclose(images.encode(pixels), model.images.encode(pixels), atol=1e-2)
    saved = {
        n: t for n, t in load_checkpoint(tmp_path / "half.safetensors").tensors.items() if n.startswith("encoder.")
    }
    assert all(t.dtype == torch.float16 for t in saved.values() if t.dim() > 1)


def test_views_are_kept_with_a_model(small_run: Path, tmp_path: Path) -> None:
    device = torch.device("cpu")
    model = load_model(small_run / "checkpoint.safetensors", device)
    images = load_encoder(small_run / "encoder.safetensors", device, mirror=True, shift=2)
    save_model(tmp_path / "moved.safetensors", images, model.metadiff, model.header)
    back = load_model(tmp_path / "moved.safetensors", device)
    assert (back.images.mirror, back.images.shift) == (True, 2) and back.images.key == images.key
    for shift in (-1, 1.5, True, "3", back.images.size):
        header = {**back.header, "image": {**back.header["image"], "shift": shift}}
        save_checkpoint(tmp_path / "odd.safetensors", "model", model_tensors(images, model.metadiff), header)
        with pytest.raises(CheckpointError, match="does not hold what its header says"):
            load_model(tmp_path / "odd.safetensors", device)


def test_a_header_whose_length_looks_like_a_pickle_is_read(tmp_path: Path) -> None:
    """The first byte of a pickle is 0x80, and so is that of every 32nd safetensors file: its header's length."""
    path = tmp_path / "c.safetensors"
    for size in range(300):
        save_checkpoint(path, "encoder", {"a": torch.zeros(1)}, {"note": "x" * size})
        if path.read_bytes()[0] == 0x80:
            break
    assert path.read_bytes()[0] == 0x80
    assert load_checkpoint(path, "encoder").header["note"] == "x" * size


def test_an_encoder_that_averages_its_maps_takes_larger_images_and_conv4_says_why_not() -> None:
    device, plain = torch.device("cpu"), (0.5, 0.5, 0.5)
    pooled = ImageEncoder(build_encoder("resnet10"), "resnet10", 28, plain, plain, False, device)
    pixels = torch.zeros(1, 44, 44, 3, dtype=torch.uint8)
    assert resized(pooled, 44).encode(pixels).shape == (1, 512) and resized(pooled, 44).key != pooled.key
    flat = ImageEncoder(build_encoder("conv4"), "conv4", 28, plain, plain, False, device)
    with pytest.raises(ConfigError, match=r"features\.size"):
        resized(flat, 44)
