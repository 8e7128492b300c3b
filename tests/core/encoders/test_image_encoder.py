"""ImageEncoder: the views of an image, and the key that names its features."""

import numpy as np
import pytest
import torch
from torch import Tensor

from metadiff_cli.core.encoders.image_encoder import normalise
from metadiff_cli.errors import ConfigError
from tests.worlds import small_encoder

PIXELS = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)


def features_of(pixels: Tensor, views: int, shift: int = 0) -> Tensor:
    return small_encoder(16, views=views, shift=shift).encode(pixels)


@pytest.mark.parametrize("views", [1, 2])
def test_moved_images_are_views_whose_edges_are_repeated(views: int) -> None:
    padded = np.pad(PIXELS, ((0, 0), (4, 4), (4, 4), (0, 0)), mode="edge")
    places = [(y, x) for y in (0, 4, 8) for x in (0, 4, 8)]
    moved = [torch.from_numpy(padded[:, y : y + 16, x : x + 16].copy()) for y, x in places]
    views_of = moved + [view.flip(2) for view in moved] if views == 2 else moved
    mean = torch.stack([features_of(view, 1) for view in views_of]).mean(dim=0)
    found = features_of(torch.from_numpy(PIXELS), views, 4)
    assert torch.allclose(found, torch.nn.functional.normalize(mean, dim=1), atol=1e-5)


@pytest.mark.parametrize("views", [5, 6])
def test_corners_are_views_in_the_size_of_their_pixels(views: int) -> None:
    encoder = small_encoder(28, "resnet10", views=views)
    pixels = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (2, 28, 28, 3), dtype=np.uint8))
    assert encoder.corner == 20 and encoder.groups == (512, 512)
    parts = [pixels, *([pixels.flip(2)] if views == 6 else [])]
    parts += [pixels[:, y : y + 20, x : x + 20] for y in (0, 8) for x in (0, 8)]
    single = [small_encoder(part.shape[1], "resnet10", views=1).encode(part) for part in parts]
    mean = torch.stack(single).mean(dim=0).unflatten(1, (2, 512))
    found = encoder.encode(pixels).unflatten(1, (2, 512))
    assert torch.allclose(found, torch.nn.functional.normalize(mean, dim=2), atol=1e-5)
    assert torch.allclose(found.norm(dim=2), torch.ones(2, 2))


def test_corners_are_enlarged_for_an_encoder_that_takes_one_size() -> None:
    """conv4 flattens its maps: its features of a smaller image would be fewer."""
    found = features_of(torch.from_numpy(PIXELS), 5)
    assert found.shape == (3, 64) and not torch.allclose(found, features_of(torch.from_numpy(PIXELS), 1))


def test_maps_of_a_single_point_have_no_spread() -> None:
    assert small_encoder(16, "resnet10").groups == (512,)
    assert small_encoder(16, "resnet10").encode(torch.from_numpy(PIXELS)).shape == (3, 512)


def test_the_key_tells_apart_whatever_features_depend_on() -> None:
    encoders = [small_encoder(), small_encoder(32), small_encoder(shift=3), small_encoder(shift=4)]
    encoders += [small_encoder(views=1), small_encoder(views=6), small_encoder(seed=1), small_encoder(name="resnet10")]
    assert len({encoder.key for encoder in encoders}) == len(encoders)
    assert small_encoder().key == small_encoder().key


def test_images_cannot_be_moved_out_of_the_picture() -> None:
    with pytest.raises(ConfigError, match="16 pixels cannot be moved by 16"):
        small_encoder(shift=16)


def test_normalised_pixels_have_channels_first() -> None:
    images = normalise(torch.from_numpy(PIXELS), torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 1.0, 2.0]))
    expected = (PIXELS[1, 2, 3] / 255 - np.array([0.1, 0.2, 0.3])) / np.array([0.5, 1.0, 2.0])
    assert images.shape == (3, 3, 16, 16) and np.allclose(images[1, :, 2, 3].numpy(), expected, atol=1e-6)
