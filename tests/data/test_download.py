"""Known data sets into their places; archives from strangers: nothing leaves the target, and damage is told."""

import os
import stat
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from metadiff_cli.data import download as module
from metadiff_cli.data.benchmarks import KNOWN, LAYOUTS, known, split_lists
from metadiff_cli.data.download import prepare, unpack
from metadiff_cli.errors import ConfigError, DataError
from tests.worlds import Result, paint, tar_of, zip_of

CLI = Callable[..., Result]


@pytest.fixture
def birds(tmp_path: Path) -> Path:
    """An archive as the one of CUB, with two classes of each split."""
    paint(tmp_path / "bird.jpg", (200, 30, 90), seed=1)
    picture = (tmp_path / "bird.jpg").read_bytes()
    names = [name for split in split_lists("cub").values() for name in split[:2]]
    files = {f"CUB_200_2011/images/{name}/1.jpg": picture for name in names}
    return tar_of(tmp_path / "CUB_200_2011.tgz", {**files, "attributes.txt": b"x"})


def test_every_known_layout_can_be_opened_and_the_reverse() -> None:
    assert set(KNOWN) == {*LAYOUTS, "glyphs"}
    assert all(data.licence and data.home and (data.archives or data.name == "glyphs") for data in KNOWN.values())


def test_from_an_archive(tmp_path: Path, birds: Path) -> None:
    dataset = prepare(known("cub"), tmp_path / "root", [birds])
    assert {name: len(split.classes) for name, split in dataset.splits.items()} == {"train": 2, "val": 2, "test": 2}
    assert [p.name for p in (tmp_path / "root").iterdir()] == ["cub"]  # nothing temporary is left
    again = prepare(known("cub"), tmp_path / "root", [])
    assert again.splits.keys() == dataset.splits.keys()


def test_a_folder_around_the_data_set_is_taken_off(tmp_path: Path) -> None:
    names = [name for split in split_lists("mini-imagenet").values() for name in split[:2]]
    archive = zip_of(tmp_path / "x.zip", {f"download/mini/{name}/1.png": b"x" for name in names})
    prepare(known("mini-imagenet"), tmp_path, [archive])
    assert {p.name for p in (tmp_path / "mini-imagenet").iterdir()} == set(names)


def test_the_wrong_archive_leaves_nothing(tmp_path: Path) -> None:
    archive = zip_of(tmp_path / "x.zip", {"a/1.png": b"x", "b/1.png": b"x"})
    with pytest.raises(DataError, match="not cub"):
        prepare(known("cub"), tmp_path / "root", [archive])
    assert list((tmp_path / "root").iterdir()) == []


def test_other_things_in_the_place_are_kept(tmp_path: Path, birds: Path) -> None:
    (tmp_path / "cub").mkdir()
    (tmp_path / "cub" / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="something else"):
        prepare(known("cub"), tmp_path, [birds])
    assert (tmp_path / "cub" / "mine.txt").read_text() == "mine"


def test_a_file_in_the_place_is_kept_and_told_before_anything_is_unpacked(tmp_path: Path, birds: Path) -> None:
    (tmp_path / "cub").write_text("mine")
    with pytest.raises(ConfigError, match="is a file"):
        prepare(known("cub"), tmp_path, [birds])
    assert (tmp_path / "cub").read_text() == "mine"


def test_a_link_to_another_disk_stays(tmp_path: Path, birds: Path) -> None:
    (tmp_path / "disk" / "birds").mkdir(parents=True)
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "cub").symlink_to(tmp_path / "disk" / "birds")
    prepare(known("cub"), tmp_path / "root", [birds])
    assert (tmp_path / "root" / "cub").is_symlink() and (tmp_path / "disk" / "birds" / "attributes.txt").is_file()


