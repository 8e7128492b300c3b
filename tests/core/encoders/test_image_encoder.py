"""ImageEncoder: the views of an image, and the key that names its features."""

import numpy as np
import pytest
import torch
from torch import Tensor

from metadiff_cli.core.encoders.image_encoder import normalise
from metadiff_cli.errors import ConfigError
from tests.worlds import small_encoder

PIXELS = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)


def features_of(pixels: Tensor, mirror: bool, shift: int) -> Tensor:
    return small_encoder(16, mirror=mirror, shift=shift).encode(pixels)


@pytest.mark.parametrize("mirror", [False, True])
def test_moved_images_are_views_whose_edges_are_repeated(mirror: bool) -> None:
    padded = np.pad(PIXELS, ((0, 0), (4, 4), (4, 4), (0, 0)), mode="edge")
    places = [(y, x) for y in (0, 4, 8) for x in (0, 4, 8)]
    moved = [torch.from_numpy(padded[:, y : y + 16, x : x + 16].copy()) for y, x in places]
    views = moved + [view.flip(2) for view in moved] if mirror else moved
    mean = torch.stack([features_of(view, False, 0) for view in views]).mean(dim=0)
    found = features_of(torch.from_numpy(PIXELS), mirror, 4)
    assert torch.allclose(found, torch.nn.functional.normalize(mean, dim=1), atol=1e-5)


def test_the_key_tells_apart_whatever_features_depend_on() -> None:
    encoders = [small_encoder(), small_encoder(32), small_encoder(shift=3), small_encoder(shift=4)]
    encoders += [small_encoder(mirror=False), small_encoder(seed=1), small_encoder(name="resnet10")]
    assert len({encoder.key for encoder in encoders}) == len(encoders)
    assert small_encoder().key == small_encoder().key


def test_images_cannot_be_moved_out_of_the_picture() -> None:
    with pytest.raises(ConfigError, match="16 pixels cannot be moved by 16"):
        small_encoder(shift=16)


def test_normalised_pixels_have_channels_first() -> None:
    images = normalise(torch.from_numpy(PIXELS), torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 1.0, 2.0]))
    expected = (PIXELS[1, 2, 3] / 255 - np.array([0.1, 0.2, 0.3])) / np.array([0.5, 1.0, 2.0])
    assert images.shape == (3, 3, 16, 16) and np.allclose(images[1, :, 2, 3].numpy(), expected, atol=1e-6)
