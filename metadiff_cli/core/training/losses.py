"""What pretraining asks of an encoder: to tell the base classes by a head, or the two images of a pair from others."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metadiff_cli.errors import DataError


class Heads(nn.Module):
    """Linear heads over flattened or pooled feature maps: the base classes, and optionally the 4 rotations.

    `classes` 0 stands for no base classes: pairs of images need no head.

    With `cosine` the logits of the classes are that scale times the cosine to each class's weight (Chen et al. 2019):
    with thousands of classes over few features a linear head hardly gets going.
    """

    def __init__(self, channels: int, side: int, classes: int, rotation: bool, cosine: float | None = None) -> None:
        super().__init__()
        self.channels, self.side, self.cosine = channels, side, cosine
        self.classes = nn.Linear(channels * side * side, classes) if classes else None
        self.rotation = nn.Linear(channels * side * side, 4) if rotation else None

    def class_logits(self, features: Tensor) -> Tensor:
        """(B, C) of features (B, D)."""
        assert self.classes is not None
        if self.cosine is None:
            logits: Tensor = self.classes(features)
            return logits
        return self.cosine * F.linear(F.normalize(features, dim=1), F.normalize(self.classes.weight, dim=1))

    @torch.no_grad()
    def resize(self, side: int) -> None:
        """Follow a change of image size: weights are resampled over the positions and keep their scale."""
        for layer in (self.classes, self.rotation):
            if layer is None or side == self.side:
                continue
            maps = layer.weight.view(-1, self.channels, self.side, self.side)
            maps = F.interpolate(maps, size=(side, side), mode="bilinear", align_corners=False)
            layer.weight = nn.Parameter(maps.flatten(1) * (self.side / side) ** 2)
        self.side = side


class Pairs:
    """Two images of each of `ways` classes, drawn anew for each batch; classes of one image are left out."""

    def __init__(self, labels: np.ndarray, turns: int, ways: int) -> None:
        """`turns` 4 makes four classes of each. Raises DataError when there are not `ways` classes."""
        self.rows = torch.from_numpy(np.argsort(labels, kind="stable"))  # class after class
        counts = torch.from_numpy(np.bincount(labels))
        self.first = torch.cumsum(counts, 0) - counts
        self.classes, self.counts = torch.nonzero(counts >= 2).flatten(), counts
        self.turns, self.ways = turns, ways
        if len(self.classes) * turns < ways:
            raise DataError(
                f"a batch of pairs wants {ways} classes of two images, there are {len(self.classes) * turns}",
                hint=f"lower --set pretrain.batch={2 * len(self.classes) * turns}, or use pretrain.objective=classes",
            )

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Rows (2 N,), first one image of each class and then the other, and labels: class times turns plus turn."""
        chosen = torch.randperm(len(self.classes) * self.turns, generator=generator)[: self.ways]
        classes, turn = self.classes[chosen // self.turns], chosen % self.turns
        count = self.counts[classes]
        first, other = torch.rand(2, self.ways, generator=generator, dtype=torch.float64)
        one = (first * count).long()
        two = (one + 1 + (other * (count - 1)).long()) % count  # another one than `one`
        rows = self.rows[torch.cat([self.first[classes] + one, self.first[classes] + two])]
        return rows, (classes * self.turns + turn).repeat(2)


def pair_logits(features: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Scaled cosines (2 N, N) of features (2 N, D) of pairs to the other half, and which one is the twin (2 N,).

    They are relative to the mean of the batch: features behind a ReLU have no negative side, and their cosines no room.
    """
    one, two = F.normalize(features - features.mean(dim=0), dim=1).chunk(2)
    cosines = one @ two.T
    twins = torch.arange(len(one), device=features.device).repeat(2)
    return scale * torch.cat([cosines, cosines.T]), twins
