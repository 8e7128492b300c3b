"""Numbers that stay right: the same result however it is computed, and finite ones from odd features and sizes."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from metadiff_cli.config.schema import DenoiserConfig, MetatrainConfig
from metadiff_cli.core.encoders.bank import Encoding, FeatureBank, extract
from metadiff_cli.core.encoders.image_encoder import ImageEncoder
from metadiff_cli.core.encoders.networks import build_encoder
from metadiff_cli.core.evaluation import controls
from metadiff_cli.core.evaluation import evaluate as evaluation
from metadiff_cli.core.evaluation.controls import logreg_method, ridge_method
from metadiff_cli.core.evaluation.evaluate import Method, Protocol, Scores, evaluate, run_through
from metadiff_cli.core.method.adapt import MetaDiff, Sampling, Tuning, adapt_tasks, seeds_of
from metadiff_cli.core.method.denoisers import AnalyticDenoiser, UNetDenoiser, randomise
from metadiff_cli.core.method.task_space import TaskSpace, fit_task_space
from metadiff_cli.core.training.metatrain import MetaTrainer

CPU = torch.device("cpu")
SIZE = 32
DRAWS = Sampling(samples=2, temperature=1.0)


def world(classes: int, images: int, size: int = SIZE, seed: int = 0) -> np.ndarray:
    """Unit features (classes, images, size) of classes that overlap."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(classes, 1, size)) + 0.8 * rng.normal(size=(classes, images, size))
    unit: np.ndarray = (z / np.linalg.norm(z, axis=2, keepdims=True)).astype(np.float32)
    return unit


def bank_of(z: np.ndarray) -> FeatureBank:
    classes, images, size = z.shape
    return FeatureBank(z.reshape(-1, size), np.repeat(np.arange(classes), images), tuple(map(str, range(classes))))


def learners(size: int = SIZE) -> dict[str, MetaDiff]:
    """The analytic metadiff of a world and one with a U-Net of random weights."""
    analytic = MetaDiff(fit_task_space(bank_of(world(20, 12, size)).by_class()), AnalyticDenoiser(), False, Tuning())
    return {
        "analytic": analytic,
        "unet": replace(analytic, denoiser=randomise(UNetDenoiser(size, width=32), seed=0), learned=True),
    }


def every_method(protocol: Protocol, size: int = SIZE) -> dict[str, Method]:
    """All that `evaluate` can measure on features, by inductive and by transductive protocol."""
    found: dict[str, Method] = {"logreg": logreg_method(0.1), "ridge": ridge_method(0.3)}
    for name, metadiff in learners(size).items():
        found[name] = evaluation.method_of(metadiff, DRAWS, protocol)
        found[f"{name} with a pool"] = evaluation.method_of(metadiff, Sampling(), replace(protocol, transductive=True))
    found["prototype"] = controls.prototype_method(metadiff)
    found["soft k-means"] = controls.soft_kmeans_method(metadiff)
    found["label propagation"] = controls.label_propagation_method(metadiff)
    return found


def measured(bank: FeatureBank, methods: dict[str, Method], protocol: Protocol) -> dict[str, Scores]:
    return run_through(evaluate(bank, methods, protocol, CPU))


def equal(first: Scores, second: Scores, episodes: int, atol: float) -> bool:
    """Whether the first episodes have the same accuracy, and their queries the same confidence."""
    accuracy = [torch.cat(s.accuracy)[:episodes] for s in (first, second)]
    queries = len(torch.cat(first.confidence)) // len(torch.cat(first.accuracy)) * episodes
    confidence = [torch.cat(s.confidence)[:queries] for s in (first, second)]
    return torch.equal(*accuracy) and torch.allclose(*confidence, atol=atol)


PROTOCOL = Protocol(way=5, shot=3, query=4, episodes=9, seed=3)


def test_an_episode_is_the_same_in_any_batch_among_any_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    bank, methods = bank_of(world(12, 10, seed=1)), every_method(PROTOCOL)
    monkeypatch.setattr(evaluation, "BATCHES", 1)  # all at once where memory allows it
    together = measured(bank, methods, PROTOCOL)
    fewer = measured(bank, methods, replace(PROTOCOL, episodes=4))
    monkeypatch.setattr(evaluation, "BATCH_VALUES", 2 * 5 * 7 * SIZE)  # two episodes at a time
    apart = {name: measured(bank, {name: method}, PROTOCOL)[name] for name, method in methods.items()}
    for name, scores in together.items():
        assert len(apart[name].accuracy) == 5 and len(scores.accuracy) == 1
        assert equal(scores, apart[name], 9, atol=1e-5), name
        assert equal(scores, fewer[name], 4, atol=1e-5), name


