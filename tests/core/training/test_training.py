"""Encoders, augmentation, pretraining and meta-training on small arrays."""

import itertools
import math
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from torch import nn

from metadiff_cli.commands.train.metatrain import metatrain as metatraining
from metadiff_cli.config.schema import AugmentConfig, DenoiserConfig, MetatrainConfig, PretrainConfig
from metadiff_cli.core.checkpoints.file import load_checkpoint, save_checkpoint
from metadiff_cli.core.encoders.bank import FeatureBank
from metadiff_cli.core.encoders.image_encoder import normalise
from metadiff_cli.core.encoders.networks import Conv4, DropBlock, build_encoder
from metadiff_cli.core.evaluation.episodes import training_batch
from metadiff_cli.core.method.metric import cosine_logits
from metadiff_cli.core.method.task_space import fit_task_space
from metadiff_cli.core.training.losses import Heads, Pairs, pair_logits
from metadiff_cli.core.training.metatrain import MetaTrainer, MetaValidation, Queries
from metadiff_cli.core.training.pretrain import PretrainEpoch, Pretrainer, learning_rate, strength
from metadiff_cli.core.training.transforms import (
    Augmentation,
    Changes,
    affine_maps,
    augment,
    rotate_quarters,
    sampling_grid,
)
from metadiff_cli.errors import ConfigError, DataError, MetaDiffError

Trainer = TypeVar("Trainer", Pretrainer, MetaTrainer)
CPU = torch.device("cpu")
MEAN, STD = torch.tensor([0.5, 0.5, 0.5]), torch.tensor([0.25, 0.25, 0.25])


@pytest.mark.parametrize(
    ("name", "size", "features"),
    [
        ("conv4", 84, 1600), ("conv4", 28, 64), ("conv4-padded", 28, 256), ("conv4-padded", 31, 256),
        ("conv4-padded", 32, 256), ("resnet12", 32, 640),
    ],
)  # fmt: skip
def test_encoders_have_the_sizes_of_the_field(name: str, size: int, features: int) -> None:
    encoder = build_encoder(name).eval()
    assert encoder.feature_size(size) == features
    with torch.no_grad():
        assert encoder(torch.randn(2, 3, size, size)).shape == (2, features)


def test_the_padded_conv4_is_conv4_on_a_larger_image() -> None:
    padded, plain = build_encoder("conv4-padded").eval(), build_encoder("conv4").eval()
    plain.load_state_dict(padded.state_dict())
    x = torch.randn(2, 3, 28, 28)
    larger = torch.nn.functional.pad(x, (2, 2, 2, 2), mode="replicate")
    with torch.no_grad():
        assert torch.equal(padded(x), plain(larger)) and torch.equal(padded(larger), plain(larger))


def test_unknown_encoder() -> None:
    with pytest.raises(ConfigError, match="conv5"):
        build_encoder("conv5")


def test_pooling_before_relu_is_the_usual_block() -> None:
    block = Conv4().blocks[0].eval()
    x = torch.randn(2, 3, 12, 12)
    usual = torch.nn.functional.max_pool2d(torch.relu(block.norm(block.conv(x))), 2)
    assert torch.equal(block(x), usual)


def test_dropblock_drops_its_rate_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    drop, x = DropBlock(0.1, 5), torch.ones(64, 8, 20, 20)
    out = drop.train()(x)
    assert float((out == 0).float().mean()) == pytest.approx(0.1, abs=0.02)
    assert float(out.mean()) == pytest.approx(1.0, abs=0.01)
    assert torch.equal(drop.eval()(x), x)


def test_no_augmentation_is_normalisation() -> None:
    pixels = torch.randint(0, 256, (3, 12, 12, 3), dtype=torch.uint8)
    still = Augmentation(crop=(1.0, 1.0), aspect=(1.0, 1.0), flip=False, jitter=0.0)
    out = augment(pixels, 12, Changes.draw(3, still, torch.Generator().manual_seed(0)), MEAN, STD)
    assert torch.allclose(out, normalise(pixels, MEAN, STD), atol=1e-4)


def test_the_grid_is_that_of_torch() -> None:
    maps = affine_maps(9, Augmentation(rotate=10), torch.Generator().manual_seed(0))
    expected = torch.nn.functional.affine_grid(maps, [9, 3, 13, 13], align_corners=False)
    assert torch.allclose(sampling_grid(maps, 13), expected, atol=1e-6)