def test_what_comes_into_the_place_meanwhile_is_kept(
    tmp_path: Path, birds: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = module._find

    def slow(*arguments: Any) -> Path:
        (tmp_path / "cub").mkdir()
        (tmp_path / "cub" / "mine.txt").write_text("mine")
        return find(*arguments)

    monkeypatch.setattr(module, "_find", slow)
    with pytest.raises(ConfigError, match="something else meanwhile"):
        prepare(known("cub"), tmp_path, [birds])
    assert (tmp_path / "cub" / "mine.txt").read_text() == "mine"


FAILURES = [URLError("no network"), RuntimeError("File not found or corrupted."), OSError(28, "No space left")]


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("name", ["omniglot", "cifar-fs"])
def test_a_failed_download_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, failure: Exception
) -> None:
    def fail(datasets: object, work: Path) -> None:
        (work / "half.zip").write_bytes(b"x")
        print("noise")
        raise failure

    urls, _ = module.DOWNLOADS[name]
    monkeypatch.setitem(module.DOWNLOADS, name, (urls, fail))
    with pytest.raises(DataError, match="could not be downloaded") as caught:
        prepare(known(name), tmp_path, [])
    hint = str(caught.value.hint)
    assert "https://" in hint and f"metadiff data prepare {name} --root {tmp_path} --from-archive" in hint
    assert list(tmp_path.iterdir()) == []


def test_a_download_is_checked_and_laid_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = split_lists("omniglot")["train"]["background"]
    alphabet, characters = next(iter(parts.items()))

    def fetch(datasets: object, work: Path) -> None:
        paint(work / "omniglot-py" / "images_background" / alphabet / characters[0] / "1.png", (0, 0, 0), seed=1)
        (work / "omniglot-py" / "images_background.zip").write_bytes(b"x")

    urls, _ = module.DOWNLOADS["omniglot"]
    monkeypatch.setitem(module.DOWNLOADS, "omniglot", (urls, fetch))
    dataset = prepare(known("omniglot"), tmp_path, [])
    assert dataset.splits["train"].classes == (f"{alphabet}/{characters[0]}",)
    assert not list(tmp_path.rglob("*.zip"))


def test_what_cannot_be_downloaded_says_where_to_ask(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"image-net\.org") as caught:
        prepare(known("tiered-imagenet"), tmp_path, [])
    assert "--from-archive" in str(caught.value.hint)


@pytest.mark.parametrize(("name", "word"), [("omniglt", "did you mean 'omniglot'"), ("cifar-100", "cifar-fs or fc100")])
def test_unknown_names_have_a_suggestion(name: str, word: str) -> None:
    with pytest.raises(ConfigError) as caught:
        known(name)
    assert word in str(caught.value.hint)


def test_a_root_that_cannot_be_made(tmp_path: Path, birds: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="cannot be written to"):
        prepare(known("cub"), tmp_path / "file", [birds])


def test_the_command(cli: CLI, tmp_path: Path, birds: Path) -> None:
    result = cli("data", "prepare", "cub", "--root", tmp_path / "r", "--from-archive", birds)
    assert result.code == 0, result.err
    assert "cub" in result.out and "train 2 classes and 2 images" in result.out
    assert "194 of the 200 classes" in result.err
    assert cli("data", "prepare", "glyphs").code == 0
    missing = cli("data", "prepare", "cub", "--from-archive", tmp_path / "no.tgz")
    assert missing.code == 3 and "no.tgz" in missing.err


FILES = {"a/1.png": b"one", "a/b/2.png": b"", "ß é.png": b"x" * 3000}


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "in" / "target").mkdir(parents=True)
    return tmp_path / "in" / "target"


@pytest.mark.parametrize(("name", "make"), [("x.zip", zip_of), ("x.tar", tar_of), ("x.tgz", tar_of)])
def test_files_come_out_as_they_went_in(tmp_path: Path, target: Path, name: str, make: Callable[..., Path]) -> None:
    seen: list[tuple[int, int]] = []
    assert unpack(make(tmp_path / name, FILES), target, lambda done, total: seen.append((done, total))) == 3
    assert tree(target) == FILES and seen[-1] == (3, 3)


EVIL = ["../out.png", "a/../../out.png", "/tmp/metadiff-out.png", "..\\out.png", "C:\\out.png", "a/b/../../../out.png"]


