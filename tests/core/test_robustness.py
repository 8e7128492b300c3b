"""Numbers that stay right: the same result however it is computed, and finite ones from odd features and sizes."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from metadiff_cli.config.schema import MetatrainConfig
from metadiff_cli.core.encoders.bank import Encoding, FeatureBank, extract
from metadiff_cli.core.encoders.image_encoder import ImageEncoder
from metadiff_cli.core.encoders.networks import build_encoder
from metadiff_cli.core.evaluation import controls
from metadiff_cli.core.evaluation import evaluate as evaluation
from metadiff_cli.core.evaluation.evaluate import Method, Protocol, Scores, evaluate, run_through
from metadiff_cli.core.method.adapt import MetaDiff, Sampling, TaskClassifier, adapt_tasks, seeds_of
from metadiff_cli.core.method.denoisers import UNetDenoiser, randomise
from metadiff_cli.core.method.metric import Metric
from metadiff_cli.core.method.support import TaskSupport
from metadiff_cli.core.method.task_space import TaskSpace, class_statistics
from tests.tasks import trainer_of
from tests.worlds import CPU

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


def analytic_of(bank: FeatureBank) -> MetaDiff:
    """MetaDiff without a learned part, on the statistics of a bank."""
    space = class_statistics(bank.by_class()).task_space()
    return MetaDiff(Metric(space.groups, space))


def adapted(metadiff: MetaDiff, z: Tensor, sampling: Sampling) -> TaskClassifier:
    """The classifier of one task with support features z (N, K, D)."""
    support = TaskSupport.even(metadiff.metric.expand(z).unsqueeze(0))
    ranks = torch.arange(len(z)).unsqueeze(0)
    return adapt_tasks(metadiff, support, sampling, ranks=ranks, seeds=seeds_of(0, 0, 1))


def probabilities(metadiff: MetaDiff, classifier: TaskClassifier, z: Tensor) -> Tensor:
    """Those (n, N) of features z (n, D)."""
    return classifier.probabilities(metadiff.metric.expand(z).unsqueeze(0))[0]


def learners(size: int = SIZE) -> dict[str, MetaDiff]:
    """The analytic metadiff of a world and one with a U-Net of random weights."""
    analytic = analytic_of(bank_of(world(20, 12, size)))
    return {
        "analytic": analytic,
        "unet": replace(analytic, denoiser=randomise(UNetDenoiser(size, width=32), seed=0), learned=True),
    }


def every_method(bank: FeatureBank, protocol: Protocol) -> dict[str, Method]:
    """All that `evaluate` can measure on the features of a bank, by inductive and by transductive protocol."""
    found: dict[str, Method] = {}
    together = replace(protocol, transductive=True)
    for name, metadiff in learners().items():
        found[name] = evaluation.method_of(metadiff, bank, DRAWS, protocol, CPU)
        found[f"{name} with a pool"] = evaluation.method_of(metadiff, bank, Sampling(), together, CPU)
        metric = metadiff.metric
    found |= {name: controls.control_method(name, metric, {}) for name in controls.CONTROLS}
    found["soft k-means"] = controls.soft_kmeans_method(metric, {})
    found["label propagation"] = controls.label_propagation_method(metric, {})
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
    bank = bank_of(world(12, 10, seed=1))
    methods = every_method(bank, PROTOCOL)
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
    methods = {"analytic": evaluation.method_of(learners()["analytic"], bank, DRAWS, protocol, CPU)}
    together = measured(bank, methods, protocol)["analytic"]
    monkeypatch.setattr(evaluation, "BATCH_VALUES", 1)
    assert equal(together, measured(bank, methods, protocol)["analytic"], 9, atol=1e-5)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of threads, and sets it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_the_number_of_threads_changes_no_more_than_rounding(threads: Callable[[int], None]) -> None:
    """From pixels over features and task space to probabilities, and the loss of a training step."""
    torch.manual_seed(0)
    encoder = ImageEncoder(build_encoder("conv4"), "conv4", 48, (0.5,) * 3, (0.25,) * 3, 2, CPU)
    pixels = np.random.default_rng(0).integers(0, 256, (96, 48, 48, 3), dtype=np.uint8)
    found = []
    for count in (1, 2, 4):
        threads(count)
        z = torch.cat(list(extract(Encoding(encoder, 40), pixels))).numpy()
        bank = bank_of(z.reshape(8, 12, -1))
        metadiff = analytic_of(bank)
        classifier = adapted(metadiff, bank.take(np.arange(96).reshape(8, 12)[:, :3]), DRAWS)
        trainer = trainer_of(bank, MetatrainConfig(ways=(2, 2), shots=(1, 3)))
        p = probabilities(metadiff, classifier, bank.take(np.arange(96)))
        found.append((torch.from_numpy(z), p, trainer._train_step(1e-3)))
    for other in found[1:]:
        assert all(torch.allclose(a, b, atol=1e-4, rtol=1e-4) for a, b in zip(found[0][:2], other[:2], strict=True))
        # noise is drawn in the basis of the task space, of which directions with the same precision are free
        assert torch.allclose(found[0][2], other[2], rtol=0.05)


def test_the_batch_of_the_encoder_changes_no_more_than_rounding() -> None:
    torch.manual_seed(0)
    encoder = ImageEncoder(build_encoder("conv4"), "conv4", 32, (0.5,) * 3, (0.25,) * 3, 2, CPU)
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
    bank = bank_of(ODD[kind])
    methods = every_method(bank, protocol)
    scores = measured(bank, {name: checked(method) for name, method in methods.items()}, protocol)
    if kind == "constant":
        for name in ("analytic with a pool", "prototype", "logreg", "ridge", "soft k-means"):
            assert torch.allclose(torch.cat(scores[name].confidence), torch.tensor(0.25), atol=0.02), name
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
    metadiff = analytic_of(bank_of(ODD[kind][:, :images]))
    assert metadiff.metric.space is not None
    assert all(torch.isfinite(t).all() for t in metadiff.metric.space.tensors().values())
    z = torch.from_numpy(world(4, 6, seed=5))
    classifier = adapted(metadiff, z[:, :2], DRAWS)
    found = probabilities(metadiff, classifier, z[:, 2:].flatten(0, 1))
    assert torch.isfinite(classifier.weights).all() and torch.isfinite(found).all()


def wide_space(size: int) -> TaskSpace:
    """A task space that needs no eigenproblem of that size."""
    eye = torch.eye(size)
    return TaskSpace(torch.zeros(size), (eye,), torch.linspace(4.0, 0.1, size) * size)


@pytest.mark.parametrize("ways", [2, 200])
@pytest.mark.parametrize("shots", [1, 200])
@pytest.mark.parametrize("size", [16, 4096])
def test_few_and_many_ways_shots_and_features(ways: int, shots: int, size: int) -> None:
    """Finite, and better than chance by far; the largest task has some hundred million numbers, so it is spared."""
    if ways * shots * size > 10**8:
        shots = 10
    metadiff = MetaDiff(Metric((size,), wide_space(size)))
    z = torch.from_numpy(world(ways, shots + 1, size, seed=2))
    classifier = adapted(metadiff, z[:, :shots], Sampling())
    found = probabilities(metadiff, classifier, z[:, shots])  # (N, N)
    assert torch.isfinite(classifier.weights).all()
    assert torch.allclose(found.sum(dim=1), torch.ones(ways), atol=1e-4)
    assert float((found.argmax(dim=1) == torch.arange(ways)).float().mean()) >= min(1.0, 30 / ways)


def test_training_on_classes_without_noise_stays_finite() -> None:
    """Classes of equal images have no noise at all, which makes their precision as large as it can be."""
    bank = bank_of(np.repeat(world(12, 1), 16, axis=1))
    config = MetatrainConfig(steps=5, batch=4, ways=(2, 3), validate_every=5)
    trainer = trainer_of(bank, config)
    records = [record for record in trainer.run(lambda denoiser: None) if record is not None]
    assert records and all(np.isfinite(record.loss) for record in records)
    assert all(torch.isfinite(p).all() for p in trainer.module.parameters())
