"""Suggestions for labelling: typical, uncertain, different from one another, and never a copy."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from metadiff_cli.core.evaluation.suggest import entropy_of, suggested


def cluster(axis: int, images: int, spread: float = 0.1) -> Tensor:
    """Unit features (images, 8) around one of eight orthogonal directions."""
    g = torch.Generator().manual_seed(axis)
    return normalize(torch.eye(8)[axis] + spread * torch.randn(images, 8, generator=g), dim=-1)


SUPPORT = torch.eye(8)[:2]


def test_one_of_each_group_that_no_label_covers_the_largest_first() -> None:
    groups = [cluster(0, 9), cluster(2, 7), cluster(3, 4), cluster(4, 1)]  # the first one has a labelled image
    sizes = [len(group) for group in groups]
    owner = torch.arange(4).repeat_interleave(torch.tensor(sizes))
    picks = suggested(torch.cat(groups), torch.ones(sum(sizes)), SUPPORT, 3)
    assert owner[picks].tolist() == [1, 2, 3]


def test_the_most_typical_image_of_a_group() -> None:
    middle = torch.eye(8)[2]
    around = 0.8 * middle + 0.6 * torch.eye(8)[5:]  # more alike to the middle one than to one another
    assert suggested(torch.cat([around, middle.unsqueeze(0)]), torch.ones(4), SUPPORT, 1) == [3]


def test_uncertain_images_come_first() -> None:
    phi = torch.cat([cluster(2, 5), cluster(3, 5)])
    weights = torch.tensor([0.1] * 5 + [0.9] * 5)
    assert suggested(phi, weights, SUPPORT, 1)[0] >= 5
    assert suggested(phi, weights.flip(0), SUPPORT, 1)[0] < 5


def test_copies_and_certain_images_are_left_out() -> None:
    phi = torch.cat([SUPPORT, cluster(2, 1).repeat(3, 1), cluster(3, 1)])
    weights = torch.ones(6)
    picks = suggested(phi, weights, SUPPORT, 6)
    assert len(picks) == 2 and sorted(picks)[1] == 5 and 2 <= sorted(picks)[0] <= 4
    assert suggested(phi, torch.zeros(6), SUPPORT, 6) == []


def test_the_order_of_the_images_does_not_matter() -> None:
    phi = torch.cat([cluster(axis, 4) for axis in range(2, 6)])
    weights = torch.rand(16, generator=torch.Generator().manual_seed(1))
    order = torch.randperm(16, generator=torch.Generator().manual_seed(2))
    assert order[suggested(phi[order], weights[order], SUPPORT, 5)].tolist() == suggested(phi, weights, SUPPORT, 5)


def test_entropy_is_a_share() -> None:
    assert entropy_of(torch.tensor([[1.0, 0, 0], [1 / 3] * 3])).tolist() == pytest.approx([0, 1])
