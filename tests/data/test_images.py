"""Every common mode and format becomes the right RGB; whatever is no image is refused with the file and a reason."""

import io
import struct
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps, features

from metadiff_cli.data import images
from metadiff_cli.data.images import BITS, FORMATS, IMAGE_SUFFIXES, load_rgb, load_square, to_square, upright_rgb
from metadiff_cli.errors import DataError

ORIENTATION = 0x0112


def saved(image: Image.Image, path: Path, **options: object) -> Path:
    image.save(path, **options)
    return path


def corner(image: Image.Image) -> tuple[int, ...]:
    pixel = image.getpixel((0, 0))
    assert isinstance(pixel, tuple)
    return pixel


@pytest.mark.parametrize("suffix", sorted(IMAGE_SUFFIXES))
def test_every_suffix_is_read(tmp_path: Path, suffix: str) -> None:
    if suffix in (".avif",) and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    if suffix in FORMATS["HEIF"]:
        pytest.importorskip("pillow_heif", reason="HEIC needs the extra [heic]").register_heif_opener()
    kind = next(kind for kind, suffixes in FORMATS.items() if suffix in suffixes)
    if kind not in images._formats() or kind not in Image.SAVE:
        pytest.skip(f"this Pillow writes no {kind}")
    path = saved(Image.new("RGB", (20, 10), (200, 100, 50)), tmp_path / f"a{suffix}", format=kind)
    image = load_rgb(path)
    assert (image.mode, image.size) == ("RGB", (20, 10))
    assert np.abs(np.array(corner(image)) - (200, 100, 50)).max() <= 8  # lossy formats


def test_no_format_starts_a_program() -> None:
    assert not {"EPS", "PDF", "WMF", "GRIB", "BUFR", "HDF5"} & {*images._formats()} and "TGA" in images._formats()


def test_a_format_without_a_signature_is_tried_by_its_extension_alone(tmp_path: Path) -> None:
    path = saved(Image.new("RGB", (20, 10), "red"), tmp_path / "a.tga")
    assert load_rgb(path).size == (20, 10)
    with pytest.raises(DataError, match="not an image"):
        load_rgb(path.rename(tmp_path / "a.png"))


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("1", 1, (255, 255, 255)),
        ("L", 77, (77, 77, 77)),
        ("LA", (77, 255), (77, 77, 77)),
        ("LA", (77, 0), (255, 255, 255)),
        ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
        ("RGBA", (10, 20, 30, 0), (255, 255, 255)),
        ("RGBA", (0, 0, 0, 128), (127, 127, 127)),
    ],
)
def test_modes(tmp_path: Path, mode: str, colour: int | tuple[int, ...], expected: tuple[int, ...]) -> None:
    assert corner(load_rgb(saved(Image.new(mode, (4, 4), colour), tmp_path / "a.png"))) == expected


def test_cmyk(tmp_path: Path) -> None:
    path = saved(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), tmp_path / "a.jpg", quality=100)
    red, green, blue = corner(load_rgb(path))
    assert red > 240 and green < 15 and blue < 15


def test_palette_with_and_without_transparency(tmp_path: Path) -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 10, 200, 30])
    assert corner(load_rgb(saved(image, tmp_path / "solid.png"))) == (10, 200, 30)
    assert corner(load_rgb(saved(image, tmp_path / "clear.png", transparency=1))) == (255, 255, 255)
    assert corner(load_rgb(saved(image, tmp_path / "bytes.png", transparency=bytes([255, 0])))) == (255, 255, 255)


