"""One image file -> the right RGB: every common mode and format, orientation applied, hostile files refused."""

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from metadiff_cli.errors import DataError

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif"})
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "DIB", "TIFF", "GIF", "AVIF")  # no others: EPS would start a program
MAX_PIXELS = 178_000_000  # RGB of that takes 534 MB; more is a decompression bomb, and Pillow refuses 179 million


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
        raise DataError(f"{name}: {_reason(error)}") from error


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
    return to_square(load_rgb(path, size), size)


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


def _formats() -> list[str]:
    Image.init()  # does nothing from the second time on
    return [name for name in FORMATS if name in Image.OPEN]  # AVIF came with Pillow 11.3


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "does not exist"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {MAX_PIXELS // 1_000_000} million pixels"
    if isinstance(error, UnidentifiedImageError):
        return "not an image, or damaged"
    return (str(error) or type(error).__name__).splitlines()[0]


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
