"""Images in, features out."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from metadiff_cli.classify.images import digest_of, encode_images
from metadiff_cli.core.checkpoints.model import load_model
from metadiff_cli.core.encoders.bank import Encoding


def test_a_batch_at_a_time(photos: Path, checkpoint: Path) -> None:
    """The first features come when the first batch is read, not when all 40 images are."""
    model = load_model(checkpoint, torch.device("cpu"))
    paths = [str(photos / "query" / "red.png")] * 40
    seen = []
    stream = encode_images(paths, Encoding(model.images, 2), workers=1, progress=lambda done, total: seen.append(done))
    first = next(stream)
    assert len(first) == 2 and seen == [1, 2]
    assert sum(len(part) for part in stream) == 38


def test_any_kind_of_image_in_its_order(photos: Path, checkpoint: Path) -> None:
    model = load_model(checkpoint, torch.device("cpu"))
    path = photos / "query" / "red.png"
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    (photos / "bad.png").write_bytes(b"no image")
    given = [path, pixels, photos / "bad.png", Image.fromarray(pixels), str(path)]
    found = [image for batch in encode_images(given, Encoding(model.images, 2)) for image in batch]
    assert [image.path for image in found] == [str(path), "1", str(photos / "bad.png"), "3", str(path)]
    assert found[2].features is None and found[2].reason and found[2].digest == b""
    assert len({image.digest for image in found if image.features is not None}) == 1


def test_a_digest_is_of_the_pixels() -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    turned = np.ascontiguousarray(pixels.transpose(1, 0, 2)).transpose(1, 0, 2)  # other strides, the same pixels
    assert digest_of(pixels) == digest_of(turned) != digest_of(pixels[::-1]) and len(digest_of(pixels)) == 32
