"""The steps of every training and the samplers on a GPU, by the stand-in of tests/gpu.py: each tensor is where it has
to be, and nothing in a step waits for the GPU.

Autograd's engine asks the driver for the GPU, so backward passes, which are torch's own code, are zeros here.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from metadiff_cli.config.schema import (
    ENCODERS,
    FrozenBaseline,
    ImageBaseline,
    MetatrainConfig,
    PretrainConfig,
)
from metadiff_cli.core.baselines.learners import FrozenLearner, build_image_learner
from metadiff_cli.core.baselines.train import InnerTrainer
from metadiff_cli.core.encoders.bank import FeatureBank, PixelBank
from metadiff_cli.core.encoders.image_encoder import ImageEncoder
from metadiff_cli.core.encoders.networks import build_encoder
from metadiff_cli.core.evaluation import openset
from metadiff_cli.core.evaluation.evaluate import Scores
from metadiff_cli.core.method.denoisers import build_denoiser
from metadiff_cli.core.method.diffusion import Noise, Schedule, Weights, ddim, ddpm
from metadiff_cli.core.method.support import support_stats
from metadiff_cli.core.training.pretrain import Pixels, Pretrainer
from tests.gpu import GPU, FakeGpu, Waited
from tests.tasks import trainer_of

CLASSES, SIDE, SIZE = 8, 32, 12
CPU = torch.device("cpu")
Zeros = Callable[[torch.nn.Module], None]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    """A GPU of 1 GB, without float64."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 2**30))
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: torch.zeros(16, dtype=torch.uint8))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: None)
    for module in ("pretrain", "metatrain"):
        name = f"metadiff_cli.core.training.{module}.seeded_noise"
        monkeypatch.setattr(name, lambda seed, device: {"cpu": torch.get_rng_state()})
    monkeypatch.setattr(torch.autograd, "grad", lambda loss, weights, **_: [torch.zeros_like(w) for w in weights])
    # under inference_mode `.to` would ask the driver before the stand-in is asked
    monkeypatch.setattr(torch._C, "_InferenceMode", lambda mode: torch.no_grad())
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    with FakeGpu(float64=False) as gpu:
        yield gpu
    torch.__future__.set_overwrite_module_params_on_conversion(before)


@pytest.fixture
def no_gradients(monkeypatch: pytest.MonkeyPatch) -> Zeros:
    """Backward passes that give the parameters of a module zeros."""

    def of(module: torch.nn.Module) -> None:
        def backward(loss: torch.Tensor) -> None:
            assert loss.device == GPU and loss.requires_grad
            for parameter in module.parameters():
                parameter.grad = torch.zeros_like(parameter)

        monkeypatch.setattr(torch.Tensor, "backward", backward)

    return of


def images() -> tuple[np.ndarray, np.ndarray]:
    pixels = np.random.default_rng(0).integers(0, 256, (40, SIDE, SIDE, 3), dtype=np.uint8)
    return pixels, np.arange(40) % CLASSES


def features() -> FeatureBank:
    z = np.random.default_rng(0).normal(size=(160, SIZE)).astype(np.float32)
    return FeatureBank(z, np.arange(160) % CLASSES, tuple(f"c{i}" for i in range(CLASSES)))


@pytest.mark.parametrize(("wait", "error"), [
    (lambda here, there: there.cpu(), Waited),
    (lambda here, there: here.to(GPU), Waited),
    (lambda here, there: here.copy_(there), Waited),
    (lambda here, there: there.sum().item(), DataDependentOutputException),
    (lambda here, there: there[there > 0], DynamicOutputShapeException),
    (lambda here, there: there + here, RuntimeError),
    (lambda here, there: there.double(), TypeError),
    (lambda here, there: here.double().to(GPU, non_blocking=True), TypeError),
    (lambda here, there: torch.zeros(2, dtype=torch.float64, device=GPU), TypeError),
], ids=["to the CPU", "to the GPU", "copied", "item", "mask", "two devices", "double", "sent", "made"])  # fmt: skip
def test_the_stand_in_notices(gpu: FakeGpu, wait: Callable[..., object], error: type[Exception]) -> None:
    here, there = torch.zeros(3), torch.zeros(3, device=GPU)
    with gpu.nobody_waits():
        assert (there + here.to(GPU, non_blocking=True)).device == GPU
        with pytest.raises(error, match="device" if error is RuntimeError else None):
            wait(here, there)


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("how", [
    {"rotation_weight": 1.0},
    {"rotated_classes": True},
    {"objective": "pairs", "cosine_head": 10.0},
], ids=["rotation head", "rotated classes", "pairs"])  # fmt: skip
def test_pretraining(gpu: FakeGpu, no_gradients: Zeros, encoder: str, how: dict[str, object]) -> None:
    pixels, labels = images()
    config = PretrainConfig(batch=8, precision="fp32", **how)
    trainer = Pretrainer(
        partial(build_encoder, encoder), config, pixels, labels, classes=CLASSES, size=SIDE, mean=[0.5] * 3,
        std=[0.25] * 3, seed=0, device=GPU,
    )  # fmt: skip
    trainer.encoder.train()
    no_gradients(trainer.encoder)
    assert trainer.pixels.kept is not None
    with gpu.nobody_waits():
        for _ in range(2):
            trainer._advance()
            trainer.step += 1
    assert all(values.device == GPU for values in trainer.sums.unread)
    assert all(p.device == GPU and p.grad is not None and p.grad.device == GPU for p in trainer.encoder.parameters())


