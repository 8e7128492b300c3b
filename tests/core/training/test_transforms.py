"""Augmentation of batches, quarter turns."""

import math

import pytest
import torch

from metadiff_cli.core.encoders.image_encoder import normalise
from metadiff_cli.core.training.transforms import (
    Augmentation,
    Changes,
    affine_maps,
    augment,
    rotate_quarters,
    sampling_grid,
)

MEAN, STD = torch.tensor([0.5, 0.5, 0.5]), torch.tensor([0.25, 0.25, 0.25])


def test_no_augmentation_is_normalisation() -> None:
    pixels = torch.randint(0, 256, (3, 12, 12, 3), dtype=torch.uint8)
    still = Augmentation(crop=(1.0, 1.0), aspect=(1.0, 1.0), flip=False, jitter=0.0)
    out = augment(pixels, 12, Changes.draw(3, still, torch.Generator().manual_seed(0)), MEAN, STD)
    assert torch.allclose(out, normalise(pixels, MEAN, STD), atol=1e-4)


def test_the_grid_is_that_of_torch() -> None:
    maps = affine_maps(9, Augmentation(rotate=10), torch.Generator().manual_seed(0))
    expected = torch.nn.functional.affine_grid(maps, [9, 3, 13, 13], align_corners=False)
    assert torch.allclose(sampling_grid(maps, 13), expected, atol=1e-6)


def test_augmentation_follows_its_generator_and_stays_inside() -> None:
    pixels = torch.randint(0, 256, (64, 20, 20, 3), dtype=torch.uint8)
    changes, again = (Changes.draw(64, Augmentation(), torch.Generator().manual_seed(3)) for _ in range(2))
    first = augment(pixels, 16, changes, MEAN, STD)
    assert torch.equal(first, augment(pixels, 16, again, MEAN, STD)) and first.shape == (64, 3, 16, 16)
    rows = torch.arange(20, 30)
    assert torch.allclose(augment(pixels[rows], 16, changes.part(rows), MEAN, STD), first[rows], atol=1e-5)
    theta = affine_maps(500, Augmentation(), torch.Generator().manual_seed(0))
    corners = torch.tensor([[x, y, 1.0] for x in (-1.0, 1.0) for y in (-1.0, 1.0)])
    assert float((theta @ corners.T).abs().max()) <= 1.0 + 1e-5
    assert 0.4 < float((theta[:, 0, 0] < 0).float().mean()) < 0.6  # half of them mirrored


def test_quarter_turns() -> None:
    x = torch.randn(4, 3, 6, 6)
    turned = rotate_quarters(x, torch.tensor([0, 1, 2, 3]))
    assert all(torch.equal(turned[k], torch.rot90(x[k], k, dims=(1, 2))) for k in range(4))


def test_changes_grow_weaker_down_to_the_mirror_alone() -> None:
    how = Augmentation(crop=(0.4, 0.8), jitter=0.3, rotate=10)
    for low in (0.1, 0.3, 0.35, 0.7):  # to the last bit: a training that does not fade is what it was
        same = Augmentation(crop=(low, 0.9), jitter=0.3, rotate=10)
        assert same.weakened(1.0) == same
    assert how.weakened(0.0) == Augmentation(crop=(1.0, 1.0), aspect=(1.0, 1.0), jitter=0.0, rotate=0.0)
    half = how.weakened(0.5)
    assert (*half.crop, half.jitter, half.rotate) == pytest.approx((0.7, 0.9, 0.15, 5.0))
    assert math.prod(half.aspect) == pytest.approx(1.0)