@pytest.mark.parametrize("name", EVIL)
@pytest.mark.parametrize("make", [zip_of, tar_of])
def test_nothing_is_written_outside(tmp_path: Path, target: Path, name: str, make: Callable[..., Path]) -> None:
    archive = make(tmp_path / "evil", {"a.png": b"1", name: b"2"})
    with pytest.raises(DataError, match="outside of the target"):
        unpack(archive, target)
    assert tree(tmp_path / "in") == {} and not Path("/tmp/metadiff-out.png").exists()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_refused(tmp_path: Path, target: Path, kind: bytes) -> None:
    info = tarfile.TarInfo("link")
    info.type, info.linkname = kind, "/etc"
    with pytest.raises(DataError, match="link or a device"):
        unpack(tar_of(tmp_path / "x.tar", FILES, info), target)
    assert list(target.iterdir()) == []


def test_a_link_in_a_zip_is_refused(tmp_path: Path, target: Path) -> None:
    info = zipfile.ZipInfo("link")
    info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
        file.writestr(info, "/etc")
    with pytest.raises(DataError, match="link or a device"):
        unpack(tmp_path / "x.zip", target)


def test_a_name_twice_overwrites_nothing(tmp_path: Path, target: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
        file.writestr("a.png", "first")
        file.writestr("a.png", "second")
    with pytest.raises(DataError, match="exists"):
        unpack(tmp_path / "x.zip", target)
    assert tree(target) == {"a.png": b"first"}


@pytest.mark.parametrize("make", [zip_of, tar_of])
def test_a_file_of_an_earlier_archive_is_not_overwritten(
    tmp_path: Path, target: Path, make: Callable[..., Path]
) -> None:
    (target / "a").mkdir()
    (target / "a" / "1.png").write_bytes(b"mine")
    with pytest.raises(DataError, match="exists"):
        unpack(make(tmp_path / "x", FILES), target)
    assert (target / "a" / "1.png").read_bytes() == b"mine"


def test_a_zip_that_holds_more_than_it_says_is_refused(tmp_path: Path, target: Path) -> None:
    whole = bytearray(zip_of(tmp_path / "x.zip", {"a.png": bytes(3000)}).read_bytes())
    central = whole.index(b"PK\x01\x02")
    whole[central + 24 : central + 28] = (1).to_bytes(4, "little")
    (tmp_path / "x.zip").write_bytes(whole)
    with pytest.raises(DataError, match="damaged"):
        unpack(tmp_path / "x.zip", target)
    assert all(len(content) <= 1 for content in tree(target).values())


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = zip_of(tmp_path / "x.zip", {"zeros.png": bytes(10_000_000)})
    assert archive.stat().st_size < 20_000
    free = os.statvfs(target).f_bavail * os.statvfs(target).f_frsize
    monkeypatch.setattr(module, "SPARE", free)
    with pytest.raises(DataError, match=r"unpacks to 0\.0 GB"):
        unpack(archive, target)
    assert list(target.iterdir()) == []


def test_too_many_files_are_refused(tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_FILES", 1)
    for make in (zip_of, tar_of):
        with pytest.raises(DataError, match="more than 1 files"):
            unpack(make(tmp_path / "x", FILES), target)


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04" + bytes(30), b"\x1f\x8b" + bytes(20)])
def test_other_files_are_no_archives(tmp_path: Path, target: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(DataError, match=r"archive|unpacked"):
        unpack(tmp_path / "x", target)


@pytest.mark.parametrize("make", [zip_of, tar_of])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), change=st.integers(1, 255), cut=st.booleans())
def test_damage_anywhere_is_told(
    tmp_path: Path, make: Callable[..., Path], place: float, change: int, cut: bool
) -> None:
    whole = make(tmp_path / "whole.tgz", FILES).read_bytes()
    position = int(place * len(whole))
    bad = whole[:position] if cut else whole[:position] + bytes([whole[position] ^ change]) + whole[position + 1 :]
    with tempfile.TemporaryDirectory(dir=tmp_path) as work:
        (Path(work) / "x").write_bytes(bad)
        (Path(work) / "target").mkdir()
        try:
            unpack(Path(work) / "x", Path(work) / "target")
        except DataError as error:
            assert error.hint
        assert {p.name for p in Path(work).iterdir()} == {"x", "target"}