@pytest.mark.parametrize("kind", ["unet", "paper"])
def test_metatraining(gpu: FakeGpu, no_gradients: Zeros, kind: str) -> None:
    config = MetatrainConfig(batch=3, ways=(2, 2), shots=(1, 2), query=2)
    trainer = trainer_of(features(), config, kind, GPU)
    no_gradients(trainer.module)
    with gpu.nobody_waits():
        for _ in range(2):
            trainer._advance()
            trainer.step += 1
    assert [values.device for values in trainer.sums.unread] == [GPU, GPU]


@pytest.mark.parametrize("method", ["anil-frozen", "metasgd-frozen", "maml", "fomaml", "anil"])
def test_gradient_based(gpu: FakeGpu, no_gradients: Zeros, method: str) -> None:
    if method.endswith("frozen"):
        config, bank = FrozenBaseline(batch=3, query=2), features()
        learner = FrozenLearner(method, 5, torch.zeros(SIZE), config)
        trainer = InnerTrainer(learner, bank, config, shot=1, seed=0, device=GPU)
    else:
        pixels, labels = images()
        bank = PixelBank(pixels, labels, tuple(f"c{i}" for i in range(CLASSES)))
        images_config = ImageBaseline(batch=2, query=2, inner_steps=2, rotated_classes=True)
        learner = build_image_learner(
            method, 5, partial(build_encoder, "conv4"), SIDE, (0.5,) * 3, (0.25,) * 3, images_config
        )
        trainer = InnerTrainer(learner, bank, images_config, shot=1, seed=0, device=GPU, quarters=4)
    no_gradients(trainer.module)
    with gpu.nobody_waits():
        trainer._advance()
    assert trainer.sums.unread[0].device == GPU


@pytest.mark.parametrize("kind", ["analytic", "unet", "paper"])
@pytest.mark.parametrize("method", ["ddim", "ddpm"])
def test_sampling(gpu: FakeGpu, kind: str, method: str) -> None:
    denoiser = build_denoiser(kind, SIZE, 16).to(GPU).eval()
    stats = support_stats(torch.zeros(2, 5, 1, SIZE, device=GPU), torch.ones(SIZE, device=GPU))

    def denoise(weights: Weights, abar: float) -> Weights:
        assert weights.v is not None
        return Weights(denoiser(weights.v, torch.full((1,), abar, device=GPU), stats), weights.dual)

    with gpu.nobody_waits():
        noise = Noise([0, 1], torch.arange(5).expand(2, -1), SIZE, 1.0, GPU)
        start = Weights(noise.draw(), torch.zeros(2, 5, 5, device=GPU))
        if method == "ddim":
            *_, last = ddim(denoise, start, Schedule(), 10)
        else:
            *_, last = ddpm(denoise, start, Schedule(), 10, noise.draw)
    assert last.estimate.v is not None
    assert last.estimate.v.shape == (2, 5, SIZE) and last.estimate.v.device == GPU


def test_scores_are_counted_without_float64(gpu: FakeGpu) -> None:
    scores = Scores()
    scores.add(torch.ones(2, 6, 3, device=GPU), torch.zeros(2, 6, dtype=torch.long, device=GPU))
    assert scores.accuracy[0].dtype == torch.float64 and scores.accuracy[0].device == CPU
    found = openset._scored(torch.ones(2, 6, device=GPU), torch.ones(2, 6, device=GPU), 3)
    assert found.auroc.device == CPU


def test_features(gpu: FakeGpu) -> None:
    encoder = ImageEncoder(build_encoder("conv4").to(GPU), "conv4", SIDE, (0.5,) * 3, (0.25,) * 3, 6, GPU)
    with gpu.nobody_waits():
        z = encoder.encode(torch.from_numpy(images()[0]))
    assert z.device == GPU and z.shape == (40, encoder.feature_size)


def test_pixels_too_large_for_the_gpu_are_sent_batch_by_batch(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels, _ = images()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * pixels.nbytes - 1, 2**30))
    large = Pixels(pixels, GPU)
    assert large.kept is None
    with gpu.nobody_waits():
        assert large.take(torch.tensor([3, 1])).device == GPU


def test_pixels_that_are_kept_are_those_of_the_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pixels, _ = images()
    np.save(tmp_path / "pixels.npy", pixels)
    monkeypatch.setattr("metadiff_cli.core.training.pretrain.CHUNK", 7)  # the last chunk is a short one
    monkeypatch.setattr("metadiff_cli.core.training.pretrain._fits", lambda images, device: True)
    kept = Pixels(np.load(tmp_path / "pixels.npy", mmap_mode="r"), CPU)
    rows = torch.tensor([39, 0, 7, 7])
    assert kept.kept is not None
    assert torch.equal(kept.take(rows), torch.from_numpy(pixels[rows.numpy()]))
