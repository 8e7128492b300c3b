"""Work on images beside its bare core: extracting features, pretraining, and `adapt` as a whole process."""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from metadiff_cli.config.schema import Config, PretrainConfig
from metadiff_cli.core.checkpoints.model import save_model
from metadiff_cli.core.device import autocast, keep_freed_memory
from metadiff_cli.core.encoders.bank import build_bank
from metadiff_cli.core.encoders.image_encoder import ImageEncoder
from metadiff_cli.core.encoders.networks import build_encoder
from metadiff_cli.core.method.adapt import MetaDiff
from metadiff_cli.core.method.metric import Metric
from metadiff_cli.core.method.task_space import class_statistics
from metadiff_cli.core.training.pretrain import MOMENTUM, Pretrainer
from metadiff_cli.data.benchmarks import open_dataset
from metadiff_cli.data.cache import decode_images, decode_split
from metadiff_cli.data.folders import require_split
from tests.benchmarks.common import CPU, Ratio, Report, Sizes, rates, write_images

SUPPORT, QUERY, SUPPORT_CLASSES = 25, 100, 5
BATCH = 256
BARE = """
import sys
import numpy as np, torch
from metadiff_cli.core.encoders.networks import build_encoder
from metadiff_cli.core.device import keep_freed_memory
keep_freed_memory()
pixels = torch.from_numpy(np.load(sys.argv[1]))
encoder = build_encoder(sys.argv[2]).eval().to(memory_format=torch.channels_last)
with torch.inference_mode():
    for part in pixels.split(256):
        images = (part.float() / 255).permute(0, 3, 1, 2)
        encoder(images), encoder(images.flip(3))
"""


def frozen_encoder(sizes: Sizes, side: int | None = None) -> ImageEncoder:
    """A randomly initialised encoder with both views, for images of `side` pixels where it is not that of the sizes.

    Speed does not depend on the weights.
    """
    torch.manual_seed(0)
    encoder = build_encoder(sizes.encoder).eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return ImageEncoder(encoder, sizes.encoder, side or sizes.image, (0.5,) * 3, (0.25,) * 3, 2, CPU)


def extraction(sizes: Sizes) -> Report:
    """From a folder of .webp files to features, nothing cached, beside the encoder on random tensors."""
    keep_freed_memory()
    encoder = frozen_encoder(sizes)
    noise = torch.randn(min(BATCH, sizes.images), 3, sizes.image, sizes.image)
    noise = noise.contiguous(memory_format=torch.channels_last)
    with tempfile.TemporaryDirectory() as place:
        for c in range(2):
            write_images(Path(place) / "images" / f"class{c}", sizes.images // 2, sizes.image, seed=c)
        runs = iter(range(10**6))
        works = {
            "folder to features": lambda: _extract(encoder, Path(place), next(runs)),
            "bare forward pass": lambda: _forward(encoder.encoder, noise, sizes.images),
        }
        found = rates(works, sizes)
    ratio = found["folder to features"] / found["bare forward pass"]
    return Report(
        f"Features of {sizes.images} images of {sizes.image} x {sizes.image}, both views, {sizes.encoder}",
        ("how", "images/s"), [(name, round(speed, 1)) for name, speed in found.items()],
        [Ratio("folder to features / bare forward pass", ratio, least=0.8)],
    )  # fmt: skip


def _extract(encoder: ImageEncoder, place: Path, run: int) -> int:
    split = require_split(open_dataset(place / "images", layout="auto", seed=0), "all")
    decoded = decode_split(split, encoder.size, place / f"decoded{run}")
    bank = build_bank(
        encoder, decoded.images, decoded.labels, decoded.classes, folder=place / f"features{run}", key=decoded.key,
        batch=BATCH,
    )  # fmt: skip
    return len(bank.labels)


@torch.inference_mode()
def _forward(encoder: nn.Module, images: torch.Tensor, count: int) -> int:
    done = 0
    while done < count:
        encoder(images), encoder(images.flip(3))
        done += len(images)
    return done


def pretraining(sizes: Sizes) -> Report:
    """Training steps on decoded images with augmentation, beside the same step on a random tensor."""
    keep_freed_memory()
    works = {"pretrain": _training(sizes, PretrainConfig(batch=sizes.pretrain_batch))}
    found = rates({**works, "bare training step": _bare_training(sizes)}, sizes)
    bare = found["bare training step"]
    ratios = [Ratio("pretrain / bare training step", found["pretrain"] / bare, least=0.9)]
    return Report(
        f"Pretraining {sizes.encoder} on {sizes.image} x {sizes.image} images, batches of {sizes.pretrain_batch}",
        ("how", "images/s"), [(name, round(speed, 1)) for name, speed in found.items()], ratios,
    )  # fmt: skip


def _training(sizes: Sizes, config: PretrainConfig) -> Callable[[], int]:
    """Some steps of pretraining on random images."""
    rng = np.random.default_rng(0)
    count = max(sizes.pretrain_batch * 8, sizes.classes)
    images = rng.integers(0, 256, (count, sizes.image, sizes.image, 3), dtype=np.uint8)
    trainer = Pretrainer(
        partial(build_encoder, sizes.encoder), config, images, np.arange(count) % sizes.classes, classes=sizes.classes,
        size=sizes.image, mean=[0.5] * 3, std=[0.25] * 3, seed=0, device=torch.device(sizes.device),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)

    def steps() -> int:
        trainer.encoder.train()
        for _ in range(sizes.pretrain_steps):
            index = torch.randint(0, count, (sizes.pretrain_batch,), generator=generator)
            trainer._train_step(index, sizes.image, 0.01, trainer.augmentation, generator)
        return sizes.pretrain_batch * sizes.pretrain_steps

    return steps


def _bare_training(sizes: Sizes) -> Callable[[], int]:
    """Forward, backward and SGD on one random batch, in the precision and memory format that pretraining chooses."""
    config, device = PretrainConfig(batch=sizes.pretrain_batch), torch.device(sizes.device)
    encoder = build_encoder(sizes.encoder).train().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    head = nn.Linear(encoder.feature_size(sizes.image), sizes.classes).to(device)
    optimiser = torch.optim.SGD(
        [*encoder.parameters(), *head.parameters()], 0.01, momentum=MOMENTUM, nesterov=True,
        weight_decay=config.weight_decay,
    )  # fmt: skip
    batch = torch.randn(sizes.pretrain_batch, 3, sizes.image, sizes.image, device=device)
    batch = batch.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, sizes.classes, (sizes.pretrain_batch,), device=device)

    def steps() -> int:
        for _ in range(sizes.pretrain_steps):
            with autocast(device, config.precision):
                loss = F.cross_entropy(head(encoder(batch)), labels)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        return sizes.pretrain_batch * sizes.pretrain_steps

    return steps