def test_imbalanced_episodes_do_not_depend_on_the_batch_either(monkeypatch: pytest.MonkeyPatch) -> None:
    bank, protocol = bank_of(world(12, 12, seed=1)), replace(PROTOCOL, imbalance=0.5)
    methods = {"analytic": evaluation.method_of(learners()["analytic"], DRAWS, protocol)}
    together = measured(bank, methods, protocol)["analytic"]
    monkeypatch.setattr(evaluation, "BATCH_VALUES", 1)
    assert equal(together, measured(bank, methods, protocol)["analytic"], 9, atol=1e-5)


def test_lengths_measured_once_for_a_bank_change_no_more_than_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    bank, metadiff = bank_of(world(12, 12, seed=1)), learners()["analytic"]
    monkeypatch.setattr(evaluation, "PART", 50)  # the bank's 144 images in several parts
    lengths = evaluation.lengths_for(metadiff.space, bank, replace(PROTOCOL, episodes=100), CPU)
    assert lengths is not None
    assert evaluation.lengths_for(metadiff.space, bank, replace(PROTOCOL, episodes=1), CPU) is None
    methods = {"each query": evaluation.method_of(metadiff, DRAWS, PROTOCOL)}
    methods["once"] = evaluation.method_of(metadiff, DRAWS, PROTOCOL, lengths=lengths)
    scores = measured(bank, methods, PROTOCOL)
    assert equal(scores["each query"], scores["once"], 9, atol=1e-5)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of threads, and sets it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_the_number_of_threads_changes_no_more_than_rounding(threads: Callable[[int], None]) -> None:
    """From pixels over features and task space to probabilities, and the loss of a training step."""
    torch.manual_seed(0)
    encoder = ImageEncoder(build_encoder("conv4"), "conv4", 48, (0.5,) * 3, (0.25,) * 3, True, CPU)
    pixels = np.random.default_rng(0).integers(0, 256, (96, 48, 48, 3), dtype=np.uint8)
    found = []
    for count in (1, 2, 4):
        threads(count)
        z = torch.cat(list(extract(Encoding(encoder, 40), pixels))).numpy()
        bank = bank_of(z.reshape(8, 12, -1))
        space = fit_task_space(bank.by_class())
        metadiff = MetaDiff(space, AnalyticDenoiser(), False, Tuning())
        support, query = bank.take(np.arange(96).reshape(8, 12)[:, :3])[None], bank.take(np.arange(96))[None]
        ranks = torch.arange(8).unsqueeze(0)
        classifier = adapt_tasks(metadiff, support, DRAWS, ranks=ranks, seeds=seeds_of(0, 0, 1))
        trainer = MetaTrainer(bank, space, DenoiserConfig(), MetatrainConfig(ways=(5, 5)), seed=0, device=CPU)
        found.append((torch.from_numpy(z), classifier.probabilities(query), trainer._train_step(1e-3)))
    for other in found[1:]:
        assert all(torch.allclose(a, b, atol=1e-4, rtol=1e-4) for a, b in zip(found[0], other, strict=True))


def test_the_batch_of_the_encoder_changes_no_more_than_rounding() -> None:
    torch.manual_seed(0)
    encoder = ImageEncoder(build_encoder("conv4"), "conv4", 32, (0.5,) * 3, (0.25,) * 3, True, CPU)
    pixels = np.random.default_rng(0).integers(0, 256, (11, 32, 32, 3), dtype=np.uint8)
    whole, single, some = (torch.cat(list(extract(Encoding(encoder, batch), pixels))) for batch in (11, 1, 4))
    assert torch.allclose(whole, single, atol=1e-5) and torch.allclose(whole, some, atol=1e-5)


