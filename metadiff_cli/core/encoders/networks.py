"""The encoders of the field: images (B, 3, S, S) -> features (B, D), not normalised.

conv4         four 3x3 convolution blocks of 64 channels (Vinyals et al. 2016; Snell et al. 2017)
conv4-padded  conv4 on images with a margin up to a multiple of 16 pixels, so that pooling loses no row
resnet10      a stem of stride 2 and four basic residual blocks of 48, 96, 192, 512 channels (He et al. 2016; depth 10
              as in Chen et al. 2019): on two CPU cores it trains at six tenths of conv4's speed
resnet12      four residual blocks of 64, 160, 320, 640 channels with DropBlock (Lee et al. 2019; Tian et al. 2020)

`maps` gives the last feature maps (B, C, H, W); `pooled` says whether they are averaged or flattened to a vector. The
head of pretraining needs that: flattened features depend on the image size, and its linear head is resized with them.

`describe` gives what classifiers are made of. It is the vector of `forward`, and for some encoders further groups of
features, which the layers below or the spread over the maps give.
"""

import hashlib
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metadiff_cli.errors import ConfigError


class Encoder(nn.Module):
    """Base: `maps` takes images (B, 3, S, S) to (B, C, H, W), `forward` takes them to features (B, D)."""

    pooled: bool
    channels: int
    stride: int
    any_size = True  # whether images of another size give features as well

    def maps(self, images: Tensor) -> Tensor:
        """Feature maps (B, C, H, W) of images (B, 3, S, S)."""
        raise AssertionError("an encoder defines its own maps")

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, D) of normalised images (B, 3, S, S)."""
        maps = self.maps(images)
        return maps.mean(dim=(2, 3)) if self.pooled else maps.flatten(1)

    def describe(self, images: Tensor) -> Tensor:
        """All groups of features (B, D) of normalised images (B, 3, S, S), one after the other."""
        features: Tensor = self(images)
        return features

    def groups(self, size: int) -> tuple[int, ...]:
        """The sizes of the groups of features for images of `size` pixels; their sum is D."""
        return (self.feature_size(size),)

    def side(self, size: int) -> int:
        """Height and width of the feature maps of images of `size` pixels."""
        return size // self.stride

    def feature_size(self, size: int) -> int:
        """The size of what `forward` gives for images of `size` pixels."""
        return self.channels if self.pooled else self.channels * self.side(size) ** 2


class SpreadEncoder(Encoder):
    """Base of encoders that average their maps: a second group is the standard deviation of each channel over them.

    It tells of parts and patterns, which the average hides, and is worth most with one image per class.
    """

    pooled = True

    def describe(self, images: Tensor) -> Tensor:
        """Mean and standard deviation (B, 2 C) of each channel; the mean alone where the maps are a single point."""
        maps = self.maps(images)
        mean = maps.mean(dim=(2, 3))
        if maps.shape[-1] == 1:
            return mean
        rest = maps - mean[..., None, None]
        return torch.cat([mean, rest.square().mean(dim=(2, 3)).sqrt()], dim=1)

    def groups(self, size: int) -> tuple[int, ...]:
        """The sizes of the groups of features for images of `size` pixels."""
        return (self.channels,) if self.side(size) == 1 else (self.channels, self.channels)


def weights_digest(network: nn.Module, about: str) -> str:
    """A hash (32 hexadecimal digits) of all weights of a network, and of a text."""
    digest = hashlib.sha256(about.encode())
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]


class ConvBlock(nn.Module):
    """3x3 convolution, BatchNorm, 2x2 max-pooling, ReLU.

    Pooling before the ReLU gives the same result as the usual order (both are monotone) for a quarter of the work.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(F.max_pool2d(self.norm(self.conv(x)), 2))


class Conv4(Encoder):
    """Four blocks of 64 channels; D = 64 * (S // 16)^2, that is 1,600 at 84 x 84 and 64 at 28 x 28."""

    pooled = False
    stride = 16

    def __init__(self, channels: int = 64) -> None:
        super().__init__()
        self.channels = channels
        self.blocks = nn.Sequential(ConvBlock(3, channels), *(ConvBlock(channels, channels) for _ in range(3)))
        _initialise(self)

    def maps(self, images: Tensor) -> Tensor:
        maps: Tensor = self.blocks(images)  # (B, 64, S/16, S/16)
        return maps


