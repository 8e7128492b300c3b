"""ImageEncoder: from pixels to features of unit length, with a frozen encoder.

The features z (D,) of an image consist of groups, as the encoder has them. Each group is normalised, averaged over the
views of the image, and normalised again. Views are the whole image, its mirror image, and its four corners: what is
seen from closer by tells of details. They are the same for every image, so an image always has the same features.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from metadiff_cli.core.device import sent
from metadiff_cli.core.encoders.graphs import Graphs
from metadiff_cli.core.encoders.networks import Encoder, weights_digest
from metadiff_cli.errors import ConfigError

VERSION = 2  # of the computation below, as part of the key: a change of it makes files of features anew
MIRRORED, CORNERED = (2, 6), (5, 6)  # numbers of views that include the mirror image, and the four corners
CORNER = 5 / 7  # side of a corner in sides of the image


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Pixels (B, H, W, 3) uint8 -> (B, 3, H, W) float, zero mean and unit variance per channel, channels last.

    `mean` and `std` (3,) are those of pixels in 0..1.
    """
    return ((images.float() / 255 - mean) / std).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class ImageEncoder:
    """A frozen encoder with all that turns pixels into features: image size, normalisation, views.

    `size` is the side of the images in pixels; `mean` and `std` are those of pixels in 0..1, per channel. `views` is
    1 for the whole image, 2 with its mirror image, 5 with its four corners, 6 with both. With a `shift` above 0, eight
    images that are moved by so many pixels to the sides and corners are views as well. Raises ConfigError if the shift
    is not below the size.
    """

    encoder: Encoder
    name: str
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    views: int
    device: torch.device
    shift: int = 0
    graphs: Graphs | None = None  # encode by these, rather than by torch

    def __post_init__(self) -> None:
        if self.shift >= self.size:
            raise ConfigError(
                f"images of {self.size} pixels cannot be moved by {self.shift}", hint="--set features.shift=3, say"
            )

    @property
    def groups(self) -> tuple[int, ...]:
        """The sizes of the groups of features."""
        return self.encoder.groups(self.size)

    @property
    def feature_size(self) -> int:
        """D, the sum of the groups."""
        return sum(self.groups)

    @property
    def key(self) -> str:
        """A hash (32 hexadecimal digits) of the weights and of everything else that features depend on."""
        described = (VERSION, self.name, self.size, self.mean, self.std, self.views, self.shift)
        return weights_digest(self.encoder, repr(described))

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        """Features (B, D), groups of unit length, of pixels (B, S, S, 3) uint8."""
        self.encoder.eval()
        return self._features(pixels, self.graphs or self.encoder.describe)

    def traceable(self, pixels: Tensor) -> Tensor:
        """The computation of `encode`, in a form that the ONNX exporter can trace.

        Views of one size are described together: a copy of the network for each view would take long to load.
        """
        views = list(self._views(self._normal(pixels)))
        z: list[Tensor] = []
        for side in dict.fromkeys(view.shape[-1] for view in views):
            same = [view for view in views if view.shape[-1] == side]
            features = self._normalised(self.encoder.describe(torch.cat(same)))
            z += features.view(len(same), -1, features.shape[1]).unbind()
        return self._averaged(z)

    def _features(self, pixels: Tensor, describe: Callable[[Tensor], Tensor]) -> Tensor:
        return self._averaged([self._normalised(describe(view)) for view in self._views(self._normal(pixels))])

    def _normal(self, pixels: Tensor) -> Tensor:
        """Normalised images (B, 3, S, S) of pixels (B, S, S, 3)."""
        mean, std = (sent(torch.tensor(v), self.device) for v in (self.mean, self.std))
        return normalise(sent(pixels, self.device), mean, std)

    def _averaged(self, z: list[Tensor]) -> Tensor:
        """The features (B, D) of images, from those of their views."""
        return z[0] if len(z) == 1 else self._normalised(torch.stack(z).sum(dim=0))

    def _normalised(self, z: Tensor) -> Tensor:
        """Features (B, D) with each group at unit length."""
        return torch.cat([F.normalize(group, dim=1) for group in torch.split(z, list(self.groups), dim=1)], dim=1)

    def _views(self, images: Tensor) -> Iterator[Tensor]:
        """The views of images (B, 3, S, S); where a moved image leaves a margin, its edge is repeated."""
        step, side = self.shift, images.shape[-1]
        padded = F.pad(images, (step,) * 4, mode="replicate") if step else images
        for y, x in product((step, 0, 2 * step) if step else (0,), repeat=2):
            view = padded[:, :, y : y + side, x : x + side]
            yield view
            if self.views in MIRRORED:
                yield view.flip(3)
        if self.views in CORNERED:
            part = self.corner
            for y, x in product((0, side - part), repeat=2):
                yield self._sized(images[:, :, y : y + part, x : x + part])

    @property
    def corner(self) -> int:
        """The side of a corner in pixels."""
        return round(self.size * CORNER)

    @property
    def sides(self) -> tuple[int, ...]:
        """The sides of the images that the encoder sees: whole ones, and corners that are not enlarged."""
        return (self.size, self.corner) if self.views in CORNERED and self._corners_fit else (self.size,)

    @property
    def _corners_fit(self) -> bool:
        """Whether a corner has features of the same kinds as the image."""
        return self.encoder.any_size and self.encoder.groups(self.corner) == self.groups

    def _sized(self, part: Tensor) -> Tensor:
        """A part of an image as it is, or enlarged where its features would be others than those of the image."""
        if self._corners_fit:
            return part
        return F.interpolate(part, size=(self.size, self.size), mode="bilinear", align_corners=False)
