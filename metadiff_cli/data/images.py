"""One image file -> the right RGB: every common mode and format, orientation applied, hostile files refused."""

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from metadiff_cli.errors import DataError

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif"})
MAX_PIXELS = 200_000_000  # a 200-megapixel photo takes 600 MB; more is a decompression bomb or a mistake


def load_rgb(path: Path, size: int | None = None) -> Image.Image:
    """The first frame of an image file in RGB, upright, transparent parts on white.

    With `size`, a JPEG may be decoded smaller, never below `size` pixels. Raises DataError with the file and the reason.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of odd metadata that does not concern the pixels
            with Image.open(path) as image:
                return _upright_rgb(image, size)
    except DataError as error:
        raise DataError(f"{path}: {error.message}") from error
    except Image.DecompressionBombError as error:
        raise DataError(f"{path}: more than {MAX_PIXELS // 1_000_000} million pixels") from error
    except FileNotFoundError as error:
        raise DataError(f"{path}: does not exist") from error
    except Exception as error:  # decoders raise whatever they like on broken files
        reason = "not an image, or damaged" if "cannot identify" in str(error) else str(error) or type(error).__name__
        raise DataError(f"{path}: {reason.splitlines()[0]}") from error


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


def _upright_rgb(image: Image.Image, size: int | None) -> Image.Image:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise DataError(f"{width} x {height} pixels, more than {MAX_PIXELS // 1_000_000} million")
    if size is not None and image.format == "JPEG":
        image.draft("RGB" if image.mode != "CMYK" else None, (2 * size, 2 * size))  # type: ignore[arg-type]
    image.load()
    upright = ImageOps.exif_transpose(image)
    return _to_rgb(upright)


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
    values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
    if image.mode == "F":
        top = 1.0 if values.max(initial=0.0) <= 1.0 else (255.0 if values.max() <= 255.0 else 65535.0)
    else:
        top = 65535.0 if values.max(initial=0.0) <= 65535.0 else float(values.max())
    scaled = np.clip(np.round(values * (255.0 / top)), 0, 255).astype(np.uint8)
    return Image.fromarray(scaled).convert("RGB")
