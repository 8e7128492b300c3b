"""Augmentation of whole batches of uint8 images as tensors.

Per image: one affine map (random resized crop, mirror, small rotation) applied by a single bilinear resampling, then
brightness, contrast and saturation. All randomness comes from the generator that is passed.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

GREY = (0.299, 0.587, 0.114)  # luma of ITU-R BT.601


@dataclass(frozen=True)
class Augmentation:
    """What a training image may undergo. `crop` and `aspect` are ranges of area and of width / height."""

    crop: tuple[float, float] = (0.4, 1.0)
    aspect: tuple[float, float] = (0.75, 4 / 3)
    flip: bool = True
    jitter: float = 0.4  # strength of brightness, contrast and saturation: factors in [1 - jitter, 1 + jitter]
    rotate: float = 0.0  # degrees to either side

    def weakened(self, strength: float) -> "Augmentation":
        """With changes of `strength` 0..1, where 1 leaves them as they are and 0 no change but the mirror."""
        smallest, largest = (area + (1 - strength) * (1 - area) for area in self.crop)
        narrow, wide = (ratio**strength for ratio in self.aspect)
        return replace(
            self, crop=(smallest, largest), aspect=(narrow, wide), jitter=strength * self.jitter,
            rotate=strength * self.rotate,
        )  # fmt: skip


@dataclass(frozen=True)
class Changes:
    """What becomes of each image of a batch: maps (B, 2, 3), and factors (3, B, 1, 1, 1) where colours change."""

    maps: Tensor
    colours: Tensor | None

    @classmethod
    def draw(cls, count: int, how: Augmentation, generator: torch.Generator) -> "Changes":
        """For `count` images."""
        maps = affine_maps(count, how, generator)
        return cls(maps, colour_factors(count, how.jitter, generator) if how.jitter > 0 else None)

    def part(self, rows: Tensor) -> "Changes":
        """For some of the images."""
        return Changes(self.maps[rows], None if self.colours is None else self.colours[:, rows])

    def to(self, device: torch.device) -> "Changes":
        """On the device of the images. They are small enough that a GPU's driver takes them without a wait."""
        quick = device.type == "cuda"
        colours = None if self.colours is None else self.colours.to(device, non_blocking=quick)
        return Changes(self.maps.to(device, non_blocking=quick), colours)


def augment(images: Tensor, size: int, changes: Changes, mean: Tensor, std: Tensor) -> Tensor:
    """Augmented and normalised batch (B, 3, size, size), channels last, of pixels (B, H, W, 3) uint8."""
    out = (changed(images, size, changes) - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    return out.contiguous(memory_format=torch.channels_last)


def changed(images: Tensor, size: int, changes: Changes) -> Tensor:
    """Augmented batch (B, 3, size, size), values in 0..1, of pixels (B, H, W, 3) uint8."""
    pixels = images.permute(0, 3, 1, 2).float().mul_(1 / 255)  # (B, 3, H, W)
    grid = sampling_grid(changes.maps, size)
    pixels = F.grid_sample(pixels, grid, mode="bilinear", padding_mode="border", align_corners=False)
    if changes.colours is not None:
        pixels = colour_jitter(pixels, changes.colours)
    return pixels


def sampling_grid(maps: Tensor, size: int) -> Tensor:
    """Input coordinates (B, size, size, 2) of the centres of the output's pixels under maps (B, 2, 3).

    What `affine_grid` gives; a sum of rows and columns takes a third of the time of its matrix products.
    """
    centres = (torch.arange(size, device=maps.device) + 0.5) * (2 / size) - 1
    across, down, offset = maps.unsqueeze(1).unsqueeze(1).unbind(dim=-1)  # (B, 1, 1, 2) each
    return across * centres.view(1, 1, -1, 1) + (down * centres.view(1, -1, 1, 1) + offset)


def affine_maps(count: int, how: Augmentation, generator: torch.Generator) -> Tensor:
    """Maps (count, 2, 3) from output to input coordinates in [-1, 1], as `affine_grid` takes them."""
    area, ratio, turn, mirror, dx, dy = torch.rand(6, count, generator=generator)
    area = how.crop[0] + (how.crop[1] - how.crop[0]) * area
    ratio = torch.exp(math.log(how.aspect[0]) + math.log(how.aspect[1] / how.aspect[0]) * ratio)
    width = (area * ratio).sqrt().clamp(max=1.0)
    height = (area / ratio).sqrt().clamp(max=1.0)
    angle = math.radians(how.rotate) * (2 * turn - 1)
    sign = torch.where(mirror < 0.5, -1.0, 1.0) if how.flip else torch.ones(count)
    cos, sin = angle.cos(), angle.sin()
    rows = [
        torch.stack([sign * width * cos, -height * sin, (1 - width) * (2 * dx - 1)], dim=1),
        torch.stack([sign * width * sin, height * cos, (1 - height) * (2 * dy - 1)], dim=1),
    ]
    return torch.stack(rows, dim=1)


def colour_factors(count: int, strength: float, generator: torch.Generator) -> Tensor:
    """(3, count, 1, 1, 1): brightness, contrast and saturation of each image, 1 where they stay as they are."""
    return 1 + strength * (2 * torch.rand(3, count, 1, 1, 1, generator=generator) - 1)


def colour_jitter(pixels: Tensor, factors: Tensor) -> Tensor:
    """Brightness, then contrast, then saturation of pixels (B, 3, H, W) in 0..1, by factors (3, B, 1, 1, 1)."""
    bright, contrast, saturation = factors
    pixels = (pixels * bright).clamp_(0, 1)
    luma = torch.tensor(GREY).to(pixels.device, pixels.dtype, non_blocking=pixels.is_cuda).view(1, 3, 1, 1)
    mean = (pixels.mean(dim=(2, 3), keepdim=True) * luma).sum(dim=1, keepdim=True)
    pixels = (mean + (pixels - mean) * contrast).clamp_(0, 1)
    grey = (pixels * luma).sum(dim=1, keepdim=True)
    out: Tensor = (grey + (pixels - grey) * saturation).clamp_(0, 1)
    return out


def rotate_quarters(images: Tensor, quarters: Tensor) -> Tensor:
    """Turn each image of (B, C, S, S) counter-clockwise by its own number of quarter turns (B,), on the CPU."""
    out = images.clone()
    for k in (1, 2, 3):
        # found on the CPU: a mask would have the GPU waited for
        chosen = torch.nonzero(quarters == k).flatten().to(images.device, non_blocking=images.is_cuda)
        out[chosen] = torch.rot90(images[chosen], k, dims=(2, 3))
    return out
