"""The two objectives of pretraining: classify the base classes with a head, or match the two images of a pair."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metadiff_cli.errors import DataError


class Heads(nn.Module):
    """Linear heads over flattened or pooled feature maps: one for the base classes, one for the 4 rotations.

    Both are optional; `classes` = 0 leaves out the first, as pairs of images need no head. With `cosine` the logits of
    the classes are that scale times the cosine to each class's weight (Chen et al. 2019): a linear head hardly starts
    to learn with thousands of classes over few features.
    """

    def __init__(self, channels: int, side: int, classes: int, rotation: bool, cosine: float | None = None) -> None:
        super().__init__()
        self.channels, self.side, self.cosine = channels, side, cosine
        self.classes = nn.Linear(channels * side * side, classes) if classes else None
        self.rotation = nn.Linear(channels * side * side, 4) if rotation else None

    def class_logits(self, features: Tensor) -> Tensor:
        """Logits (B, C) of features (B, D)."""
        assert self.classes is not None
        if self.cosine is None:
            logits: Tensor = self.classes(features)
            return logits
        return self.cosine * F.linear(F.normalize(features, dim=1), F.normalize(self.classes.weight, dim=1))

    @torch.no_grad()
    def resize(self, side: int) -> None:
        """Follow a change of image size: resample the weights over the positions and keep their scale."""
        for layer in (self.classes, self.rotation):
            if layer is None or side == self.side:
                continue
            maps = layer.weight.view(-1, self.channels, self.side, self.side)
            maps = F.interpolate(maps, size=(side, side), mode="bilinear", align_corners=False)
            layer.weight = nn.Parameter(maps.flatten(1) * (self.side / side) ** 2)
        self.side = side


class Pairs:
    """Batches of two images of each of `ways` classes; classes with one image are left out."""

    def __init__(self, labels: np.ndarray, turns: int, ways: int) -> None:
        """With `turns` = 4, quarter turns make four of each class. Raises DataError for fewer than `ways` classes."""
        self.rows = torch.from_numpy(np.argsort(labels, kind="stable"))  # class after class
        counts = torch.from_numpy(np.bincount(labels))
        self.first = torch.cumsum(counts, 0) - counts
        self.classes, self.counts = torch.nonzero(counts >= 2).flatten(), counts
        self.turns, self.ways = turns, ways
        if len(self.classes) * turns < ways:
            raise DataError(
                f"a batch of pairs needs {ways} classes with two images; there are {len(self.classes) * turns}",
                hint=f"lower --set pretrain.batch={2 * len(self.classes) * turns}, or use pretrain.objective=classes",
            )

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Rows (2 N,), one image of each class and then the other of each, and labels: class times turns plus turn."""
        chosen = torch.randperm(len(self.classes) * self.turns, generator=generator)[: self.ways]
        classes, turn = self.classes[chosen // self.turns], chosen % self.turns
        count = self.counts[classes]
        first, other = torch.rand(2, self.ways, generator=generator, dtype=torch.float64)
        one = (first * count).long()
        two = (one + 1 + (other * (count - 1)).long()) % count  # another one than `one`
        rows = self.rows[torch.cat([self.first[classes] + one, self.first[classes] + two])]
        return rows, (classes * self.turns + turn).repeat(2)


def pair_logits(features: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Scaled cosines (2 N, N) of features (2 N, D) of pairs to the other half, and the place of each one's twin (2 N,).

    The mean of the batch is subtracted first: features behind a ReLU are never negative, so cosines differ little.
    """
    one, two = F.normalize(features - features.mean(dim=0), dim=1).chunk(2)
    cosines = one @ two.T
    twins = torch.arange(len(one), device=features.device).repeat(2)
    return scale * torch.cat([cosines, cosines.T]), twins
