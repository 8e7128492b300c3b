"""A close look at a data set: what is odd or broken is named with its path and a reason."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from metadiff_cli.data.benchmarks import open_dataset
from metadiff_cli.data.verify import Report, verify


def draw(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def noise(seed: int, height: int = 20, width: int = 24) -> np.ndarray:
    pixels: np.ndarray = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return pixels


def looked(root: Path) -> Report:
    return verify(open_dataset(root, keep_empty=True), workers=1)


def test_what_is_broken_has_a_reason_that_says_what_to_do(tmp_path: Path) -> None:
    for cls in "ab":
        draw(tmp_path / cls / "fine.png", noise(ord(cls)))
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
    for name, content in {"empty.png": b"", "pointer.jpg": pointer, "words.png": b"x"}.items():
        (tmp_path / "a" / name).write_bytes(content)
    (tmp_path / "a" / "gone.png").symlink_to("nowhere")
    report = looked(tmp_path)
    reasons = {Path(path).name: reason for path, reason in report.corrupt}
    assert reasons["empty.png"] == "the file is empty" and "git lfs pull" in reasons["pointer.jpg"]
    assert reasons["words.png"] == "not an image, or damaged" and reasons["gone.png"] == "does not exist"
    assert report.counts == {"test": {"a": 1, "b": 1}} and report.images == 2


def test_a_folder_that_cannot_be_listed_is_among_the_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for cls in "ab":
        draw(tmp_path / cls / "fine.png", noise(ord(cls)))
    (tmp_path / "locked").mkdir()
    real = Path.iterdir

    def iterdir(self: Path) -> object:
        if self.name == "locked":
            raise PermissionError(13, "Permission denied")
        return real(self)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    assert looked(tmp_path).corrupt == [(str(tmp_path / "locked"), "Permission denied")]


def test_greyscale_whose_white_is_lower_than_the_file_could_hold_is_named(tmp_path: Path) -> None:
    for name, top in (("ten.png", 1000), ("twelve.tif", 4095), ("sixteen.png", 65535)):
        values = np.linspace(0, top, 400).reshape(20, 20).astype(np.uint16)
        draw(tmp_path / "a" / name, values)
    found = {Path(path).name: what for path, what in looked(tmp_path).odd}
    assert "10 are in use: white is 1023" in found["ten.png"] and "12 are in use" in found["twelve.tif"]
    assert "sixteen.png" not in found


def test_repeated_pictures_are_filed_under_the_worst_that_they_do(tmp_path: Path) -> None:
    draw(tmp_path / "train" / "a" / "1.png", noise(1))
    draw(tmp_path / "train" / "a" / "2.bmp", noise(1))
    draw(tmp_path / "train" / "b" / "3.png", noise(2))
    draw(tmp_path / "train" / "a" / "4.png", noise(2))
    draw(tmp_path / "test" / "c" / "5.png", noise(3))
    draw(tmp_path / "train" / "b" / "6.png", noise(3))
    report = looked(tmp_path)
    names = [[{Path(p).name for p in group} for group in kind]
             for kind in (report.within_class, report.across_classes, report.across_splits)]  # fmt: skip
    assert names == [[{"1.png", "2.bmp"}], [{"3.png", "4.png"}], [{"5.png", "6.png"}]]


def test_odd_images_are_named(tmp_path: Path) -> None:
    draw(tmp_path / "a" / "tiny.png", noise(1, 8, 8))
    draw(tmp_path / "a" / "long.png", noise(2, 20, 100))
    draw(tmp_path / "a" / "plain.png", np.full((20, 20, 3), 7, dtype=np.uint8))
    found = {Path(path).name: what for path, what in looked(tmp_path).odd}
    assert found["tiny.png"].startswith("tiny") and found["long.png"].startswith("long")
    assert found["plain.png"] == "one colour all over"
