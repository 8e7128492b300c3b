"""A walk through folders: which files are images, and what happens to all others."""

import os
from pathlib import Path

import pytest
from PIL import Image

from metadiff_cli.data.scan import Scan, check_folder, class_name, left_out, walk_images
from metadiff_cli.errors import DataError


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def names(root: Path, scan: Scan | None = None) -> list[str]:
    return [path.name for path in walk_images(root, scan or Scan())]


def test_links_are_followed_and_loops_end(tmp_path: Path) -> None:
    touch(tmp_path, "data/a/1.png", "elsewhere/2.png")
    (tmp_path / "data/a/up").symlink_to(tmp_path / "data", target_is_directory=True)
    (tmp_path / "data/a/self").symlink_to("self")
    (tmp_path / "data/a/more").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    found = [Path(path).name for path in walk_images(tmp_path / "data", Scan())]
    assert found.count("2.png") >= 1 and len(found) < 10


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_no_image(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.png")
    os.mkfifo(tmp_path / "a/2.png")
    scan = Scan()
    assert names(tmp_path, scan) == ["1.png"] and scan.skipped == {".png": 1}


def test_files_of_other_kinds_are_counted_by_extension(tmp_path: Path) -> None:
    touch(tmp_path, "1.png", "a.TXT", "b.txt", "sub/c.md", "README", "d.pdf", "e.eps", ".hidden")
    scan = Scan()
    assert names(tmp_path, scan) == ["1.png"]
    assert scan.skipped == {".txt": 2, ".md": 1, "": 1, ".pdf": 1, ".eps": 1}
    assert left_out(scan.skipped).startswith("left out, as they are not images: 2 .txt, 1 ")
    assert "1 without extension" in left_out(scan.skipped) and left_out(Scan().skipped) == ""


def test_an_image_without_an_extension_is_one(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4), "red").save(tmp_path / "photo", format="JPEG")
    (tmp_path / "words").write_text("hello")
    (tmp_path / "empty").touch()
    scan = Scan()
    assert names(tmp_path, scan) == ["photo"] and scan.skipped == {"": 2}


@pytest.mark.parametrize("suffix", [".ppm", ".pgm", ".jp2", ".tga", ".PNG"])
def test_other_formats_of_images_are_found(tmp_path: Path, suffix: str) -> None:
    assert names(touch(tmp_path, f"1{suffix}")) == [f"1{suffix}"]


def test_a_folder_that_cannot_be_listed_is_collected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "a/1.png", "secret/2.png", "z/3.png")
    real = Path.iterdir

    def iterdir(self: Path) -> object:
        if self.name == "secret":
            raise PermissionError(13, "Permission denied")
        return real(self)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    scan = Scan()
    assert names(tmp_path, scan) == ["1.png", "3.png"]
    assert scan.unreadable == [(tmp_path / "secret", "Permission denied")]


@pytest.mark.parametrize(
    ("path", "told"), [("x" * 300, "File name too long"), ("a\0b", "null byte"), ("gone/below", "does not exist")]
)
def test_paths_that_cannot_be_looked_at_are_errors_with_a_reason(tmp_path: Path, path: str, told: str) -> None:
    with pytest.raises(DataError, match=told):
        check_folder(tmp_path / path)


def test_names_have_one_spelling() -> None:
    assert class_name("cafe\u0301") == "caf\u00e9" and class_name("caf\udce9") == "caf\\xe9"
    assert class_name(os.fsdecode("狐".encode())) == "狐"
