"""Archives from strangers: nothing leaves the target, and damage is told."""

import os
import stat
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from metadiff_cli.data import archives
from metadiff_cli.data.archives import unpack
from metadiff_cli.errors import DataError
from tests.worlds import tar_of, zip_of

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


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = zip_of(tmp_path / "x.zip", {"zeros.png": bytes(10_000_000)})
    assert archive.stat().st_size < 20_000
    free = os.statvfs(target).f_bavail * os.statvfs(target).f_frsize
    monkeypatch.setattr(archives, "SPARE", free)
    with pytest.raises(DataError, match=r"unpacks to 0\.0 GB"):
        unpack(archive, target)
    assert list(target.iterdir()) == []


def test_too_many_files_are_refused(tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MAX_FILES", 1)
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
