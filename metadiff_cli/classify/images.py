"""Images in, features out: files, Pillow images and arrays, a batch at a time. No torch here."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
from PIL import Image

from metadiff_cli.data.cache import Progress, decode_images, no_progress
from metadiff_cli.data.images import to_square, upright_rgb
from metadiff_cli.errors import DataError

ImageLike: TypeAlias = str | os.PathLike[str] | Image.Image | np.ndarray


class Encode(Protocol):
    """Turns pixels (n, size, size, 3) uint8 into one row of features per image; `batch` images at a time suit it."""

    @property
    def size(self) -> int:
        """The side of the images in pixels."""

    batch: int

    def __call__(self, pixels: np.ndarray) -> Any:
        """Features (n, D)."""


@dataclass(frozen=True)
class Encoded:
    """One image as the encoder sees it: features (D,), of torch or NumPy, and the digest of its pixels.

    Where the image cannot be read, `features` is None and `reason` says why. `path` is the path as it was given, or
    the position of an image that is no file.
    """

    path: str
    features: Any
    digest: bytes = b""
    reason: str = ""


def encode_images(
    images: Sequence[ImageLike],
    encode: Encode,
    *,
    workers: int | None = None,
    progress: Progress = no_progress,
) -> Iterator[list[Encoded]]:
    """Encode images in their order, a batch at a time, so that memory does not grow with their number.

    `workers` threads decode files. `progress` is called with the number of images read, and of all images. Raises as
    `encode` does. Arrays are uint8 of shape (height, width, 3).
    """
    batch = encode.batch
    waiting: list[tuple[str, np.ndarray | str]] = []
    for i, (image, pixels) in enumerate(zip(images, _pixels(images, encode.size, workers), strict=True)):
        waiting.append((os.fspath(image) if isinstance(image, str | os.PathLike) else str(i), pixels))
        progress(i + 1, len(images))
        if len(waiting) == batch or i + 1 == len(images):
            yield _encode_batch(waiting, encode)
            waiting = []


def _encode_batch(batch: Sequence[tuple[str, np.ndarray | str]], encode: Encode) -> list[Encoded]:
    readable = [pixels for _, pixels in batch if not isinstance(pixels, str)]
    features = iter(encode(np.stack(readable)) if readable else ())
    return [
        Encoded(path, None, reason=pixels)
        if isinstance(pixels, str)
        else Encoded(path, next(features), digest_of(pixels))
        for path, pixels in batch
    ]


def digest_of(pixels: np.ndarray) -> bytes:
    """SHA-256 (32 bytes) of an image's pixels: identifies the same picture across folders and saved classifiers.

    The pixels are those that the encoder sees, so the same picture in another file format may have another digest.
    """
    return hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).digest()


def _pixels(images: Sequence[ImageLike], size: int, workers: int | None) -> Iterator[np.ndarray | str]:
    """Pixels (size, size, 3) uint8 of each image, or the reason why there are none."""
    paths = [Path(image) for image in images if isinstance(image, str | os.PathLike)]
    files = decode_images(paths, size, workers=workers)
    for image in images:
        if isinstance(image, str | os.PathLike):
            yield next(files)[1]
        else:
            yield _prepared(image, size)


def _prepared(image: Image.Image | np.ndarray, size: int) -> np.ndarray | str:
    """The same for an image in memory."""
    try:
        width, height = image.size if isinstance(image, Image.Image) else image.shape[1::-1]
        if not width * height:
            return f"it has {width} x {height} pixels"
        if isinstance(image, np.ndarray):
            image = Image.fromarray(np.ascontiguousarray(image))
        return to_square(upright_rgb(image), size)
    except DataError as error:
        return error.message
    except Exception as error:  # of a file that Pillow opened; decoders raise whatever they like
        return f"cannot be decoded ({(str(error) or type(error).__name__).splitlines()[0]})"
