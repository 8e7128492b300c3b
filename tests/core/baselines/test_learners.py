"""The gradient-based family: inner loops against autograd, order of the outer gradient, BatchNorm, training."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from metadiff_cli.config.schema import FrozenBaseline, ImageBaseline, InnerLoop
from metadiff_cli.core.baselines.learners import (
    FrozenLearner,
    Head,
    ImageLearner,
    InnerLearner,
    Maml,
    build_image_learner,
    inner_method,
)
from metadiff_cli.core.baselines.tasknorm import TaskNorm
from metadiff_cli.core.baselines.train import InnerTrainer, InnerValidation
from metadiff_cli.core.checkpoints.file import load_checkpoint, save_checkpoint
from metadiff_cli.core.encoders.bank import Bank, FeatureBank, PixelBank
from metadiff_cli.core.encoders.networks import ConvBlock, Encoder, build_encoder
from metadiff_cli.core.evaluation.episodes import Episodes
from metadiff_cli.core.training.transforms import Augmentation
from metadiff_cli.errors import ConfigError, DataError, MetaDiffError

CPU = torch.device("cpu")
EMPTY = Episodes(*(np.empty(0) for _ in range(4)))


class Tiny(Encoder):
    """One block, for speed: (B, 3, S, S) -> (B, 8)."""

    pooled, stride, channels = True, 2, 8

    def __init__(self) -> None:
        super().__init__()
        self.block = ConvBlock(3, 8)

    def maps(self, images: Tensor) -> Tensor:
        maps: Tensor = self.block(images)
        return maps


def image_learner(method: str = "maml", way: int = 3, **settings: object) -> ImageLearner:
    torch.manual_seed(0)
    config = ImageBaseline.model_validate({"rate": 0.1, "precision": "fp32", **settings})
    return build_image_learner(method, way, Tiny(), 16, (0.5,) * 3, (0.25,) * 3, config)


def pixels(*shape: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (*shape, 16 * 16 * 3), dtype=torch.uint8, generator=g)


def bank_of(images: int = 12) -> PixelBank:
    """Classes of pictures of one colour each."""
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 200, (8, 1, 1, 3))
    values = colours + rng.integers(0, 55, (8, images, 256, 3))
    return PixelBank(values.reshape(-1, 16, 16, 3).astype(np.uint8), np.repeat(np.arange(8), images), tuple("abcdefgh"))


def test_the_written_out_gradient_is_that_of_autograd() -> None:
    torch.manual_seed(0)
    head = Head(4, 6, rate=0.7).double()
    torch.nn.init.normal_(head.weight)
    z, labels = torch.randn(1, 4, 3, 6, dtype=torch.float64), torch.arange(4).repeat_interleave(3)
    weight, bias = (p.detach().clone().requires_grad_() for p in (head.weight, head.bias))
    for _ in range(3):
        loss = F.cross_entropy(z.flatten(0, 2) @ weight.T + bias, labels)
        slopes = torch.autograd.grad(loss, (weight, bias))
        weight, bias = ((p - 0.7 * s).detach().requires_grad_() for p, s in zip((weight, bias), slopes, strict=True))
    adapted = head.adapt(z, 3)
    assert torch.allclose(adapted[0][0], weight) and torch.allclose(adapted[1][0, 0], bias)


def test_rates_of_one_are_anil() -> None:
    z, query, centre = torch.randn(2, 3, 4, 6), torch.randn(2, 5, 6), torch.randn(6)
    anil, sgd = (FrozenLearner(m, 3, centre, FrozenBaseline()) for m in ("anil-frozen", "metasgd-frozen"))
    assert torch.equal(anil(z, query, 5), sgd(z, query, 5))
    assert set(dict(sgd.named_parameters())) - set(dict(anil.named_parameters())) == {"head.rates"}


def outer_gradient(learner: ImageLearner) -> dict[str, Tensor]:
    support, query = pixels(1, 3, 2), pixels(1, 6, seed=1)
    loss = F.cross_entropy(learner.train()(support, query, 2)[0], torch.tensor([0, 0, 1, 1, 2, 2]))
    names, weights = zip(*learner.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, weights), strict=True))


def test_the_outer_gradient_of_maml_is_the_slope_of_its_loss() -> None:
    learner = image_learner("maml").double()
    support, query, labels = pixels(1, 3, 2), pixels(1, 6, seed=1), torch.tensor([0, 0, 1, 1, 2, 2])
    slopes = outer_gradient(learner)
    name, weight = max(learner.named_parameters(), key=lambda item: float(slopes[item[0]].abs().max()))
    place = int(slopes[name].abs().argmax())
    losses = []
    for shift in (1e-7, -1e-7):
        with torch.no_grad():
            weight.view(-1)[place] += shift
        losses.append(float(F.cross_entropy(learner(support, query, 2)[0], labels).detach()))
        with torch.no_grad():
            weight.view(-1)[place] -= shift
    assert (losses[0] - losses[1]) / 2e-7 == pytest.approx(float(slopes[name].flatten()[place]), rel=1e-4)


def test_first_order_is_the_gradient_at_the_adapted_weights() -> None:
    learner = image_learner("fomaml").double()
    assert isinstance(learner, Maml)
    slopes = outer_gradient(learner)
    images, labels = learner.images(pixels(3, 2)), torch.arange(3).repeat_interleave(2)
    weights = {n: w.detach().requires_grad_() for n, w in learner.adapt(images, labels, 2).items()}
    logits = learner.run(learner.net, weights, images, learner.images(pixels(6, seed=1)))
    expected = torch.autograd.grad(F.cross_entropy(logits, torch.tensor([0, 0, 1, 1, 2, 2])), list(weights.values()))
    assert all(torch.allclose(slopes[f"net.{n}"], e) for n, e in zip(weights, expected, strict=True))
    second = outer_gradient(image_learner("maml").double())
    assert any(not torch.allclose(slopes[n], second[n], rtol=1e-3) for n in slopes)


def test_task_norm_is_batch_norm_to_the_second_derivative() -> None:
    norm, size = TaskNorm(4, eps=0.1).double(), (3, 4, 2, 3)  # an eps that counts
    g = torch.Generator().manual_seed(0)
    images = torch.randn(*size, dtype=torch.double, generator=g, requires_grad=True)
    weight, bias = (torch.rand(4, dtype=torch.double, generator=g, requires_grad=True) for _ in range(2))

    def run(images: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(norm, {"weight": weight, "bias": bias}, (images,))
        return out

    expected = F.batch_norm(images, None, None, weight, bias, training=True, eps=0.1)
    assert torch.allclose(run(images, weight, bias), expected)
    assert torch.autograd.gradcheck(run, (images, weight, bias))
    assert torch.autograd.gradgradcheck(run, (images, weight, bias))


@pytest.mark.parametrize("method", ["maml", "anil"])
def test_slopes_in_bf16_are_those_of_fp32_but_for_rounding(method: str) -> None:
    exact, rounded = (outer_gradient(image_learner(method, precision=p)) for p in ("fp32", "bf16"))
    for name, slope in exact.items():
        assert rounded[name].dtype == torch.float32 and not torch.equal(rounded[name], slope), name
    whole, part = (torch.cat([t.flatten() for t in slopes.values()]) for slopes in (exact, rounded))
    assert F.cosine_similarity(whole, part, dim=0) > 0.99


@pytest.mark.parametrize("method", ["maml", "fomaml", "anil"])
def test_evaluation_adapts_as_training_does_and_leaves_no_trace(method: str) -> None:
    learner = image_learner(method)
    before = {n: t.clone() for n, t in learner.state_dict().items()}
    support, query = pixels(2, 3, 2), pixels(2, 6, seed=1)
    trained = learner.train()(support, query, 3).detach()
    probabilities = inner_method(learner, 3, 3)(support, query, EMPTY, 0)
    assert torch.allclose(probabilities, trained.softmax(dim=-1), atol=1e-5) and not probabilities.requires_grad
    assert all(torch.equal(before[n], t) for n, t in learner.state_dict().items())


@pytest.mark.parametrize("method", ["maml", "anil"])
def test_whose_statistics_normalise_a_query(method: str) -> None:
    support, query = pixels(1, 3, 2), pixels(1, 6, seed=1)
    for statistics, alone in (("queries", False), ("support", True)):
        run = inner_method(image_learner(method, statistics=statistics), 2, 3)
        whole, part = run(support, query, EMPTY, 0), run(support, query[:, :3], EMPTY, 0)
        assert torch.allclose(whole[:, :3], part, atol=1e-5) == alone


def test_another_number_of_ways_is_refused() -> None:
    with pytest.raises(ConfigError, match="3-way"):
        inner_method(image_learner(), 1, 5)


def train(trainer: InnerTrainer, accuracies: list[float]) -> list[InnerValidation]:
    values = iter(accuracies)
    return [r for r in trainer.run(lambda learner: (next(values), 0.1)) if isinstance(r, InnerValidation)]


def trainer_of(method: str, quarters: int = 1, steps: int = 24, **settings: object) -> InnerTrainer:
    bank: Bank = (pictures := bank_of())
    values = {"steps": steps, "validate_every": steps // 2, "query": 4, "inner_steps": 2, "lr": 0.01, **settings}
    torch.manual_seed(0)
    learner: InnerLearner
    config: InnerLoop
    if method.endswith("frozen"):
        z = torch.nn.functional.normalize(torch.from_numpy(pictures.pixels).flatten(1).float(), dim=-1)
        bank = FeatureBank(z.numpy(), bank.labels, bank.classes)
        config = FrozenBaseline.model_validate({"rate": 1.0, **values})
        learner = FrozenLearner(method, 3, z.mean(dim=0), config)
    else:
        learner, config = image_learner(method), ImageBaseline.model_validate(values)
    return InnerTrainer(learner, bank, config, shot=2, seed=0, device=CPU, quarters=quarters)


@pytest.mark.parametrize("method", ["anil-frozen", "metasgd-frozen", "maml", "fomaml", "anil"])
def test_training_learns_keeps_the_best_and_resumes_exactly(method: str, tmp_path: Path) -> None:
    trainer = trainer_of(method)
    first, last = train(trainer, [2.0, 1.0])
    assert (first.best, last.best) == (True, False)
    # the start of a head alone can hardly help: positions of classes are drawn anew for every task
    assert last.loss < first.loss or method == "anil-frozen"
    assert all(torch.equal(trainer.best[n], t) for n, t in trainer.chosen().state_dict().items())
    assert any(not torch.equal(trainer.best[n], t) for n, t in trainer.learner.state_dict().items())
    half = trainer_of(method)
    next(r for r in half.run(lambda learner: (2.0, 0.1)) if isinstance(r, InnerValidation))
    tensors, plain = half.state()
    save_checkpoint(tmp_path / "state.safetensors", "state", tensors, {"plain": plain})
    kept = load_checkpoint(tmp_path / "state.safetensors", "state")
    resumed = trainer_of(method)
    resumed.restore(kept.part, kept.header["plain"])
    train(resumed, [1.0])
    assert resumed.history == trainer.history
    assert all(torch.equal(t, resumed.learner.state_dict()[n]) for n, t in trainer.learner.state_dict().items())


def test_the_rate_of_learning_falls_by_half_a_cosine() -> None:
    trainer = trainer_of("anil-frozen", schedule="cosine", steps=4, lr=1.0)
    rates = []
    for _ in trainer.run(lambda learner: (1.0, 0.1)):
        if len(rates) < trainer.step:
            rates.append(trainer.optimiser.param_groups[0]["lr"])
    assert rates == pytest.approx([1.0, (2 + 2**0.5) / 4, 0.5, (2 - 2**0.5) / 4])


def test_turned_classes_are_turned_images() -> None:
    trainer = trainer_of("maml", quarters=4)
    assert len(trainer.indices) == 32
    rows = np.array([[5, 5 + 96, 5 + 2 * 96, 5 + 3 * 96]])
    upright, *turned = trainer._fetch(rows, torch.Generator())[0].view(4, 16, 16, 3)
    assert all(torch.equal(t, torch.rot90(upright, q + 1, dims=(0, 1))) for q, t in enumerate(turned))


def test_images_of_a_task_are_augmented_each_in_its_own_way() -> None:
    trainer, rows = trainer_of("maml"), np.array([[5, 5], [6, 7]])
    drawn_by = torch.Generator().manual_seed
    plain = trainer._fetch(rows, drawn_by(1))
    trainer.augmentation = Augmentation(crop=(1.0, 1.0), aspect=(1.0, 1.0), flip=False, jitter=0.0)
    assert torch.equal(trainer._fetch(rows, drawn_by(1)), plain)
    trainer.augmentation = Augmentation(crop=(0.7, 0.9), flip=False, jitter=0.0, rotate=10)
    once, again, other = (trainer._fetch(rows, drawn_by(seed)) for seed in (1, 1, 2))
    assert once.dtype == torch.uint8 and once.shape == plain.shape
    assert torch.equal(once, again) and not torch.equal(once, other)
    assert torch.equal(plain[0, 0], plain[0, 1]) and not torch.equal(once[0, 0], once[0, 1])
    assert (once.float() - plain.float()).abs().mean() < (plain.float() - plain.float().mean()).abs().mean()


def test_an_augmented_training_differs_and_each_step_and_task_has_its_own_draws() -> None:
    drawn: list[bytes] = []

    class Noted(InnerTrainer):
        def _fetch(self, rows: np.ndarray, generator: torch.Generator) -> torch.Tensor:
            drawn.append(generator.get_state().numpy().tobytes())
            return super()._fetch(rows, generator)

    trainer, plain = trainer_of("maml", batch=3), trainer_of("maml", batch=3)
    trainer.__class__ = Noted
    trainer.augmentation = Augmentation(crop=(0.5, 0.9))
    train(trainer, [1.0, 2.0])
    train(plain, [1.0, 2.0])
    assert len(drawn) == len(set(drawn)) == 24 * 3 * 2
    assert trainer.history[0]["loss"] != plain.history[0]["loss"]


def test_too_few_images_and_lost_losses_are_named() -> None:
    with pytest.raises(DataError, match="class 'a' has 12 images"):
        trainer_of("maml", query=11)
    trainer = trainer_of("maml")
    torch.nn.init.constant_(next(trainer.learner.parameters()), float("nan"))
    with pytest.raises(MetaDiffError, match="loss became nan before step"):
        train(trainer, [])


@pytest.mark.parametrize("name", ["conv4", "conv4-padded"])
def test_conv4_becomes_a_learner(name: str) -> None:
    learner = build_image_learner("maml", 5, build_encoder(name), 28, (0.5,) * 3, (0.2,) * 3, ImageBaseline())
    g = torch.Generator().manual_seed(0)
    support, query = (torch.randint(0, 256, (1, n, 28 * 28 * 3), dtype=torch.uint8, generator=g) for n in (5, 10))
    logits = learner.train()(support.view(1, 5, 1, -1), query, 1)
    logits.square().mean().backward()  # type: ignore[no-untyped-call]
    assert logits.shape == (1, 10, 5)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in learner.parameters())
