"""The image scanner: any tree of folders and links ends, any file is an image or a reason, within limits."""

import io
import os
import struct
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from metadiff_cli.data import images as module
from metadiff_cli.data.benchmarks import open_dataset
from metadiff_cli.data.cache import decode_images
from metadiff_cli.data.images import load_square
from metadiff_cli.data.scan import Scan, walk_images
from metadiff_cli.errors import DataError, MetaDiffError

FORMATS = ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"]


def picture(kind: str) -> bytes:
    """A small real image file."""
    pixels = np.random.default_rng(0).integers(0, 255, (20, 24, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


WHOLE = {kind: picture(kind) for kind in FORMATS}


def read(raw: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.png"
        path.write_bytes(raw)
        ((_, found),) = decode_images([path], 16, workers=1)
        if isinstance(found, str):
            assert found and str(path) not in found
        else:
            assert found.shape == (16, 16, 3) and found.dtype == np.uint8


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(FORMATS), st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=8), st.booleans())
def test_damaged_images(kind: str, place: float, new: bytes, cut: bool) -> None:
    whole = WHOLE[kind]
    start = int(place * len(whole))
    read(whole[:start] + new + (b"" if cut else whole[start + len(new) :]))


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(FORMATS), st.binary(max_size=60))
def test_the_beginning_of_an_image_and_then_anything(kind: str, rest: bytes) -> None:
    read(WHOLE[kind][:12] + rest)


def png(width: int, height: int, depth: int = 8, colour: int = 2) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("width", "height"), [(60_000, 60_000), (2**31 - 1, 1), (1, 2**31 - 1), (0, 0), (20_000, 9_000)]
)
def test_lying_sizes_are_refused(tmp_path: Path, width: int, height: int) -> None:
    (tmp_path / "x.png").write_bytes(png(width, height))
    with pytest.raises(DataError, match=r"x\.png"):
        load_square(tmp_path / "x.png", 84)


def test_deep_images_have_a_limit_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(np.zeros((30, 30), dtype=np.uint16)).save(tmp_path / "x.png")
    assert load_square(tmp_path / "x.png", 16).shape == (16, 16, 3)
    monkeypatch.setattr(module, "MAX_DEEP", 800)
    with pytest.raises(DataError, match="pixels of I"):
        load_square(tmp_path / "x.png", 16)


NAMES = st.sampled_from(
    ["a", "b", "ß é", "x.png", "y.JPG", ".hidden", "train", "val", "test", "日本", "n.txt", "-", " "]
)
NODES = st.lists(st.tuples(st.lists(NAMES, min_size=1, max_size=4), st.sampled_from(["file", "folder", "link", "pipe"]),
                           st.integers(0, 20)), max_size=14)  # fmt: skip


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(NODES)
def test_any_tree_ends(nodes: list[tuple[list[str], str, int]]) -> None:
    with tempfile.TemporaryDirectory() as place:
        root = Path(place) / "root"
        root.mkdir()
        made = [root]
        for names, kind, target in nodes:
            path = root.joinpath(*names)
            if os.path.lexists(path):
                continue  # writing into a pipe would wait for a reader
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                if kind == "folder":
                    path.mkdir()
                elif kind == "link":
                    path.symlink_to(made[target % len(made)])
                elif kind == "pipe":
                    os.mkfifo(path)
                else:
                    path.write_bytes(b"x")
                made.append(path)
            except OSError:
                continue  # a name that is taken, or a file where a folder is wanted
        for layout in ("auto", "folder"):
            try:
                dataset = open_dataset(root, layout=layout)
                assert all(split.paths for split in dataset.splits.values())
            except MetaDiffError as error:
                assert error.hint


def test_links_between_all_folders_end(tmp_path: Path) -> None:
    folders = [tmp_path / "root" / f"f{i}" for i in range(12)]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "1.png").write_bytes(b"x")
    for folder in folders:
        for other in folders:
            (folder / f"to-{other.name}").symlink_to(other)
    with pytest.raises(DataError, match="ways"):
        list(walk_images(tmp_path / "root", Scan()))


def test_a_chain_of_double_links_ends(tmp_path: Path) -> None:
    for i in range(40):
        (tmp_path / f"{i:02d}").mkdir()
        (tmp_path / f"{i:02d}" / "a").symlink_to(tmp_path / f"{i + 1:02d}")
        (tmp_path / f"{i:02d}" / "b").symlink_to(tmp_path / f"{i + 1:02d}")
    (tmp_path / "40").mkdir()
    with pytest.raises(DataError, match="ways"):
        list(walk_images(tmp_path / "00", Scan()))


@pytest.mark.parametrize(("name", "count"), [("d", 1500), ("n" * 250, 100)])
def test_folders_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, count: int) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(count):
        os.mkdir(name)
        os.chdir(name)
    scan = Scan()
    if len(name) == 1:
        with pytest.raises(DataError, match="folders deep"):
            list(walk_images(tmp_path, scan))
    else:
        assert list(walk_images(tmp_path, scan)) == [] and scan.unreadable[0][1] == "File name too long"
    for _ in range(count):  # one by one: the whole path is longer than the system takes
        os.chdir("..")
        os.rmdir(name)
