"""Decoded once, found again by content, made again when damaged, never in the way of another process."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from metadiff_cli.data import cache
from metadiff_cli.data.cache import DecodedSplit, channel_statistics, decode_images, decode_split
from metadiff_cli.data.folders import Split, scan_classes
from metadiff_cli.errors import DataError

SIZE = 8


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three classes of four images; the red of an image is ten times its number."""
    for number in range(12):
        draw(tmp_path / "photos" / f"class{number // 4}" / f"{number}.png", 10 * number)
    return tmp_path / "photos"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def decodings(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were decoded, in no order."""
    seen: list[Path] = []
    original = cache.load_square

    def counted(path: Path, size: int) -> np.ndarray:
        seen.append(path)
        return original(path, size)

    monkeypatch.setattr(cache, "load_square", counted)
    return seen


def draw(path: Path, red: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (10, 12), (red, 0, 255)).save(path)


def decode(root: Path, store: Path, size: int = SIZE) -> DecodedSplit:
    return decode_split(scan_classes(root), size, store, workers=2)


def reds(decoded: DecodedSplit) -> list[int]:
    return [int(red) for red in decoded.images[:, 0, 0, 0]]


def test_images_labels_and_paths_belong_together(photos: Path, store: Path) -> None:
    seen: list[tuple[int, int]] = []
    decoded = decode_split(scan_classes(photos), SIZE, store, progress=lambda done, total: seen.append((done, total)))
    assert decoded.images.shape == (12, SIZE, SIZE, 3) and decoded.images.dtype == np.uint8
    assert [10 * int(Path(path).stem) for path in decoded.paths] == reds(decoded)
    assert [f"class{label}" for label in decoded.labels] == [Path(path).parent.name for path in decoded.paths]
    assert decoded.labels.dtype == np.int64 and decoded.broken == () and decoded.notes == ()
    assert seen == [(i + 1, 12) for i in range(12)]


def test_images_are_mapped_and_read_only(photos: Path, store: Path) -> None:
    images = decode(photos, store).images
    assert isinstance(images, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        images[0] = 0


def test_a_second_run_decodes_nothing(photos: Path, store: Path, decodings: list[Path]) -> None:
    first = decode(photos, store)
    decodings.clear()
    second = decode(photos, store)
    assert decodings == [] and second.key == first.key
    assert np.array_equal(second.images, first.images)


def test_a_moved_folder_is_not_decoded_again(photos: Path, store: Path, tmp_path: Path, decodings: list[Path]) -> None:
    first = decode(photos, store)
    decodings.clear()
    moved = decode(photos.rename(tmp_path / "elsewhere"), store)
    copied = decode(Path(shutil.copytree(tmp_path / "elsewhere", tmp_path / "copy")), store)
    assert decodings == [] and moved.key == copied.key == first.key
    assert moved.paths[0].startswith(str(tmp_path / "elsewhere"))


def test_changes_are_noticed(photos: Path, store: Path) -> None:
    keys = [decode(photos, store).key]
    draw(photos / "class0" / "0.png", 201)
    changed = decode(photos, store)
    assert reds(changed)[0] == 201
    draw(photos / "class0" / "00.png", 7)
    added = decode(photos, store)
    assert len(added.images) == 13
    (photos / "class1" / "5.png").unlink()
    removed = decode(photos, store)
    assert len(removed.images) == 12
    (photos / "class1").rename(photos / "renamed")
    keys += [changed.key, added.key, removed.key, decode(photos, store).key, decode(photos, store, 9).key]
    assert len(set(keys)) == 6


def test_a_change_with_the_old_time_is_noticed(photos: Path, store: Path) -> None:
    path = photos / "class0" / "0.png"
    decode(photos, store)
    before, size = path.stat().st_mtime_ns, path.stat().st_size
    draw(path, 99)
    os.utime(path, ns=(before, before))
    assert path.stat().st_size == size
    assert reds(decode(photos, store))[0] == 99


def test_broken_images_are_left_out_and_listed(photos: Path, store: Path, decodings: list[Path]) -> None:
    (photos / "class1" / "5.png").write_bytes(b"no image")
    (photos / "class2" / "gone.png").symlink_to("nowhere.png")
    for _ in range(2):
        decoded = decode(photos, store)
        assert reds(decoded) == [10 * int(Path(path).stem) for path in decoded.paths]
        assert len(decoded.images) == len(decoded.labels) == 11
        assert {Path(path).name: reason for path, reason in decoded.broken} == {
            "5.png": "not an image, or damaged",
            "gone.png": "does not exist",
        }
    assert len(decodings) == 13


def test_a_class_without_any_readable_image(photos: Path, store: Path) -> None:
    for path in (photos / "class2").iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(DataError, match="none of the images of class 'class2'"):
        decode(photos, store)
    assert not [path for path in store.iterdir() if path.suffix in {".npy", ".tmp"}]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def other_shape(path: Path) -> None:
    np.save(path, np.zeros((12, SIZE, SIZE, 1), dtype=np.uint8))


def fewer(path: Path) -> None:
    np.save(path, np.zeros((3, SIZE, SIZE, 3), dtype=np.uint8))


def pickled(path: Path) -> None:
    np.save(path, np.array([{}]), allow_pickle=True)


@pytest.mark.parametrize("damage", [truncate, empty, other_shape, fewer, pickled, Path.unlink])
def test_a_damaged_array_is_made_again(photos: Path, store: Path, damage: object) -> None:
    first = decode(photos, store)
    expected, key = first.images.copy(), first.key
    del first
    assert callable(damage)
    damage(store / f"{key}.npy")
    again = decode(photos, store)
    assert np.array_equal(again.images, expected) and again.key == key


@pytest.mark.parametrize("content", ["", "{", "[]", "5", '{"key": 5}', '[[99, "x"]]', '[["a", 1]]', "[1]", '{"a": 1}'])
def test_damaged_json_is_made_again(photos: Path, store: Path, content: str) -> None:
    expected = decode(photos, store).images.copy()
    for path in store.glob("*.json"):
        path.write_text(content, encoding="utf-8")
    assert np.array_equal(decode(photos, store).images, expected)


def test_nothing_is_pickled_and_no_leftovers(photos: Path, store: Path) -> None:
    (photos / "class1" / "5.png").write_bytes(b"no image")
    key = decode(photos, store).key
    np.load(store / f"{key}.npy", allow_pickle=False)
    assert {path.suffix for path in store.iterdir()} <= {".npy", ".json", ".lock"}
    assert all(json.loads(path.read_text(encoding="utf-8")) for path in store.glob("*.json"))


def test_a_cache_that_cannot_be_written_to(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decodings: list[Path]
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    for _ in range(2):
        decoded = decode(photos, blocked / "cache")
        assert len(decoded.images) == 12 and "cannot be written to" in decoded.notes[0]
    if hasattr(os, "getuid"):
        assert len(decodings) == 12  # the second run found what the first one left


def test_a_filled_cache_needs_no_writing(photos: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decode(photos, store)

    def refuse(folder: Path) -> Path:
        raise AssertionError("writes")

    monkeypatch.setattr(cache, "writable", refuse)
    assert decode(photos, store).notes == ()


def test_a_full_disk_is_said_before(photos: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10, 5, 5))
    with pytest.raises(DataError, match="METADIFF_CACHE_DIR"):
        decode(photos, store)


def test_two_threads_fill_the_same_cache(photos: Path, store: Path, decodings: list[Path]) -> None:
    split, results = scan_classes(photos), []
    threads = [threading.Thread(target=lambda: results.append(decode_split(split, SIZE, store))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(decodings) == 12 and len({result.key for result in results}) == 1
    assert all(np.array_equal(result.images, results[0].images) for result in results) and len(results) == 4


def test_an_interrupted_run_leaves_nothing_half(photos: Path, store: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        decode_split(scan_classes(photos), SIZE, store, progress=interrupt)
    assert not list(store.glob("*.npy")) and not list(store.glob(".*"))
    assert len(decode(photos, store).images) == 12


def test_pixels_that_are_no_files(store: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, SIZE, SIZE, 3), dtype=np.uint8)
    split = Split("test", ("a", "b"), tuple("012345"), (0, 0, 0, 1, 1, 1), "r", pixels)
    assert np.array_equal(decode_split(split, SIZE, store).images, pixels)
    assert decode_split(split, 16, store).images.shape == (6, 16, 16, 3)
    other = Split("test", ("a", "b"), tuple("012345"), (0, 0, 0, 1, 1, 1), "r", pixels[::-1])
    assert decode_split(other, SIZE, store).key != decode_split(split, SIZE, store).key


def test_decode_images_streams_in_order(photos: Path, decodings: list[Path]) -> None:
    paths = sorted(photos.rglob("*.png")) * 20 + [photos / "gone.png"]
    stream = decode_images(paths, SIZE, workers=2)
    next(stream)
    assert len(decodings) < len(paths) / 2
    found = list(stream)
    assert [path for path, _ in found] == paths[1:]
    assert found[-1][1] == "does not exist" and isinstance(found[0][1], np.ndarray)
    assert list(decode_images([], SIZE)) == []


def test_channel_statistics_are_those_of_the_pixels() -> None:
    images = np.random.default_rng(0).integers(0, 256, (50, 6, 6, 3), dtype=np.uint8)
    images[..., 2] = 128
    mean, std = channel_statistics(images)
    assert np.allclose(mean, (images / 255).mean(axis=(0, 1, 2)), atol=1e-12)
    assert np.allclose(std[:2], (images / 255).std(axis=(0, 1, 2))[:2], atol=1e-12)
    assert std[2] == 1e-3  # never zero: it is divided by
    assert channel_statistics(images, limit=2) == channel_statistics(images[[0, 49]])


def test_data_imports_without_torch() -> None:
    code = "import sys, metadiff_cli.data.benchmarks, metadiff_cli.data.cache; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
