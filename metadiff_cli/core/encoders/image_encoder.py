"""ImageEncoder: from pixels to unit-length features, with a frozen encoder.

The features z (D,) of an image are L2-normalised, averaged over the views of the image (its mirror image, and images
moved by some pixels), and normalised again.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from metadiff_cli.core.device import sent
from metadiff_cli.core.encoders.networks import Encoder
from metadiff_cli.errors import ConfigError

VERSION = 1  # of the computation below, as part of the key: a change of it makes files of features anew


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Pixels (B, H, W, 3) uint8 -> (B, 3, H, W) float, zero mean and unit variance per channel, channels last.

    `mean` and `std` (3,) are those of pixels in 0..1.
    """
    return ((images.float() / 255 - mean) / std).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class ImageEncoder:
    """A frozen encoder with all that turns pixels into features: image size, normalisation, views.

    `size` is the side of the images in pixels; `mean` and `std` are those of pixels in 0..1, per channel. With
    `mirror`, the mirror image is a view as well. With a `shift` above 0, so are eight images that are moved by so many
    pixels to the sides and corners. Raises ConfigError if the shift is not below the size.
    """

    encoder: Encoder
    name: str
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    mirror: bool
    device: torch.device
    shift: int = 0

    def __post_init__(self) -> None:
        if self.shift >= self.size:
            raise ConfigError(
                f"images of {self.size} pixels cannot be moved by {self.shift}", hint="--set features.shift=3, say"
            )

    @property
    def feature_size(self) -> int:
        """D."""
        return self.encoder.feature_size(self.size)

    @property
    def key(self) -> str:
        """A hash (32 hexadecimal digits) of the weights and of everything else that features depend on."""
        digest = hashlib.sha256(repr((VERSION, self.name, self.size, self.mean, self.std, self.mirror)).encode())
        if self.shift:
            digest.update(f"shift {self.shift}".encode())
        for name, tensor in sorted(self.encoder.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:32]

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        """Features (B, D) of unit length, of pixels (B, S, S, 3) uint8."""
        self.encoder.eval()
        return self.traceable(pixels)

    def traceable(self, pixels: Tensor) -> Tensor:
        """The computation of `encode`, in a form that the ONNX exporter can trace."""
        mean, std = (sent(torch.tensor(v), self.device) for v in (self.mean, self.std))
        images = normalise(sent(pixels, self.device), mean, std)
        z = [F.normalize(self.encoder(view), dim=1) for view in self._views(images)]
        return z[0] if len(z) == 1 else F.normalize(torch.stack(z).sum(dim=0), dim=1)

    def _views(self, images: Tensor) -> Iterator[Tensor]:
        """Views (B, 3, S, S) of images (B, 3, S, S); where a moved image leaves a margin, its edge is repeated."""
        step, side = self.shift, images.shape[-1]
        corners = list(product((0, step, 2 * step), repeat=2)) if step else [(0, 0)]
        padded = F.pad(images, (step,) * 4, mode="replicate") if step else images
        for y, x in corners:
            view = padded[:, :, y : y + side, x : x + side]
            yield view
            if self.mirror:
                yield view.flip(3)