def test_augmentation_follows_its_generator_and_stays_inside() -> None:
    pixels = torch.randint(0, 256, (64, 20, 20, 3), dtype=torch.uint8)
    changes, again = (Changes.draw(64, Augmentation(), torch.Generator().manual_seed(3)) for _ in range(2))
    first = augment(pixels, 16, changes, MEAN, STD)
    assert torch.equal(first, augment(pixels, 16, again, MEAN, STD)) and first.shape == (64, 3, 16, 16)
    rows = torch.arange(20, 30)
    assert torch.allclose(augment(pixels[rows], 16, changes.part(rows), MEAN, STD), first[rows], atol=1e-5)
    theta = affine_maps(500, Augmentation(), torch.Generator().manual_seed(0))
    corners = torch.tensor([[x, y, 1.0] for x in (-1.0, 1.0) for y in (-1.0, 1.0)])
    assert float((theta @ corners.T).abs().max()) <= 1.0 + 1e-5
    assert 0.4 < float((theta[:, 0, 0] < 0).float().mean()) < 0.6  # half of them mirrored


def test_quarter_turns() -> None:
    x = torch.randn(4, 3, 6, 6)
    turned = rotate_quarters(x, torch.tensor([0, 1, 2, 3]))
    assert all(torch.equal(turned[k], torch.rot90(x[k], k, dims=(1, 2))) for k in range(4))


def test_the_schedules() -> None:
    cosine, cycle = PretrainConfig(schedule="cosine", lr=1.0), PretrainConfig(schedule="one-cycle", lr=1.0)
    assert learning_rate(cosine, 0.0) == 1.0 and learning_rate(cosine, 0.5) == pytest.approx(0.5)
    assert learning_rate(cycle, 0.0) == pytest.approx(0.1) and learning_rate(cycle, 0.15) == pytest.approx(1.0)
    assert 0 < learning_rate(cycle, 1.0) <= 1e-3
    fading, never = PretrainConfig(fade=0.4), PretrainConfig()
    assert [strength(fading, p) for p in (0.0, 0.6, 0.8, 1.0)] == pytest.approx([1.0, 1.0, 0.5, 0.0])
    assert [strength(never, p) for p in (0.0, 0.99, 1.0)] == [1.0, 1.0, 1.0]


def test_changes_grow_weaker_down_to_the_mirror_alone() -> None:
    how = Augmentation(crop=(0.4, 0.8), jitter=0.3, rotate=10)
    for low in (0.1, 0.3, 0.35, 0.7):  # to the last bit: a training that does not fade is what it was
        same = Augmentation(crop=(low, 0.9), jitter=0.3, rotate=10)
        assert same.weakened(1.0) == same
    assert how.weakened(0.0) == Augmentation(crop=(1.0, 1.0), aspect=(1.0, 1.0), jitter=0.0, rotate=0.0)
    half = how.weakened(0.5)
    assert (*half.crop, half.jitter, half.rotate) == pytest.approx((0.7, 0.9, 0.15, 5.0))
    assert math.prod(half.aspect) == pytest.approx(1.0)


def test_a_training_ends_on_images_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, drawn = trainer_of(fade=1.0), []

    def step(index: torch.Tensor, size: int, lr: float, how: Augmentation, generator: torch.Generator) -> torch.Tensor:
        drawn.append(how)
        return torch.ones(3)

    monkeypatch.setattr(trainer, "_train_step", step)
    list(trainer.run(lambda encoder: None))
    crops = [how.crop[0] for how in drawn]
    assert crops[0] == trainer.how.crop[0] and crops == sorted(crops) and 0.85 < crops[-1] < 1.0


def test_resized_heads_give_the_same_answer_where_position_does_not_matter() -> None:
    heads = Heads(4, 3, 7, rotation=True)
    with torch.no_grad():
        heads.classes.weight.copy_(torch.randn(7, 4, 1).expand(7, 4, 9).flatten(1))
    flat = torch.randn(2, 4, 1, 1)
    before = heads.classes(flat.expand(2, 4, 3, 3).flatten(1))
    heads.resize(5)
    assert heads.rotation is not None and heads.rotation.weight.shape == (4, 100)
    assert torch.allclose(heads.classes(flat.expand(2, 4, 5, 5).flatten(1)), before, atol=1e-5)


def trainer_of(**settings: object) -> Pretrainer:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 12)
    pixels = (labels[:, None, None, None] * 50 + rng.integers(0, 50, (48, 32, 32, 3))).astype(np.uint8)
    values = {"epochs": 2, "batch": 16, "augment": AugmentConfig(jitter=0.0), "precision": "fp32", **settings}
    torch.manual_seed(0)
    return Pretrainer(
        build_encoder("conv4"), PretrainConfig.model_validate(values), pixels, labels, classes=4, size=32,
        mean=[0.5] * 3, std=[0.25] * 3, seed=0, device=CPU,
    )  # fmt: skip