ODD = {
    "constant": np.full((6, 8, SIZE), SIZE**-0.5, dtype=np.float32),
    "zero": np.zeros((6, 8, SIZE), dtype=np.float32),
    "one direction": np.repeat(np.eye(SIZE, dtype=np.float32)[:6, None], 8, axis=1),
    "tiny": 1e-20 * world(6, 8),
    "one image repeated": np.repeat(world(6, 1), 8, axis=1),
    "opposite": world(6, 8) * np.where(np.arange(8) % 2, 1, -1).astype(np.float32)[None, :, None],
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("shot", [1, 3])
def test_odd_features_give_finite_results(kind: str, shot: int) -> None:
    """In episodes of a sound model: probabilities that add up, and equal ones where nothing tells classes apart."""
    protocol = Protocol(way=4, shot=shot, query=3, episodes=3)
    methods = every_method(protocol)
    scores = measured(bank_of(ODD[kind]), {name: checked(method) for name, method in methods.items()}, protocol)
    if kind == "constant":
        for name in ("analytic with a pool", "prototype", "logreg", "ridge", "soft k-means"):
            assert torch.allclose(torch.cat(scores[name].confidence), torch.tensor(0.25), atol=1e-3), name
    if kind in ("one direction", "one image repeated"):
        assert all(float(torch.cat(s.accuracy).min()) == 1.0 for name, s in scores.items() if "unet" not in name)


def checked(method: Method) -> Method:
    """The same, whose probabilities are checked."""

    def run(*arguments: object) -> Tensor:
        found = method(*arguments)  # type: ignore[arg-type]
        assert torch.isfinite(found).all() and torch.allclose(found.sum(dim=-1), torch.ones(()), atol=1e-4)
        return found

    return run


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("images", [1, 8])
def test_a_model_of_odd_features_is_finite(kind: str, images: int) -> None:
    """Base classes of such features, of one image each as well: the model serves ordinary tasks."""
    space = fit_task_space(bank_of(ODD[kind][:, :images]).by_class())
    metadiff = MetaDiff(space, AnalyticDenoiser(), False, Tuning())
    assert all(torch.isfinite(t).all() for t in space.tensors().values())
    z = torch.from_numpy(world(4, 6, seed=5))
    classifier = adapt_tasks(metadiff, z[None, :, :2], DRAWS, ranks=torch.arange(4)[None], seeds=seeds_of(0, 0, 1))
    found = classifier.probabilities(z[None, :, 2:].flatten(1, 2))
    assert torch.isfinite(classifier.weights).all() and torch.isfinite(found).all()


def wide_space(size: int) -> TaskSpace:
    """A task space that needs no eigenproblem of that size."""
    eye = torch.eye(size)
    return TaskSpace(torch.zeros(size), eye, eye, torch.linspace(4.0, 0.1, size) * size)


@pytest.mark.parametrize("ways", [2, 200])
@pytest.mark.parametrize("shots", [1, 200])
@pytest.mark.parametrize("size", [16, 4096])
def test_few_and_many_ways_shots_and_features(ways: int, shots: int, size: int) -> None:
    """Finite, and better than chance by far; the largest task has some hundred million numbers, so it is spared."""
    if ways * shots * size > 10**8:
        shots = 10
    metadiff = MetaDiff(wide_space(size), AnalyticDenoiser(), False, Tuning())
    z = torch.from_numpy(world(ways, shots + 1, size, seed=2))
    support, query = z[None, :, :shots], z[None, :, shots]
    ranks = torch.arange(ways).unsqueeze(0)
    classifier = adapt_tasks(metadiff, support, Sampling(), ranks=ranks, seeds=seeds_of(0, 0, 1))
    found = classifier.probabilities(query)[0]  # (N, N)
    assert torch.isfinite(classifier.weights).all()
    assert torch.allclose(found.sum(dim=1), torch.ones(ways), atol=1e-4)
    assert float((found.argmax(dim=1) == torch.arange(ways)).float().mean()) >= min(1.0, 30 / ways)


def test_training_on_classes_without_noise_stays_finite() -> None:
    """Classes of equal images have no noise at all, which makes their precision as large as it can be."""
    bank = bank_of(np.repeat(world(12, 1), 16, axis=1))
    config = MetatrainConfig(steps=5, batch=4, ways=(5, 5), validate_every=5)
    trainer = MetaTrainer(bank, fit_task_space(bank.by_class()), DenoiserConfig(width=16), config, seed=0, device=CPU)
    records = [record for record in trainer.run(lambda denoiser: None) if record is not None]
    assert records and all(np.isfinite(record.loss) for record in records)
    assert all(torch.isfinite(p).all() for p in trainer.denoiser.parameters())
    images = trainer.space.to_task(bank.take(np.arange(0, 192, 16)))  # of every class the one that all are equal to
    assert F.mse_loss(trainer.sums / trainer.counts.unsqueeze(1), images) < 1e-6 * images.square().mean()
