"""Pretraining: SGD on a cross-entropy trains an encoder, over the base classes with a head or over pairs of images.

All randomness of an epoch comes from generators that are seeded by (seed, epoch). Within the epoch their states are
part of the trainer's state.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metadiff_cli.config.schema import PretrainConfig
from metadiff_cli.core.device import CPU, Noise, autocast, default_noise, seeded_noise, sent
from metadiff_cli.core.distributed import SINGLE, Group
from metadiff_cli.core.encoders.networks import Encoder
from metadiff_cli.core.evaluation.episodes import mixed_seed
from metadiff_cli.core.training.loop import Part, Trainer, optimiser_tensors, restore_optimiser
from metadiff_cli.core.training.losses import Heads, Pairs, pair_logits
from metadiff_cli.core.training.transforms import Augmentation, Changes, augment, rotate_quarters
from metadiff_cli.errors import ConfigError
from metadiff_cli.files import release

SMALLEST = 16  # pixels
MOMENTUM = 0.9  # of Nesterov
WARM_UP = 0.15  # of the training: share in which the one-cycle schedule rises
SHARE = 0.5  # of a GPU's free memory that images may take; the rest is for the training itself
CHUNK = 4096  # images that are copied at a time, as the array may be a large file


@dataclass(frozen=True)
class PretrainStep:
    """Means over the steps since the last record: `loss` in nats, `accuracy` on base classes in percent."""

    epoch: int
    step: int
    steps: int
    loss: float
    accuracy: float


@dataclass(frozen=True)
class PretrainEpoch:
    """The end of an epoch; `validation` is few-shot accuracy on validation classes in percent, None without them."""

    epoch: int
    epochs: int
    size: int
    loss: float
    accuracy: float
    validation: float | None
    best: bool


class Pretrainer(Trainer[PretrainStep, PretrainEpoch]):
    """Trains an encoder with its heads; the best encoder is kept."""

    trained = "encoder"
    remedy = (
        "try a lower --set pretrain.lr=..., or --set pretrain.precision=fp32, with --overwrite or another --out; "
        "--init-from ENCODER starts from the one that is kept"
    )
    report_every = 10
    validation_type = PretrainEpoch

    def __init__(
        self,
        build: Callable[[], Encoder],
        config: PretrainConfig,
        images: np.ndarray,
        labels: np.ndarray,
        *,
        classes: int,
        size: int,
        mean: list[float],
        std: list[float],
        seed: int,
        device: torch.device,
        weights: dict[str, Tensor] | None = None,
        group: Group = SINGLE,
    ) -> None:
        """`build` makes the encoder, which starts from `weights` or else from the random ones of `seed`.

        `images` (n, S, S, 3) uint8 may be memory-mapped; `labels` (n,) are in 0..classes - 1; `size` is in pixels.
        Raises ConfigError when the processes cannot share a batch, DataError when there are too few classes for pairs.
        """
        super().__init__(3, seed=seed, device=device, group=group)
        self.config, self.size = config, size
        self.pixels = Pixels(images, device)
        self.labels = torch.as_tensor(np.asarray(labels))
        self.turns = 4 if config.rotated_classes else 1
        self.mean, self.std = torch.tensor(mean, device=device), torch.tensor(std, device=device)
        self.augmentation = Augmentation(**config.augment.model_dump())
        self.pairs = Pairs(labels, self.turns, config.batch // 2) if config.objective == "pairs" else None
        with default_noise(seeded_noise(seed, CPU), CPU):
            self.encoder = build()
            side = 1 if self.encoder.pooled else self.encoder.side(self.size_of(0))
            outputs = 0 if self.pairs else classes * self.turns
            self.heads = Heads(self.encoder.channels, side, outputs, config.rotation_weight > 0, config.cosine_head)
        if weights is not None:
            self.encoder.load_state_dict(weights)
        self.encoder.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.heads.to(device)
        self.module = nn.ModuleDict({"encoder": self.encoder, "heads": self.heads})
        self.part, self.weight = self._slice()
        self._prepare()
        self.order = torch.arange(0)  # of the images in this epoch
        self.generator = torch.Generator()  # of this epoch
        self.noise: Noise = {}  # of DropBlock in this epoch
        self.reports: list[tuple[float, float]] = []  # loss and accuracy of this epoch's records

    @property
    def epoch_steps(self) -> int:
        """Steps of an epoch; the incomplete last batch is left out, as it upsets BatchNorm."""
        return max(1, len(self.labels) // self.config.batch)

    @property
    def steps(self) -> int:
        return self.config.epochs * self.epoch_steps

    @property
    def validate_every(self) -> int:
        return self.epoch_steps

    @property
    def epoch(self) -> int:
        """Epochs that are over."""
        return self.validated // self.epoch_steps

    @property
    def position(self) -> str:
        done, step = f"epoch {self.epoch} of {self.config.epochs}", self.step - self.validated
        return f"{done} and {step} of {self.epoch_steps} steps" if step else done

    def size_of(self, epoch: int) -> int:
        """Image size of an epoch in pixels: the configured stages, smaller images first."""
        end = 0.0
        for share, scale in self.config.stages:
            end += share * self.config.epochs
            if epoch < round(end):
                return scaled(self.size, scale)
        return self.size

    def _advance(self) -> None:
        if self.step == self.validated:
            self._begin_epoch()
        self.encoder.train()
        step = self.step - self.validated
        progress = (self.epoch + step / self.epoch_steps) / self.config.epochs
        lr, how = learning_rate(self.config, progress), self.augmentation.weakened(strength(self.config, progress))
        index = self.order[step * self.config.batch : (step + 1) * self.config.batch]
        if self.group.world_size > 1:  # each process has noise of its own, and only that of rank 0 is kept
            self.noise = seeded_noise(mixed_seed(self.seed, self.epoch, step, self.group.rank), self.device)
        with default_noise(self.noise, self.device):
            self.sums.add(self._train_step(index, self.size_of(self.epoch), lr, how, self.generator))

    def _begin_epoch(self) -> None:
        """Set image size, the order of the images, and all generators."""
        seed = mixed_seed(self.seed, self.epoch)
        self.generator = torch.Generator().manual_seed(seed)
        self.order = torch.randperm(len(self.labels), generator=self.generator)
        self.noise = seeded_noise(seed + 1, self.device)
        self._resize_heads(self.size_of(self.epoch))

    def _report(self) -> PretrainStep:
        loss, correct, count = self._read()
        loss, accuracy = loss / self.sums.count, 100 * correct / count
        self.sums.reset()
        self.reports.append((loss, accuracy))
        return PretrainStep(self.epoch + 1, self.step - self.validated, self.epoch_steps, loss, accuracy)

    def _validate(self, validate: Callable[[Encoder], float | None]) -> PretrainEpoch:
        self.group.mean_buffers_(self.encoder)
        validation = validate(self.encoder.eval())
        best = self._keep_best(validation, self.encoder.state_dict())
        losses, hits = zip(*self.reports, strict=True)
        self.reports = []
        return PretrainEpoch(
            self.epoch + 1, self.config.epochs, self.size_of(self.epoch),
            float(np.mean(losses)), float(np.mean(hits)), validation, best,
        )  # fmt: skip

    def _train_step(self, index: Tensor, size: int, lr: float, how: Augmentation, generator: torch.Generator) -> Tensor:
        """Take one SGD step on the images `index`, or on pairs; returns loss, number of hits and of images, (3,).

        Each process draws for the whole batch and takes its slice; the numbers are means over the processes.
        """
        if self.pairs is not None:
            index, labels = self.pairs.draw(generator)
        else:
            turns = torch.randint(self.turns, (len(index),), generator=generator) if self.turns > 1 else 0
            labels = self.labels[index] * self.turns + turns
        changes = Changes.draw(len(index), how, generator)
        quarters = torch.randint(4 if self.heads.rotation else 1, (len(labels),), generator=generator)
        pixels, labels, quarters = self.pixels.take(index[self.part]), labels[self.part], quarters[self.part]
        batch = augment(pixels, size, changes.part(self.part).to(self.device), self.mean, self.std)
        if self.turns > 1:
            batch = rotate_quarters(batch, labels % self.turns)
        if self.heads.rotation is not None:
            batch = torch.cat([batch, rotate_quarters(batch, quarters)])
        labels, quarters = sent(labels, self.device), sent(quarters, self.device)
        with autocast(self.device, self.config.precision):
            loss, logits, labels = self.parallel_loss(batch, labels, quarters)
        loss = self.weight * loss
        for parameters in self.optimiser.param_groups:
            parameters["lr"] = lr
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimiser.step()
        correct = (logits.argmax(dim=1) == labels).sum()
        count = torch.full_like(correct, len(labels))
        return self.group.mean_(torch.stack([loss.detach().float(), correct.float(), count.float()]))

    def _loss(self, batch: Tensor, labels: Tensor, quarters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The loss, and the logits (M, N) and labels (M,) that it is taken of.

        With a rotation head, `batch` holds the images and then the same ones turned by `quarters` (B,).
        """
        features = self.encoder(batch)
        if self.pairs is not None:
            halves = [part.chunk(2) for part in self.group.all_gather(features.float())]
            features = torch.cat([one for one, _ in halves] + [other for _, other in halves])
            logits, labels = pair_logits(features, self.config.cosine_head or 1.0)
            return F.cross_entropy(logits, labels), logits, labels
        logits = self.heads.class_logits(features[: len(labels)])
        loss = F.cross_entropy(logits, labels)
        if self.heads.rotation is not None:
            turned = F.cross_entropy(self.heads.rotation(features[len(labels) :]), quarters)
            loss = loss + self.config.rotation_weight * turned
        return loss, logits, labels

    def _slice(self) -> tuple[Tensor, float]:
        """The rows of a batch that this process takes, with both images of a pair, and the weight of their loss."""
        if self.pairs is None:
            count = min(self.config.batch, len(self.labels))
            part = self.group.slice_of(count, "pretrain.batch")
            return torch.arange(count)[part], self.group.weight_of(part, count)
        if self.pairs.ways % self.group.world_size:
            raise ConfigError(
                f"{self.group.world_size} processes cannot share batches of {self.pairs.ways} pairs in equal parts",
                hint=f"set pretrain.batch to a multiple of {2 * self.group.world_size}",
            )
        first = torch.arange(self.pairs.ways)[self.group.slice_of(self.pairs.ways, "half of pretrain.batch")]
        return torch.cat([first, first + self.pairs.ways]), 1.0  # each process has the loss of the whole batch

    def _prepare(self) -> None:
        """Set optimiser and loss for the present parameters."""
        self.optimiser = torch.optim.SGD(
            self.module.parameters(), self.config.lr, momentum=MOMENTUM, nesterov=True,
            weight_decay=self.config.weight_decay,
        )  # fmt: skip
        self.parallel_loss = self.group.data_parallel(self._loss, self.encoder, self.heads)

    def _resize_heads(self, size: int) -> None:
        side = 1 if self.encoder.pooled else self.encoder.side(size)
        if side != self.heads.side:
            kept = optimiser_tensors(self.module, self.optimiser)
            self.heads.resize(side)
            self._prepare()
            restore_optimiser(self.module, self.optimiser, kept)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, plain = super().state()
        if self.step % self.epoch_steps:  # at its start an epoch seeds its generators
            noise = {"images": self.generator.get_state(), **self.noise}
            tensors |= {f"noise.{name}": t for name, t in noise.items()}
        return tensors, {**plain, "reports": self.reports, "side": self.heads.side}

    def restore(self, part: Part, plain: dict[str, Any]) -> None:
        self.heads.resize(int(plain["side"]))
        self.heads.to(self.device)
        self._prepare()
        super().restore(part, plain)
        self.reports = [(float(loss), float(accuracy)) for loss, accuracy in plain["reports"]]
        if noise := part("noise"):
            self._begin_epoch()
            self.generator.set_state(noise.pop("images"))
            self.noise = noise


