"""One image file -> the right RGB: every common mode and format, orientation applied, hostile files refused."""

import importlib
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from metadiff_cli.errors import DataError

IMAGE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif", ".heic", ".heif"}
)
# no others: EPS would start a program
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "DIB", "TIFF", "GIF", "AVIF", "HEIF")
HEIF_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"})  # ISO 23008-12
MAX_PIXELS = 178_000_000  # RGB of that takes 534 MB; more is a decompression bomb, and Pillow refuses 179 million

MAX_DEEP = 64_000_000  # of images with more than 8 bits, which pass through 8 bytes a pixel


def load_rgb(source: Path | BinaryIO, size: int | None = None) -> Image.Image:
    """The first frame of an image file in RGB, upright, transparent parts on white.

    With `size`, a JPEG may be decoded smaller, never below twice `size`. Raises DataError with the file and the reason.
    """
    name = str(source) if isinstance(source, Path) else str(getattr(source, "name", "image"))
    try:
        with _QUIET(), Image.open(source, formats=_formats()) as image:
            return upright_rgb(image, size)
    except DataError as error:
        raise DataError(f"{name}: {error.message}") from error
    except Exception as error:  # decoders raise whatever they like on broken files
        raise DataError(f"{name}: {_missing_decoder(source, error) or _reason(error)}") from error


def to_square(image: Image.Image, size: int) -> np.ndarray:
    """Pixels (size, size, 3) uint8: the shorter side resized to `size` with antialiasing, then the central square."""
    width, height = image.size
    if (width, height) != (size, size):
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        box = (left, top, left + side, top + side)  # cropping while resizing: one pass, no rounding of the sides
        image = image.resize((size, size), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)
    return np.asarray(image, dtype=np.uint8)


def load_square(path: Path, size: int) -> np.ndarray:
    """Pixels (size, size, 3) uint8 of an image file; raises DataError as `load_rgb` does."""
    return to_square(load_rgb(path), size)


class _QuietPillow:
    """Ignores Pillow's warnings (odd metadata, large pictures) while any thread decodes.

    Warning filters belong to the whole process: the first thread in sets them, the last one out restores them. With one
    `catch_warnings` per thread, one thread would restore what another had set and the filters would stay changed.
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
def _formats() -> list[str]:
    Image.init()
    with suppress(ImportError):  # the extra [heic]
        importlib.import_module("pillow_heif").register_heif_opener()
    return [name for name in FORMATS if name in Image.OPEN]  # AVIF came with Pillow 11.3


def _missing_decoder(source: Path | BinaryIO, error: Exception) -> str | None:
    """What to install for a photo of a phone that nothing here can decode; told by its first bytes, not its name."""
    if not isinstance(error, UnidentifiedImageError):
        return None
    brand = _brand(source)
    if brand in HEIF_BRANDS and "HEIF" not in _formats():
        return "a HEIC photo, which needs the extra [heic]: pip install pillow-heif"
    if brand in (b"avif", b"avis") and "AVIF" not in _formats():
        return "an AVIF image, which needs Pillow 11.3 or newer: pip install -U pillow"
    return None


def _brand(source: Path | BinaryIO) -> bytes:
    """The brand of an ISO media file, or nothing."""
    if isinstance(source, Path):
        with source.open("rb") as file:
            start = file.read(12)
    else:
        source.seek(0)
        start = source.read(12)
    return start[8:12] if start[4:8] == b"ftyp" else b""


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "does not exist"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {MAX_PIXELS // 1_000_000} million pixels"
    if isinstance(error, UnidentifiedImageError):
        return "not an image, or damaged"
    return f"cannot be decoded ({(str(error) or type(error).__name__).splitlines()[0]})"


def upright_rgb(image: Image.Image, size: int | None = None) -> Image.Image:
    """RGB of an opened image, as from `load_rgb`. Raises DataError for too many pixels; decoders raise their own."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise DataError(f"{width} x {height} pixels, more than {MAX_PIXELS // 1_000_000} million")
    if size is not None and image.format in ("JPEG", "MPO"):
        image.draft(None, (2 * size, 2 * size))  # twice: enough for the filter that follows
    image.load()
    return _to_rgb(ImageOps.exif_transpose(image))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return _from_deep(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _from_deep(image: Image.Image) -> Image.Image:
    """16-bit, 32-bit and float greyscale to 8 bit; Pillow's own conversion would clip at 255."""
    if image.width * image.height > MAX_DEEP:
        raise DataError(
            f"{image.width} x {image.height} pixels of {image.mode}, more than {MAX_DEEP // 1_000_000} million"
        )
    values = np.asarray(image).astype(np.float64)
    finite = np.where(np.isfinite(values), values, 0.0)
    top = _white(image.mode, float(finite.max(initial=0.0)))
    values = np.nan_to_num(values, nan=0.0, posinf=top, neginf=0.0)
    scaled = np.clip(np.round(values * (255.0 / top)), 0, 255).astype(np.uint8)
    return Image.fromarray(scaled).convert("RGB")


def _white(mode: str, largest: float) -> float:
    """The value that stands for white: these modes do not say, so the smallest usual scale that holds the largest."""
    usual = {"F": (1.0, 255.0, 65535.0)}.get(mode, (65535.0,))
    return next((top for top in usual if largest <= top), largest)
