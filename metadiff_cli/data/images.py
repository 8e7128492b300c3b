"""From an image file to RGB pixels: every common mode and format, upright, hostile files refused.

There is one preparation for files, Pillow images and exported graphs. `load_rgb` or `upright_rgb` give the upright
image in RGB, transparent parts on white; `to_square` gives the pixels that an encoder sees. Photos are decoded in full:
decoders that scale while they decode give other pixels than those of an image that is decoded already.
"""

import importlib
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from metadiff_cli.errors import DataError
from metadiff_cli.files import LFS_POINTER

# the formats that are read, with their extensions; no others: EPS and PDF would start a program
FORMATS = {
    "PNG": (".png", ".apng"), "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"), "MPO": (".mpo",), "WEBP": (".webp",),
    "BMP": (".bmp",), "DIB": (".dib",), "TIFF": (".tif", ".tiff"), "GIF": (".gif",), "AVIF": (".avif",),
    "HEIF": (".heic", ".heif", ".hif"), "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "JPEG2000": (".jp2", ".j2k", ".jpf", ".jpx", ".j2c", ".jpc"), "PCX": (".pcx",),
    "SGI": (".sgi", ".rgb", ".bw"), "QOI": (".qoi",), "DDS": (".dds",), "TGA": (".tga",),
}  # fmt: skip
IMAGE_SUFFIXES = frozenset(suffix for suffixes in FORMATS.values() for suffix in suffixes)
BY_NAME = frozenset({"TGA"})  # formats without a signature: only a file of that extension is tried as one
HEIF_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"})  # ISO 23008-12
MAX_PIXELS = 178_000_000  # 534 MB as RGB; more is a decompression bomb, and Pillow refuses 179 million
MAX_DEEP = 64_000_000  # pixels of images with more than 8 bits, which are converted in 8 bytes per pixel
DEPTHS = (8, 10, 12, 14, 16)  # bits that cameras and scanners use; files of 16 bits do not say which
BITS = "metadiff-bits"  # key of `Image.info`: the bits in use of an image that was scaled from more


def load_rgb(source: Path | BinaryIO) -> Image.Image:
    """The first frame of an image file in RGB, upright, transparent parts on white.

    `info[BITS]` of the image tells how many bits a file with more than 8 uses. Raises DataError with the file and the
    reason.
    """
    name = str(source) if isinstance(source, Path) else str(getattr(source, "name", "image"))
    try:
        with _QUIET(), Image.open(source, formats=_formats_for(name)) as image:
            return upright_rgb(image)
    except DataError as error:
        raise DataError(f"{name}: {error.message}") from error
    except Exception as error:  # decoders raise whatever they like on broken files
        unknown = isinstance(error, UnidentifiedImageError)
        raise DataError(f"{name}: {_unidentified(source) if unknown else _reason(error)}") from error


def upright_rgb(image: Image.Image) -> Image.Image:
    """RGB of an opened image, as from `load_rgb`; it may be `image` itself.

    Raises DataError for too many pixels, and whatever the decoder raises.
    """
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise DataError(f"{width} x {height} pixels, more than {MAX_PIXELS // 1_000_000} million")
    image.load()
    turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    return _to_rgb(ImageOps.exif_transpose(image) if turned else image)  # which would copy any other image as well


