"""The feature bank: made once, in shards that an interruption leaves behind, whatever memory and disk allow."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from metadiff_cli.core.encoders import bank as features
from metadiff_cli.core.encoders.bank import Bank, Encoding, FeatureBank, PixelBank, build_bank
from metadiff_cli.core.encoders.image_encoder import ImageEncoder
from metadiff_cli.errors import DataError, MetaDiffError
from tests.worlds import small_encoder

PIXELS = np.random.default_rng(0).integers(0, 256, (10, 32, 32, 3), dtype=np.uint8)


@pytest.fixture
def encoder() -> ImageEncoder:
    return small_encoder(32)


def build(encoder: ImageEncoder, folder: Path, progress: Callable[[int, int], None]) -> FeatureBank:
    labels = np.repeat([0, 1], 5)
    return build_bank(encoder, PIXELS, labels, ("a", "b"), folder=folder, key="k" * 32, batch=4,
                      progress=progress)  # fmt: skip


def test_it_is_made_once_and_mended(encoder: ImageEncoder, tmp_path: Path) -> None:
    calls: list[int] = []

    def features_now() -> np.ndarray:
        calls.clear()
        return np.array(build(encoder, tmp_path, lambda done, total: calls.append(done)).features)

    first = features_now()
    assert calls == [4, 8, 10] and np.allclose(np.linalg.norm(first, axis=1), 1, atol=1e-5)
    assert np.array_equal(features_now(), first) and calls == []
    (file,) = tmp_path.glob("*.npy")
    file.write_bytes(file.read_bytes()[:200])
    assert np.array_equal(features_now(), first) and calls == [4, 8, 10]
    mirrored = encoder.encode(torch.from_numpy(PIXELS[:, :, ::-1].copy()))
    assert torch.allclose(mirrored, torch.from_numpy(first), atol=1e-5)  # averaged over both views


def test_an_interrupted_extraction_goes_on_after_its_last_shard(
    encoder: ImageEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "SHARD", 4)
    whole = np.array(build(encoder, tmp_path / "whole", lambda done, total: None).features)

    def stop(done: int, total: int) -> None:
        if done == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(encoder, tmp_path, stop)
    (parts,) = tmp_path.glob("*.parts")
    assert sorted(path.name for path in parts.iterdir()) == ["000000.npy", "000001.npy"]
    assert not list(tmp_path.glob("*.npy"))
    (parts / "000001.npy").write_bytes(b"cut short")
    encoded: list[int] = []
    monkeypatch.setattr(ImageEncoder, "encode", counting(ImageEncoder.encode, encoded))
    again = build(encoder, tmp_path, lambda done, total: None)
    assert encoded == [4, 2] and np.array_equal(again.features, whole)
    assert isinstance(again.features, np.memmap) and not parts.exists()


def counting(encode: Callable[[ImageEncoder, Tensor], Tensor], seen: list[int]) -> Callable[..., Tensor]:
    """`encode` that tells the images of each pass."""

    def counted(self: ImageEncoder, pixels: Tensor) -> Tensor:
        seen.append(len(pixels))
        return encode(self, pixels)

    return counted


def test_classes_one_after_another_are_its_rows() -> None:
    bank = FeatureBank(np.arange(12, dtype=np.float32).reshape(6, 2), np.array([1, 0, 1, 0, 0, 1]), ("a", "b"))
    first, second = bank.by_class()
    assert first[:, 0].tolist() == [2, 6, 8] and second[:, 0].tolist() == [0, 4, 10]
    assert bank.take(np.array([[0, 5]])).shape == (1, 2, 2) and bank.numbers_per_image == 2


def test_pixels_stay_pixels() -> None:
    bank = PixelBank(np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3), np.array([1, 0]), ("a", "b"))
    taken = bank.take(np.array([[1], [0]]))
    assert taken.shape == (2, 1, 2, 2, 3) and taken.dtype == torch.uint8 and taken[0, 0, 0, 0].tolist() == [12, 13, 14]
    assert bank.numbers_per_image == 12 and [rows.tolist() for rows in bank.class_indices()] == [[1], [0]]


@pytest.mark.parametrize("kind", ["features", "pixels"])
def test_classes_with_too_few_images_are_left_out_and_named(kind: str) -> None:
    """A folder of many classes, one of which has a single image, can still be evaluated on the others."""
    labels, classes = np.array([2, 0, 3, 0, 2, 1, 3, 3]), ("a", "b", "c", "d")
    values = np.arange(8 * 12)
    bank: Bank = (
        FeatureBank(values.reshape(8, 12).astype(np.float32), labels, classes)
        if kind == "features"
        else PixelBank(values.reshape(8, 2, 2, 3).astype(np.uint8), labels, classes)
    )
    kept, left_out = bank.with_images(2)
    assert (kept.classes, left_out) == (("a", "c", "d"), ("b",)) and type(kept) is type(bank)
    assert kept.labels.tolist() == [1, 0, 2, 0, 1, -1, 2, 2]
    assert torch.equal(kept.take(np.arange(8)), bank.take(np.arange(8)))  # rows keep their places
    assert kept.with_images(3)[0].labels.tolist() == [-1, -1, 0, -1, -1, -1, 0, 0]
    assert [len(rows) for rows in kept.class_indices()] == [2, 2, 3]
    assert bank.with_images(1) == (bank, ()) and bank.with_images(3)[0].classes == ("d",)
    none, all_of_them = bank.with_images(4)
    assert none.classes == () and all_of_them == classes


def test_the_batch_suits_the_device(encoder: ImageEncoder) -> None:
    assert Encoding(encoder).batch == 32 and Encoding(encoder, 7).batch == 7
    assert Encoding(replace(encoder, device=torch.device("cuda"))).batch == 256


def limited(room: int, seen: list[int]) -> Callable[..., Tensor]:
    """An encoder on a device that has room for `room` images."""

    def encode(self: ImageEncoder, pixels: Tensor) -> Tensor:
        seen.append(len(pixels))
        if len(pixels) > room:
            raise torch.OutOfMemoryError("no room")
        return pixels.flatten(1)[:, :4].float() / 255

    return encode


def test_without_memory_the_batch_is_halved_and_stays_so(
    encoder: ImageEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    monkeypatch.setattr(ImageEncoder, "encode", limited(2, seen))
    found = torch.cat(list(features.extract(Encoding(encoder, 8), PIXELS)))
    assert seen == [8, 4, 2, 2, 2, 2, 2]
    assert torch.equal(found, torch.from_numpy(PIXELS.reshape(10, -1)[:, :4]).float() / 255)


def test_one_image_that_does_not_fit_is_an_error(encoder: ImageEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageEncoder, "encode", limited(0, []))
    with pytest.raises(MetaDiffError, match="one image does not fit") as caught:
        Encoding(encoder, 8)(PIXELS)
    assert caught.value.hint is not None and "--device cpu" in caught.value.hint


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_refused(
    encoder: ImageEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    monkeypatch.setattr(ImageEncoder, "encode", lambda self, pixels: torch.full((len(pixels), 256), value))
    with pytest.raises(DataError, match="not finite"):
        build(encoder, tmp_path, lambda done, total: None)
    assert not list(tmp_path.rglob("*.npy"))


def test_images_per_pass_follow_the_device_unless_given(encoder: ImageEncoder) -> None:
    """On a CPU large batches take memory and are no faster."""
    assert Encoding(encoder).batch == 32 and Encoding(encoder, 7).batch == 7
    assert Encoding(replace(encoder, device=torch.device("cuda"))).batch == 256