def test_compiled_the_encoder_trains_as_it_does_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    original, compiled = torch.compile, []

    def by_eager(module: torch.nn.Module, **how: Any) -> Any:  # the tracing alone: a C++ compiler is not always there
        compiled.append(module)
        return original(module, backend="eager", **how)

    monkeypatch.setattr(torch, "compile", by_eager)
    trainers = [trainer_of(compile=yes, stages=[[0.5, 16], [0.5, 32]]) for yes in (True, False)]
    for trainer in trainers:
        list(trainer.run(lambda encoder: None))
    assert compiled and all(module is trainers[0].encoder for module in compiled)
    ours, plain = (trainer.encoder.state_dict() for trainer in trainers)
    assert list(ours) == list(plain)
    assert all(torch.allclose(ours[name], plain[name], atol=1e-5) for name in plain)


def test_what_cannot_be_compiled_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(module: torch.nn.Module, example: Any) -> Any:
        raise RuntimeError("no compiler here")

    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module, **how: original(module, backend=broken, **how))
    trainer = trainer_of(compile=True)
    with pytest.raises(ConfigError, match=r"cannot compile Conv4 here .*no compiler here"):
        list(trainer.run(lambda encoder: None))


@pytest.mark.parametrize("settings", [{}, {"rotation_weight": 1.0}, {"rotated_classes": True},
                                      {"objective": "pairs", "cosine_head": 15, "batch": 8},
                                      {"stages": [[0.5, 16], [0.5, 32]], "label_smoothing": 0.1}])  # fmt: skip
def test_pretraining_learns_and_keeps_the_best(settings: dict[str, object]) -> None:
    trainer = trainer_of(**settings, epochs=6)
    values = iter([1.0, 5.0, 2.0, 3.0, 4.0, 0.0])
    records = list(trainer.run(lambda encoder: next(values)))
    epochs = [r for r in records if isinstance(r, PretrainEpoch)]
    assert [e.best for e in epochs] == [True, True, False, False, False, False]
    assert trainer.best_validation == 5.0 and epochs[-1].loss < epochs[0].loss
    current = trainer.encoder.state_dict()
    assert any(not torch.equal(current[name], kept) for name, kept in trainer.best.items())


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
    with pytest.raises(DataError, match="13 classes of two images, there are 12") as caught:
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


def bank_of(images: int = 12, size: int = 16) -> FeatureBank:
    rng = np.random.default_rng(0)
    means = rng.normal(size=(10, 1, size))
    z = (means + 0.7 * rng.normal(size=(10, images, size))).reshape(-1, size).astype(np.float32)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    return FeatureBank(z, np.repeat(np.arange(10), images), tuple(f"c{i}" for i in range(10)))


def meta_of(bank: FeatureBank, kind: str = "unet", dropout: float = 0.0, **settings: object) -> MetaTrainer:
    space = fit_task_space([torch.from_numpy(bank.features[rows]) for rows in bank.class_indices()])
    values = {"steps": 40, "batch": 8, "validate_every": 20, "query": 4, "lr": 3e-3, **settings}
    denoiser = DenoiserConfig.model_validate({"kind": kind, "width": 32, "dropout": dropout})
    return MetaTrainer(bank, space, denoiser, MetatrainConfig.model_validate(values), seed=0, device=CPU)