def to_square(image: Image.Image, size: int) -> np.ndarray:
    """Pixels (size, size, 3) uint8 of an RGB image: its central square, resized.

    In one call of Pillow, for an image of W x H pixels with the shorter side s: image.resize((size, size), BICUBIC,
    box=((W - s) / 2, (H - s) / 2, (W + s) / 2, (H + s) / 2), reducing_gap=3.0). A large image is first averaged in
    whole blocks of pixels down to at least three times `size`, and then resized by an antialiased bicubic filter. An
    image of just that size stays as it is.
    """
    width, height = image.size
    if (width, height) != (size, size):
        side = min(width, height)
        box = ((width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2)
        image = image.resize((size, size), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)
    return np.asarray(image, dtype=np.uint8)


def load_square(path: Path, size: int) -> np.ndarray:
    """Pixels (size, size, 3) uint8 of an image file; raises DataError as `load_rgb` does."""
    return to_square(load_rgb(path), size)


def looks_like_image(path: Path) -> bool:
    """Whether the beginning of a file is that of an image, whatever its name."""
    try:
        with _QUIET(), Image.open(path, formats=_formats_for("")):
            return True
    except Exception:  # as in `load_rgb`
        return False


class _QuietPillow:
    """Ignores Pillow's warnings (odd metadata, large pictures) while any thread decodes.

    Warning filters belong to the whole process: the first thread sets them, the last one restores them. With one
    `catch_warnings` per thread, a thread would restore what another one had set, and the filters would stay changed.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._saved = warnings.catch_warnings()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        self._enter()
        try:
            yield
        finally:
            self._leave()

    def _enter(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._saved = warnings.catch_warnings()
                self._saved.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL\.")
            self._inside += 1

    def _leave(self) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._saved.__exit__(None, None, None)


_QUIET = _QuietPillow()


@cache
def _formats() -> tuple[str, ...]:
    """The formats that this installation can read."""
    Image.init()
    with suppress(ImportError):  # the extra [heic]
        importlib.import_module("pillow_heif").register_heif_opener()
    return tuple(name for name in FORMATS if name in Image.OPEN)  # AVIF came with Pillow 11.3


def _formats_for(name: str) -> list[str]:
    """The formats that a file of that name is tried as."""
    suffix = Path(name).suffix.lower()
    return [known for known in _formats() if known not in BY_NAME or suffix in FORMATS[known]]


def _unidentified(source: Path | BinaryIO) -> str:
    """What is wrong with a file that no decoder here knows, told by its first bytes."""
    if isinstance(source, Path):
        with source.open("rb") as file:
            start = file.read(len(LFS_POINTER))
    else:
        source.seek(0)
        start = source.read(len(LFS_POINTER))
    brand = start[8:12] if start[4:8] == b"ftyp" else b""  # of an ISO media file
    if not start:
        return "the file is empty"
    if start == LFS_POINTER:
        return "a git-lfs pointer, not the image itself: fetch it with `git lfs pull`"
    if brand in HEIF_BRANDS and "HEIF" not in _formats():
        return "a HEIC photo, which needs the extra [heic]: pip install pillow-heif"
    if brand in (b"avif", b"avis") and "AVIF" not in _formats():
        return "an AVIF image, which needs Pillow 11.3 or newer: pip install -U pillow"
    return "not an image, or damaged"


def _reason(error: Exception) -> str:
    """What is wrong with an image, in one line."""
    if isinstance(error, FileNotFoundError):
        return "does not exist"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {MAX_PIXELS // 1_000_000} million pixels"
    return f"cannot be decoded ({(str(error) or type(error).__name__).splitlines()[0]})"


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return _from_deep(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _from_deep(image: Image.Image) -> Image.Image:
    """16-bit, 32-bit and float greyscale to 8 bits; Pillow's own conversion would clip at 255.

    The file does not say which value is white. It is taken to be the largest value of the smallest usual number of bits
    that holds all pixels; a float image may also end at 1.
    """
    if image.width * image.height > MAX_DEEP:
        raise DataError(
            f"{image.width} x {image.height} pixels of {image.mode}, more than {MAX_DEEP // 1_000_000} million"
        )
    values = np.asarray(image).astype(np.float64)
    largest = float(np.where(np.isfinite(values), values, 0.0).max(initial=0.0))
    bits = next((bits for bits in DEPTHS if largest <= 2**bits - 1), None)
    white = largest if bits is None else float(2**bits - 1)
    if image.mode == "F":
        bits, white = None, 1.0 if largest <= 1 else white
    values = np.nan_to_num(values, nan=0.0, posinf=white, neginf=0.0)
    scaled = Image.fromarray(np.clip(np.round(values * (255.0 / white)), 0, 255).astype(np.uint8)).convert("RGB")
    if bits is not None:
        scaled.info[BITS] = bits
    return scaled