def test_16_bit_png_is_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    path = saved(Image.fromarray(values), tmp_path / "a.png")
    assert np.asarray(load_rgb(path))[0, :, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize("order", ["<", ">"])
def test_16_bit_tiff_of_either_byte_order(tmp_path: Path, order: str) -> None:
    path = tmp_path / "a.tif"
    path.write_bytes(grey_tiff(np.array([[0, 32896], [257, 65535]], dtype=f"{order}u2"), order))
    assert np.asarray(load_rgb(path))[..., 1].tolist() == [[0, 128], [1, 255]]


def grey_tiff(values: np.ndarray, order: str) -> bytes:
    """An uncompressed 16-bit greyscale TIFF, written by hand: Pillow writes one byte order only."""
    height, width = values.shape
    start = 8 + 2 + 9 * 12 + 4
    tags = [(256, width), (257, height), (258, 16), (259, 1), (262, 1), (273, start), (277, 1), (278, height)]
    entries = b"".join(
        struct.pack(f"{order}HHIHH", tag, 3, 1, value, 0) for tag, value in [*tags, (279, values.nbytes)]
    )
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8)
    return head + struct.pack(f"{order}H", 9) + entries + bytes(4) + values.tobytes()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 65535]], dtype=np.int32), [0, 255]),
        (np.array([[0, 1_000_000]], dtype=np.int32), [0, 255]),
        (np.array([[-5, 32896]], dtype=np.int32), [0, 128]),
        (np.array([[0.0, 0.5, 1.0]], dtype=np.float32), [0, 128, 255]),
        (np.array([[0.0, 100.0, 255.0]], dtype=np.float32), [0, 100, 255]),
        (np.array([[0.0, 32896.0, 65535.0]], dtype=np.float32), [0, 128, 255]),
        (np.array([[np.nan, np.inf, -np.inf, 0.5]], dtype=np.float32), [0, 255, 0, 128]),
    ],
)
def test_32_bit_and_float_tiff(tmp_path: Path, values: np.ndarray, expected: list[int]) -> None:
    path = saved(Image.fromarray(values), tmp_path / "a.tiff")
    assert np.asarray(load_rgb(path))[0, :, 2].tolist() == expected


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bit_greyscale_is_scaled_by_the_bits_in_use(tmp_path: Path, bits: int, suffix: str) -> None:
    """Scientific cameras store 10, 12 or 14 bits in files of 16, which would look nearly black."""
    values = np.array([[0, 2 ** (bits - 1), 2**bits - 1]], dtype=np.uint16)
    image = load_rgb(saved(Image.fromarray(values), tmp_path / f"a{suffix}"))
    assert np.asarray(image)[0, :, 0].tolist() == [0, 128, 255] and image.info[BITS] == bits


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    upright = np.zeros((8, 16, 3), dtype=np.uint8)
    upright[:4, :8] = 255  # the mark belongs to the top left
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
        5: upright.transpose(1, 0, 2), 6: np.rot90(upright), 7: np.rot90(upright.transpose(1, 0, 2), 2),
        8: np.rot90(upright, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = saved(Image.fromarray(np.ascontiguousarray(stored)), tmp_path / "a.png", exif=exif)
    assert np.array_equal(np.asarray(load_rgb(path)), upright)


def test_animation_gives_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    path = saved(frames[0], tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert corner(load_rgb(path)) == (255, 0, 0)


def test_a_wrong_extension_does_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    Image.new("RGB", (8, 8), "red").save(path, format="JPEG")
    assert load_rgb(path).size == (8, 8)


def test_an_open_file_is_read() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (3, 2), "blue").save(buffer, format="PNG")
    buffer.seek(0)
    assert corner(load_rgb(buffer)) == (0, 0, 255)
    with pytest.raises(DataError, match="not an image"):
        load_rgb(io.BytesIO(b"words"))


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".gif", ".tif", ".bmp"])
def test_truncated_files_are_refused_by_name(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    whole = saved(Image.fromarray(noise), tmp_path / f"whole{suffix}").read_bytes()
    for share in (0.03, 0.5):
        path = tmp_path / f"cut{suffix}"
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(DataError, match=f"cut{suffix}: .") as caught:
            load_rgb(path)
        assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"hello", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "not an image"),
        (b"%PDF-1.7\n", "not an image"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a git-lfs pointer.* `git lfs pull`"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"a.png: {reason}"):
        load_rgb(path)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.png: does not exist"):
        load_rgb(tmp_path / "gone.png")
    with pytest.raises(DataError, match="directory"):
        load_rgb(tmp_path)


@pytest.mark.parametrize("side", [13_500, 60_000])  # the first is below Pillow's own limit for an error, not ours
def test_decompression_bombs_are_refused(tmp_path: Path, side: int) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(huge_png(side))
    before = Image.MAX_IMAGE_PIXELS
    with pytest.raises(DataError, match="million"):
        load_rgb(path)
    assert before == Image.MAX_IMAGE_PIXELS


def huge_png(side: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")


def test_warning_filters_survive_many_threads(tmp_path: Path) -> None:
    path = saved(Image.new("RGB", (8, 8)), tmp_path / "a.png")
    before = list(warnings.filters)
    threads = [threading.Thread(target=lambda: [load_rgb(path) for _ in range(20)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(warnings.filters) == before


@pytest.mark.parametrize(("width", "height"), [(84, 84), (200, 100), (100, 200), (17, 91), (5, 5)])
def test_to_square_keeps_the_centre(width: int, height: int) -> None:
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    side = min(width, height)
    top, left = (height - side) // 2, (width - side) // 2
    pixels[top : top + side, left : left + side] = 255
    out = to_square(Image.fromarray(pixels), 32)
    assert (out.shape, out.dtype) == ((32, 32, 3), np.uint8)
    assert out[:, 8:24].mean() > 250 if width > height else out[8:24].mean() > 250


def test_to_square_of_a_line() -> None:
    assert to_square(Image.new("RGB", (1, 300), "red"), 8).tolist() == [[[255, 0, 0]] * 8] * 8


def test_to_square_antialiases() -> None:
    stripes = np.zeros((256, 256, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    out = to_square(Image.fromarray(stripes), 16)
    assert np.abs(out[:, 1:-1].astype(int) - 127).max() < 8


def test_to_square_leaves_the_right_size_alone() -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    assert np.array_equal(to_square(Image.fromarray(pixels), 24), pixels)


PHOTOS = {"large": (1501, 1000), "upright": (300, 411), "small": (40, 40)}


@pytest.mark.parametrize("kind", PHOTOS)
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_file_an_opened_image_an_array_and_the_documented_call_give_the_same_pixels(
    tmp_path: Path, kind: str, orientation: int
) -> None:
    """Whatever the size: a JPEG that was decoded at a smaller scale would differ."""
    width, height = PHOTOS[kind]
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = saved(coarse.resize((width, height)), tmp_path / "a.jpg", quality=90, exif=exif)
    size, found = 24, load_square(path, 24)
    with Image.open(path) as opened:
        assert np.array_equal(to_square(upright_rgb(opened), size), found)
        upright = ImageOps.exif_transpose(opened).convert("RGB")
    assert np.array_equal(to_square(Image.fromarray(np.asarray(upright)), size), found)
    w, h = upright.size
    s = min(w, h)
    box = ((w - s) / 2, (h - s) / 2, (w + s) / 2, (h + s) / 2)
    documented = upright.resize((size, size), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)
    assert np.array_equal(np.asarray(documented), found)


def test_an_opened_image_is_not_changed(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    path = saved(Image.new("RGB", (30, 20), "red"), tmp_path / "a.png", exif=exif)
    with Image.open(path) as opened:
        assert upright_rgb(opened).size == (20, 30)
        assert opened.size == (30, 20) and opened.getexif()[ORIENTATION] == 6


def test_the_limit_is_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 10)
    with pytest.raises(DataError, match="4 x 4 pixels"):
        load_rgb(saved(Image.new("RGB", (4, 4)), tmp_path / "a.png"))


HEIC_HEAD = b"\x00\x00\x00\x1cftypheic\x00\x00\x00\x00mif1heic"


@pytest.mark.parametrize("name", ["IMG_1.HEIC", "really-a-heic.jpg"])
def test_without_the_extra_heic_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(images, "_formats", lambda: ("PNG", "JPEG"))
    path = tmp_path / name
    path.write_bytes(HEIC_HEAD + bytes(100))
    with pytest.raises(DataError, match=r"HEIC.*pip install pillow-heif"):
        load_rgb(path)


def test_an_old_pillow_is_told_apart_from_a_broken_avif(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "_formats", lambda: ("PNG",))
    path = tmp_path / "a.avif"
    path.write_bytes(b"\x00\x00\x00\x20ftypavif" + bytes(100))
    with pytest.raises(DataError, match=r"Pillow 11\.3"):
        load_rgb(path)


def test_a_broken_heic_is_damaged_where_the_extra_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "_formats", lambda: ("PNG", "HEIF"))
    monkeypatch.setitem(Image.OPEN, "HEIF", (lambda fp, name: None, lambda start: False))
    path = tmp_path / "a.heic"
    path.write_bytes(HEIC_HEAD + bytes(100))
    with pytest.raises(DataError, match="not an image, or damaged"):
        load_rgb(path)
