"""Heads that follow the image size, and pairs of images."""

import numpy as np
import pytest
import torch

from metadiff_cli.core.training.losses import Heads, Pairs, pair_logits
from metadiff_cli.errors import DataError


def test_resized_heads_give_the_same_answer_where_position_does_not_matter() -> None:
    heads = Heads(4, 3, 7, rotation=True)
    with torch.no_grad():
        heads.classes.weight.copy_(torch.randn(7, 4, 1).expand(7, 4, 9).flatten(1))
    flat = torch.randn(2, 4, 1, 1)
    before = heads.classes(flat.expand(2, 4, 3, 3).flatten(1))
    heads.resize(5)
    assert heads.rotation is not None and heads.rotation.weight.shape == (4, 100)
    assert torch.allclose(heads.classes(flat.expand(2, 4, 5, 5).flatten(1)), before, atol=1e-5)


def test_pairs_are_two_images_of_each_of_some_classes() -> None:
    labels = np.array([3, 0, 1, 0, 3, 1, 2, 3, 0])  # class 2 has a single image
    pairs, generator = Pairs(labels, 4, 10), torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(200):
        rows, drawn = pairs.draw(generator)
        assert torch.equal(drawn[:10], drawn[10:]) and len(drawn[:10].unique()) == 10
        assert torch.equal(torch.from_numpy(labels)[rows], drawn // 4) and bool((rows[:10] != rows[10:]).all())
        seen |= {(int(row), int(label) % 4) for row, label in zip(rows, drawn, strict=True)}
    assert seen == {(row, turn) for row in range(9) if labels[row] != 2 for turn in range(4)}
    with pytest.raises(DataError, match="13 classes with two images; there are 12") as caught:
        Pairs(labels, 4, 13)
    assert "pretrain.batch=24" in (caught.value.hint or "")


def test_each_image_of_a_pair_is_sought_among_the_others() -> None:
    z = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 3.0], [0.0, 5.0]])
    z = z - z.mean(dim=0)
    logits, twins = pair_logits(z + torch.tensor([4.0, -1.0]), 10.0)
    for i in range(4):
        others = (2, 3) if i < 2 else (0, 1)
        expected = torch.stack([10 * torch.cosine_similarity(z[i], z[j], dim=0) for j in others])
        assert torch.allclose(logits[i], expected, atol=1e-5)
    assert twins.tolist() == [0, 1, 0, 1]
