"""Meta-training on small features: targets, loss, the average, and resuming exactly."""

from itertools import chain, islice
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from metadiff_cli.config.schema import DenoiserConfig, MetatrainConfig
from metadiff_cli.core.encoders.bank import FeatureBank
from metadiff_cli.core.method.adapt import Tuning
from metadiff_cli.core.method.calibration import TaskTable
from metadiff_cli.core.method.denoisers import UNetDenoiser
from metadiff_cli.core.method.metric import cosine_logits
from metadiff_cli.core.method.task_space import class_statistics, cross_fitted
from metadiff_cli.core.training import metatrain
from metadiff_cli.core.training.metatrain import (
    MetaTrainer,
    MetaValidation,
    Queries,
    deal,
    images_needed,
    pools_of,
)
from metadiff_cli.errors import DataError
from tests.worlds import CPU, restored


def bank_of(images: int = 12, size: int = 16) -> FeatureBank:
    rng = np.random.default_rng(0)
    means = rng.normal(size=(10, 1, size))
    z = (means + 0.7 * rng.normal(size=(10, images, size))).reshape(-1, size).astype(np.float32)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    return FeatureBank(z, np.repeat(np.arange(10), images), tuple(f"c{i}" for i in range(10)))


def meta_of(bank: FeatureBank, kind: str = "unet", tuning: Tuning | None = None, **settings: object) -> MetaTrainer:
    values = {"steps": 40, "batch": 8, "validate_every": 20, "query": 4, "lr": 3e-3, **settings}
    config = MetatrainConfig.model_validate(values)
    sets = [[len(rows) for rows in bank.class_indices()]]
    parts = deal(sets, images_needed(config), kind, seed=0)
    statistics = class_statistics(bank.by_class(), (12, 4))
    others = cross_fitted(bank.by_class(), (12, 4), parts)[1] if kind == "unet" else {0: statistics}
    return MetaTrainer(
        bank, pools_of(sets, parts), {part: of.task_space() for part, of in others.items()}, statistics.task_space(),
        DenoiserConfig.model_validate({"kind": kind, "width": 32}), config, means=statistics.means,
        tuning=tuning or Tuning(), seed=0, device=CPU,
    )  # fmt: skip


@pytest.mark.parametrize("in_memory", [0, 1 << 20])
def test_targets_leave_out_the_images_of_the_episode(in_memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the bank is projected at once or task by task."""
    monkeypatch.setattr(metatrain, "IN_MEMORY", in_memory)
    bank = bank_of()
    trainer = meta_of(bank, ways=(2, 2), shots=(3, 3))
    assert (trainer.points is None) == (in_memory == 0)
    number, e = trainer.draw(0)
    part = trainer.pools[number].part
    targets = trainer.targets(e, trainer._points(e.support, part), trainer._points(e.query, part))
    used = set(e.support[0, 0]) | set(e.query[0, :4])
    left = [row for row in trainer.indices[e.classes[0, 0]] if row not in used]
    expected = trainer.spaces[part].to_task(torch.from_numpy(bank.features[left]).mean(dim=0))
    assert len(left) == 5 and torch.allclose(targets[0, 0], expected, atol=1e-4)


def test_no_task_is_in_a_space_of_its_own_classes() -> None:
    """The space of a part is that of all other classes, to the last digit that float32 has."""
    bank, trainer = bank_of(), meta_of(bank_of())
    assert sorted({pool.part for pool in trainer.pools}) == [0, 1, 2, 3]
    assert sorted(c for pool in trainer.pools for c in pool.classes) == list(range(10))
    for step in range(20):
        number, e = trainer.draw(step)
        assert set(e.classes.flatten()) <= set(trainer.pools[number].classes)
        assert all((bank.labels[e.support] == e.classes[:, :, None]).flatten())
    for pool in trainer.pools:
        others = [z for c, z in enumerate(bank.by_class()) if c not in pool.classes]
        expected, found = class_statistics(others, (12, 4)).task_space(), trainer.spaces[pool.part]
        assert torch.allclose(found.mean, expected.mean, atol=1e-6)
        assert torch.allclose(found.precision, expected.precision, rtol=1e-4)


def test_classes_are_dealt_by_data_set_and_small_ones_left_out() -> None:
    sets = [[10] * 9 + [3], [10] * 4, [10], [4, 4, 10, 10, 10]]
    parts = deal(sets, 6, "unet", seed=0)
    assert [part for part, images in zip(parts, chain(*sets), strict=True) if images < 6] == [-1] * 3
    assert parts[14] == -1  # a class alone makes no task
    pools = pools_of(sets, parts)
    assert {pool.part for pool in pools} == {0, 1, 2, 3} and all(len(pool.classes) >= 2 for pool in pools)
    sizes = np.cumsum([0, *map(len, sets)])
    for pool in pools:  # all of a pool are of one data set
        assert len(set(np.searchsorted(sizes, pool.classes, side="right"))) == 1
    assert set(deal(sets, 6, "paper", seed=0)) == {0, -1}
    assert deal(sets, 6, "unet", seed=1) != parts


@pytest.mark.parametrize(("kind", "count", "needed"), [("unet", 3, 4), ("paper", 1, 2)])
def test_too_few_classes_for_training_are_told(kind: str, count: int, needed: int) -> None:
    with pytest.raises(DataError, match=f"needs {needed} base classes of 10 images or more; there are {count}"):
        deal([[10] * count + [9] * 20], 10, kind, seed=0)


def test_tasks_have_the_guidance_and_the_domain_that_adaptation_gives_them() -> None:
    """The first denoiser is the analytic one, so its loss tells the posterior that it is trained on."""
    tunings = [Tuning(), Tuning(guidance=TaskTable.constant(9.0)), Tuning(domain=TaskTable.constant(0.0))]
    losses = []
    for tuning in tunings:
        trainer = meta_of(bank_of(), tuning=tuning)
        number, e = trainer.draw(0)
        losses.append(float(trainer.loss(number, e, torch.Generator().manual_seed(0)).detach()))
    assert len({round(loss, 3) for loss in losses}) == 3


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


def test_what_is_trained_works_in_the_space_that_it_is_shipped_with() -> None:
    trainer = meta_of(bank_of(), steps=2, validate_every=1)
    list(trainer.run(lambda denoiser: None))
    assert isinstance(trainer.module, UNetDenoiser) and trainer.module.frame is None
    chosen = trainer.chosen()
    assert isinstance(chosen, UNetDenoiser) and chosen.frame is trainer.frame
    assert {tuple(frame.references) for frame in trainer.frames.values()} == {tuple(trainer.frame.references)}


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
    list(islice(parts.run(validate), stop))
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