def adapting(sizes: Sizes) -> Report:
    """`metadiff adapt` from start to exit, beside a process that imports torch and encodes the decoded images."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        for c in range(SUPPORT_CLASSES):
            write_images(place / "support" / f"class{c}", SUPPORT // SUPPORT_CLASSES, sizes.image, seed=c)
        write_images(place / "query", QUERY, sizes.image, seed=99)
        checkpoint, pixels = _checkpoint(sizes, place), _decoded(sizes, place)
        whole = [sys.executable, "-m", "metadiff_cli", "adapt", "--support", str(place / "support"), "--query",
                 str(place / "query"), "--checkpoint", str(checkpoint), "--json"]  # fmt: skip
        bare = [sys.executable, "-c", BARE, str(pixels), sizes.encoder]
        environment = {**os.environ, "METADIFF_CACHE_DIR": str(place / "cache")}
        seconds: dict[str, list[float]] = {"metadiff adapt": [], "import torch and encode": []}
        for _ in range(sizes.rounds + 1):  # the first fills the caches of the file system
            for kind, command in zip(seconds, (whole, bare), strict=True):
                seconds[kind].append(_seconds(command, environment))
    found = {kind: statistics.median(values[1:]) for kind, values in seconds.items()}
    ratio = found["metadiff adapt"] / found["import torch and encode"]
    return Report(
        f"A whole process: {SUPPORT} support and {QUERY} query images, {sizes.encoder}", ("process", "seconds"),
        [(kind, round(value, 2)) for kind, value in found.items()],
        [Ratio("metadiff adapt / import torch and encode", ratio, most=1.3)],
    )  # fmt: skip


def _seconds(command: list[str], environment: dict[str, str]) -> float:
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    passed = time.perf_counter() - started
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return passed


def _checkpoint(sizes: Sizes, place: Path) -> Path:
    """A full model with the analytic denoiser, made of random features."""
    encoder = frozen_encoder(sizes)
    g = torch.Generator().manual_seed(0)
    classes = [torch.randn(8, encoder.feature_size, generator=g) / encoder.feature_size**0.5 for _ in range(10)]
    metadiff = MetaDiff(Metric(encoder.groups, class_statistics(classes, encoder.groups).task_space()))
    header = {
        "config": Config(encoder=sizes.encoder).model_dump(mode="json", exclude={"runtime"}),
        "classes": [str(i) for i in range(10)],
        "denoiser": {"kind": "analytic", "width": 8},
    }
    save_model(place / "checkpoint.safetensors", encoder, metadiff, header)
    return place / "checkpoint.safetensors"


def _decoded(sizes: Sizes, place: Path) -> Path:
    """The images of both folders as one array file."""
    files = [*sorted((place / "support").rglob("*.webp")), *sorted((place / "query").iterdir())]
    np.save(place / "pixels.npy", np.stack([pixels for _, pixels in decode_images(files, sizes.image)]))  # type: ignore[arg-type]
    return place / "pixels.npy"