def scaled(size: int, scale: float) -> int:
    """`size` pixels times `scale`, but no less than encoders can see."""
    return max(SMALLEST, round(scale * size))


def strength(config: PretrainConfig, progress: float) -> float:
    """Strength of the augmentation at `progress` in 0..1: 1, and falling to 0 over the last share `fade`."""
    return 1.0 if progress <= 1 - config.fade else (1 - progress) / config.fade


def learning_rate(config: PretrainConfig, progress: float) -> float:
    """Learning rate at `progress` in 0..1: one-cycle rises from a tenth of it, then a cosine falls to almost zero."""
    warm = WARM_UP if config.schedule == "one-cycle" else 0.0
    if progress < warm:
        return config.lr * (0.1 + 0.9 * (1 - math.cos(math.pi * progress / warm)) / 2)
    return config.lr * max(1e-3, (1 + math.cos(math.pi * (progress - warm) / (1 - warm))) / 2)


class Pixels:
    """Decoded images (n, S, S, 3) uint8, taken by rows; a GPU keeps them all when half of its free memory suffices."""

    def __init__(self, images: np.ndarray, device: torch.device) -> None:
        self.images, self.device = images, device
        self.kept = _keep(images, device) if _fits(images, device) else None

    def take(self, rows: Tensor) -> Tensor:
        """Images (B, S, S, 3) on the device, of rows (B,) on the CPU."""
        if self.kept is not None:
            return self.kept[sent(rows, self.device)]
        return sent(torch.from_numpy(self.images[rows.numpy()]), self.device)


def _fits(images: np.ndarray, device: torch.device) -> bool:
    if device.type != "cuda":  # the CPU has them already
        return False
    free, _ = torch.cuda.mem_get_info(device)
    return images.nbytes <= SHARE * free


def _keep(images: np.ndarray, device: torch.device) -> Tensor:
    kept = torch.empty(images.shape, dtype=torch.uint8, device=device)
    for start in range(0, len(images), CHUNK):
        part = slice(start, start + CHUNK)
        kept[part] = sent(torch.from_numpy(np.array(images[part])), device)
        release(images)
    return kept