class PaddedConv4(Conv4):
    """conv4 on images whose edge is repeated up to a multiple of 16 pixels: D = 256 at 28 x 28, where conv4 has 64."""

    def side(self, size: int) -> int:
        """Height and width of the feature maps of images of `size` pixels."""
        return -(-size // self.stride)

    def maps(self, images: Tensor) -> Tensor:
        """Feature maps (B, C, H, W) of images (B, 3, S, S)."""
        missing = self.side(images.shape[-1]) * self.stride - images.shape[-1]
        before, after = missing // 2, missing - missing // 2
        return super().maps(F.pad(images, (before, after, before, after), mode="replicate"))


class DropBlock(nn.Module):
    """Zeroes square regions of the feature maps in training (Ghiasi et al. 2018), `rate` of the area in all.

    The seeds of the squares come from torch's default generator, which the training loop seeds per epoch.
    """

    def __init__(self, rate: float, block: int) -> None:
        super().__init__()
        self.rate = rate
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return x
        _, _, height, width = x.shape
        block = min(self.block, height, width)
        centres = (height - block + 1) * (width - block + 1)
        gamma = self.rate * height * width / (block**2 * centres)
        seeds = torch.rand(*x.shape[:2], height - block + 1, width - block + 1, device=x.device) < gamma
        border = block - 1
        seeds = F.pad(seeds.to(x.dtype), (border, border, border, border))
        keep = 1 - F.max_pool2d(seeds, block, stride=1)
        return x * keep * (keep.numel() / keep.sum().clamp_min(1.0))


class ResidualBlock(nn.Module):
    """Three 3x3 convolutions beside a 1x1 shortcut, then LeakyReLU, 2x2 max-pooling and DropBlock."""

    def __init__(self, inputs: int, outputs: int, drop_rate: float, drop_block: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i in range(3):
            source = inputs if i == 0 else outputs
            layers += [nn.Conv2d(source, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)]
            layers += [nn.LeakyReLU(0.1)] if i < 2 else []
        self.body = nn.Sequential(*layers)
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.drop = DropBlock(drop_rate, drop_block)

    def forward(self, x: Tensor) -> Tensor:
        dropped: Tensor = self.drop(F.max_pool2d(F.leaky_relu(self.body(x) + self.shortcut(x), 0.1), 2))
        return dropped


class ResNet12(SpreadEncoder):
    """D = 640, averaged over the last maps; DropBlock of size 5 in the last two blocks, dropout in the first two."""

    stride = 16
    channels = 640

    def __init__(self, drop_rate: float = 0.1) -> None:
        super().__init__()
        widths, blocks = (64, 160, 320, 640), (1, 1, 5, 5)
        inputs = (3, *widths[:-1])
        self.blocks = nn.Sequential(
            *(ResidualBlock(i, o, drop_rate, b) for i, o, b in zip(inputs, widths, blocks, strict=True))
        )
        _initialise(self)

    def maps(self, images: Tensor) -> Tensor:
        maps: Tensor = self.blocks(images)  # (B, 640, S/16, S/16)
        return maps


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a 1x1 shortcut; the first one and the shortcut have the stride (He et al. 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


class ResNet10(SpreadEncoder):
    """D = 512, averaged over the last maps (6 x 6 at 84 x 84).

    The stem halves the resolution, and the widths grow where the maps are small: most of the work is in wide
    convolutions, which a CPU does best.
    """

    stride = 16
    channels = 512

    def __init__(self) -> None:
        super().__init__()
        widths, strides = (32, 48, 96, 192, 512), (2, 1, 2, 2)
        self.stem = nn.Sequential(
            nn.Conv2d(3, widths[0], 3, 2, padding=1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()
        )
        self.blocks = nn.Sequential(*(BasicBlock(i, o, s) for (i, o), s in zip(pairwise(widths), strides, strict=True)))
        _initialise(self)

    def side(self, size: int) -> int:
        """Height and width of the feature maps of images of `size` pixels."""
        return -(-size // self.stride)

    def maps(self, images: Tensor) -> Tensor:
        maps: Tensor = self.blocks(self.stem(images))  # (B, 512, S/16, S/16), rounded up
        return maps


def _initialise(module: nn.Module) -> None:
    """He initialisation for convolutions (fan out), ones and zeros for BatchNorm: what the field uses."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="leaky_relu", a=0.1)


ENCODERS: dict[str, Callable[[], Encoder]] = {
    "conv4": Conv4, "conv4-padded": PaddedConv4, "resnet10": ResNet10, "resnet12": ResNet12,
}  # fmt: skip


def build_encoder(name: str) -> Encoder:
    """The named encoder, randomly initialised. Raises ConfigError for an unknown name."""
    if name not in ENCODERS:
        raise ConfigError(f"unknown encoder '{name}'", hint=f"choose one of {', '.join(ENCODERS)} or a checkpoint file")
    return ENCODERS[name]()
