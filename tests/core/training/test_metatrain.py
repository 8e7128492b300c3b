"""Meta-training on small features: targets, loss, the average, and resuming exactly."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from metadiff_cli.config.schema import DenoiserConfig, MetatrainConfig
from metadiff_cli.core.encoders.bank import FeatureBank
from metadiff_cli.core.evaluation.episodes import training_batch
from metadiff_cli.core.method.metric import cosine_logits
from metadiff_cli.core.method.task_space import fit_task_space
from metadiff_cli.core.training import metatrain
from metadiff_cli.core.training.metatrain import MetaTrainer, MetaValidation, Queries
from metadiff_cli.errors import DataError
from tests.worlds import CPU, restored


def bank_of(images: int = 12, size: int = 16) -> FeatureBank:
    rng = np.random.default_rng(0)
    means = rng.normal(size=(10, 1, size))
    z = (means + 0.7 * rng.normal(size=(10, images, size))).reshape(-1, size).astype(np.float32)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    return FeatureBank(z, np.repeat(np.arange(10), images), tuple(f"c{i}" for i in range(10)))


def meta_of(bank: FeatureBank, kind: str = "unet", **settings: object) -> MetaTrainer:
    space = fit_task_space([torch.from_numpy(bank.features[rows]) for rows in bank.class_indices()])
    values = {"steps": 40, "batch": 8, "validate_every": 20, "query": 4, "lr": 3e-3, **settings}
    denoiser = DenoiserConfig.model_validate({"kind": kind, "width": 32})
    return MetaTrainer(bank, space, denoiser, MetatrainConfig.model_validate(values), seed=0, device=CPU)


@pytest.mark.parametrize("in_memory", [0, 1 << 20])
def test_targets_leave_out_the_images_of_the_episode(in_memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the bank is projected at once or task by task."""
    monkeypatch.setattr(metatrain, "IN_MEMORY", in_memory)
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
    trainer = meta_of(bank_of(), kind, steps=80, validate_every=40)
    seen = []
    gains = iter([(2.0, 0.1), (1.0, 0.1)])

    def validate(denoiser: torch.nn.Module) -> tuple[float, float]:
        seen.append({n: p.clone() for n, p in denoiser.named_parameters()})
        return next(gains)

    records = [r for r in trainer.run(validate) if isinstance(r, MetaValidation)]
    assert records[1].loss < records[0].loss and [r.best for r in records] == [True, False]
    chosen = dict(trainer.chosen().named_parameters())
    assert all(torch.equal(chosen[n], seen[0][n]) for n in chosen)  # the best average, not the last weights
    assert any(not torch.equal(seen[1][n], p) for n, p in trainer.module.named_parameters())


def test_too_few_images_for_training_are_named() -> None:
    with pytest.raises(DataError, match="class 'c0' has 6 images"):
        meta_of(bank_of(images=6))


def test_a_trainer_leaves_global_randomness_alone() -> None:
    before = torch.get_rng_state()
    list(meta_of(bank_of(), steps=2, validate_every=1).run(lambda denoiser: None))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("stop", [1, 3, 4, 5, 8])
def test_meta_training_goes_on_exactly_from_any_yield(stop: int, tmp_path: Path) -> None:
    """Six steps with validations after the third and the sixth; dropout draws from the default generator."""

    def make() -> MetaTrainer:
        return meta_of(bank_of(), steps=6, validate_every=3)

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
