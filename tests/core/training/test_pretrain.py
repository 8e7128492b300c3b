"""Pretraining on small arrays: it learns, keeps the best, and resumes exactly."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from metadiff_cli.config.load import resolve
from metadiff_cli.config.schema import AugmentConfig, PretrainConfig
from metadiff_cli.core.encoders.networks import Conv4, Encoder
from metadiff_cli.core.training.pretrain import PretrainEpoch, Pretrainer, learning_rate, scaled, strength
from metadiff_cli.core.training.transforms import Augmentation
from metadiff_cli.errors import MetaDiffError
from tests.worlds import CPU, restored


def trainer_of(build: Callable[[], Encoder] = Conv4, **settings: object) -> Pretrainer:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 12)
    pixels = (labels[:, None, None, None] * 50 + rng.integers(0, 50, (48, 32, 32, 3))).astype(np.uint8)
    values = {"epochs": 2, "batch": 16, "augment": AugmentConfig(jitter=0.0), "precision": "fp32", **settings}
    return Pretrainer(
        build, PretrainConfig.model_validate(values), pixels, labels, classes=4, size=32,
        mean=[0.5] * 3, std=[0.25] * 3, seed=0, device=CPU,
    )  # fmt: skip


def test_the_schedules() -> None:
    cosine, cycle = PretrainConfig(schedule="cosine", lr=1.0), PretrainConfig(schedule="one-cycle", lr=1.0)
    assert learning_rate(cosine, 0.0) == 1.0 and learning_rate(cosine, 0.5) == pytest.approx(0.5)
    assert learning_rate(cycle, 0.0) == pytest.approx(0.1) and learning_rate(cycle, 0.15) == pytest.approx(1.0)
    assert 0 < learning_rate(cycle, 1.0) <= 1e-3
    fading, never = PretrainConfig(fade=0.4), PretrainConfig()
    assert [strength(fading, p) for p in (0.0, 0.6, 0.8, 1.0)] == pytest.approx([1.0, 1.0, 0.5, 0.0])
    assert [strength(never, p) for p in (0.0, 0.99, 1.0)] == [1.0, 1.0, 1.0]


def test_a_training_ends_on_images_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, drawn = trainer_of(fade=1.0), []

    def step(index: torch.Tensor, size: int, lr: float, how: Augmentation, generator: torch.Generator) -> torch.Tensor:
        drawn.append(how)
        return torch.ones(3)

    monkeypatch.setattr(trainer, "_train_step", step)
    list(trainer.run(lambda encoder: None))
    crops = [how.crop[0] for how in drawn]
    assert crops[0] == trainer.augmentation.crop[0] and crops == sorted(crops) and 0.85 < crops[-1] < 1.0


@pytest.mark.parametrize("settings", [{}, {"rotation_weight": 1.0}, {"rotated_classes": True},
                                      {"objective": "pairs", "cosine_head": 15, "batch": 8},
                                      {"stages": [[0.5, 0.5], [0.5, 1]]}])  # fmt: skip
def test_pretraining_learns_and_keeps_the_best(settings: dict[str, object]) -> None:
    trainer = trainer_of(**settings, epochs=6)
    values = iter([1.0, 5.0, 2.0, 3.0, 4.0, 0.0])
    records = list(trainer.run(lambda encoder: next(values)))
    epochs = [r for r in records if isinstance(r, PretrainEpoch)]
    assert [e.best for e in epochs] == [True, True, False, False, False, False]
    assert trainer.best_value == 5.0 and epochs[-1].loss < epochs[0].loss
    current = trainer.encoder.state_dict()
    assert any(not torch.equal(current[name], kept) for name, kept in trainer.best.items())


def test_stages_are_shares_of_the_image_size() -> None:
    trainer = trainer_of(epochs=4, stages=[[0.25, 0.1], [0.25, 0.75], [0.5, 1]])
    assert [trainer.size_of(epoch) for epoch in range(4)] == [16, 24, 32, 32]  # no encoder sees less than 16 pixels


SIZES = {  # of images in the stages of a preset's training, in pixels
    "folder": [64, 84], "mini-5w1s": [48, 64, 84], "tiered-5w5s": [48, 64, 84],
    "mini-5w5s-resnet12": [56, 70, 84], "glyphs-5w1s": [],
}  # fmt: skip


@pytest.mark.parametrize("preset", SIZES)
def test_the_stages_of_presets_follow_the_image_size(preset: str) -> None:
    config = resolve(preset, environ={})
    scales = [scale for _, scale in config.pretrain.stages]
    assert [scaled(config.data.size, scale) for scale in scales] == SIZES[preset]
    half = resolve(preset, settings=["data.size=42"], environ={})
    assert [scaled(half.data.size, scale) for scale, _ in zip(scales, SIZES[preset], strict=True)] == [
        pytest.approx(size / 2, abs=1) for size in SIZES[preset]
    ]


def test_a_trainer_leaves_global_randomness_alone() -> None:
    before = torch.get_rng_state()
    trainer = trainer_of(WithNoise)
    assert torch.equal(before, torch.get_rng_state())
    list(trainer.run(lambda encoder: None))
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(3)
    again = trainer_of(WithNoise)
    list(again.run(lambda encoder: None))
    assert all(torch.equal(t, again.encoder.state_dict()[n]) for n, t in trainer.encoder.state_dict().items())


class Dropped(nn.Module):
    """An encoder's part that draws from the default generator, as DropBlock does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rand(())


class WithNoise(Conv4):
    """An encoder with such a part."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks.append(Dropped())


@pytest.mark.parametrize(
    ("stop", "settings"),
    [(1, {}), (3, {"rotation_weight": 1.0}), (4, {}), (6, {"rotated_classes": True}), (8, {}),
     (3, {"fade": 0.7}), (5, {"fade": 0.7}), (2, {"objective": "pairs", "cosine_head": 10.0, "batch": 8}),
     *((stop, {"stages": [[0.5, 0.5], [0.5, 1]]}) for stop in (2, 4, 5))],
)  # fmt: skip
def test_pretraining_goes_on_exactly_from_any_yield(stop: int, settings: dict[str, object], tmp_path: Path) -> None:
    """48 images in batches of 16: three steps and an epoch, twice; after `stop` yields all is made anew."""

    def make() -> Pretrainer:
        return trainer_of(WithNoise, **settings)

    def validate(encoder: nn.Module) -> float:
        return float(sum(p.detach().double().sum() for p in encoder.parameters()))

    whole, parts = make(), make()
    list(whole.run(validate))
    list(itertools.islice(parts.run(validate), stop))
    fresh = restored(parts, make(), tmp_path / "a.safetensors")
    torch.rand(3)  # whatever else draws from the default generator
    again = restored(fresh, make(), tmp_path / "b.safetensors")  # stopped before it has gone on
    list(again.run(validate))
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert again.history == whole.history
    (theirs, plain), (ours, ours_plain) = whole.state(), again.state()
    assert plain == ours_plain and theirs.keys() == ours.keys()
    assert all(torch.equal(t, ours[name]) for name, t in theirs.items())


def test_a_state_without_a_loss_is_not_kept() -> None:
    trainer = trainer_of()
    next(trainer.run(lambda encoder: None))
    trainer.sums.add(torch.full((3,), math.nan))
    with pytest.raises(MetaDiffError, match="loss became nan"):
        trainer.state()