@pytest.mark.parametrize("in_memory", [0, 1 << 20])
def test_targets_leave_out_the_images_of_the_episode(in_memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the bank is projected at once or task by task."""
    monkeypatch.setattr(metatraining, "IN_MEMORY", in_memory)
    bank = bank_of()
    trainer = meta_of(bank)
    assert (trainer.points is None) == (in_memory == 0)
    e = training_batch(trainer.indices, (5, 5), (3, 3), 4, batch=2, seed=0, step=0)
    targets = trainer.targets(e, trainer._points(e.support), trainer._points(e.query))
    used = set(e.support[0, 0]) | set(e.query[0, :4])
    left = [row for row in trainer.indices[e.classes[0, 0]] if row not in used]
    expected = trainer.space.to_task(torch.from_numpy(bank.features[left]).mean(dim=0))
    assert len(left) == 5 and torch.allclose(targets[0, 0], expected, atol=1e-4)


def test_cosines_of_queries_are_those_of_the_moved_images_in_the_metric_of_the_noise() -> None:
    g = torch.Generator().manual_seed(0)
    v, domain, w = (torch.randn(2, n, 6, generator=g) for n in (7, 1, 3))
    precision = torch.linspace(0.1, 3, 6)
    found = Queries(v, v.square() @ precision, domain).cosines(w, precision)
    assert torch.allclose(found, cosine_logits((v - domain) * precision.sqrt(), w * precision.sqrt()), atol=1e-5)


@pytest.mark.parametrize("kind", ["unet", "paper"])
def test_meta_training_lowers_its_loss_and_uses_the_average(kind: str) -> None:
    trainer = meta_of(bank_of(), kind, steps=200, validate_every=100)
    seen = []
    gains = iter([(2.0, 0.1), (1.0, 0.1)])

    def validate(denoiser: torch.nn.Module) -> tuple[float, float]:
        seen.append({n: p.clone() for n, p in denoiser.named_parameters()})
        return next(gains)

    records = [r for r in trainer.run(validate) if isinstance(r, MetaValidation)]
    assert records[1].loss < records[0].loss and [r.best for r in records] == [True, False]
    chosen = dict(trainer.chosen().named_parameters())
    assert all(torch.equal(chosen[n], seen[0][n]) for n in chosen)  # the best average, not the last weights
    assert any(not torch.equal(seen[1][n], p) for n, p in trainer.denoiser.named_parameters())


def test_too_few_images_for_training_are_named() -> None:
    with pytest.raises(DataError, match="class 'c0' has 6 images"):
        meta_of(bank_of(images=6))


class Dropped(nn.Module):
    """An encoder's part that draws from the default generator, as DropBlock does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rand(())


def restored(trainer: Trainer, fresh: Trainer, path: Path) -> Trainer:
    """A fresh trainer with the state of another one, by way of a file."""
    tensors, plain = trainer.state()
    save_checkpoint(path, "state", tensors, {"plain": plain})
    kept = load_checkpoint(path, "state")
    fresh.restore(kept.part, kept.header["plain"])
    return fresh


@pytest.mark.parametrize(
    ("stop", "settings"),
    [(1, {}), (3, {"rotation_weight": 1.0}), (4, {}), (6, {"rotated_classes": True}), (8, {}),
     (3, {"fade": 0.7}), (5, {"fade": 0.7}), (2, {"objective": "pairs", "cosine_head": 10.0, "batch": 8}),
     *((stop, {"stages": [[0.5, 16], [0.5, 32]]}) for stop in (2, 4, 5))],
)  # fmt: skip
def test_pretraining_goes_on_exactly_from_any_yield(stop: int, settings: dict[str, object], tmp_path: Path) -> None:
    """48 images in batches of 16: three steps and an epoch, twice; after `stop` yields all is made anew."""

    def make() -> Pretrainer:
        trainer = trainer_of(**settings)
        trainer.encoder.blocks.append(Dropped())
        return trainer

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


@pytest.mark.parametrize("stop", [1, 3, 4, 5, 8])
def test_meta_training_goes_on_exactly_from_any_yield(stop: int, tmp_path: Path) -> None:
    """Six steps with validations after the third and the sixth; dropout draws from the default generator."""

    def make() -> MetaTrainer:
        return meta_of(bank_of(), steps=6, validate_every=3, dropout=0.2)

    def validate(denoiser: nn.Module) -> tuple[float, float]:
        return float(sum(p.detach().double().sum() for p in denoiser.parameters())), 0.1

    whole, parts = make(), make()
    assert len(list(whole.run(validate))) == 8
    list(itertools.islice(parts.run(validate), stop))
    fresh = restored(parts, make(), tmp_path / "a.safetensors")
    torch.rand(3)
    list(fresh.run(validate))
    (theirs, plain), (ours, ours_plain) = whole.state(), fresh.state()
    assert plain == ours_plain and theirs.keys() == ours.keys()
    assert all(torch.equal(t, ours[name]) for name, t in theirs.items())


def test_an_interrupted_validation_is_made_again(tmp_path: Path) -> None:
    """Interrupted in its middle, where it has said nothing yet."""

    def interrupt(module: nn.Module) -> tuple[float, float]:
        raise KeyboardInterrupt

    trainer, fresh = (meta_of(bank_of(), steps=3, validate_every=3) for _ in range(2))
    with pytest.raises(KeyboardInterrupt):
        list(trainer.run(interrupt))
    restored(trainer, fresh, tmp_path / "state.safetensors")
    (record,) = fresh.run(lambda module: (1.0, 0.1))
    assert isinstance(record, MetaValidation) and (record.step, record.gain) == (3, 1.0)


def test_a_state_without_a_loss_is_not_kept() -> None:
    trainer = trainer_of()
    next(trainer.run(lambda encoder: None))
    trainer.sums[0] = float("nan")
    with pytest.raises(MetaDiffError, match="loss became nan"):
        trainer.state()
