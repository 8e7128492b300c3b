"""Pretraining: an encoder by SGD on a cross-entropy, over the base classes with a head, or over those of an episode.

`Pretrainer.run` is a generator of records; whoever consumes it draws the progress and writes the files. All randomness
of an epoch comes from generators seeded by (seed, epoch), whose states within the epoch are part of `Pretrainer.state`:
a run that goes on from there takes the same steps, bit for bit, as one that never stopped.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metadiff_cli.config.schema import PretrainConfig
from metadiff_cli.core.device import autocast, default_noise, sent, set_default_noise
from metadiff_cli.core.encoders.networks import Encoder
from metadiff_cli.core.evaluation.episodes import mixed_seed
from metadiff_cli.core.training.distributed import all_rows, mean_buffers, mean_of, part_of, synchronised, weight_of
from metadiff_cli.core.training.losses import Heads, Pairs, pair_logits
from metadiff_cli.core.training.pixels import Pixels
from metadiff_cli.core.training.transforms import Augmentation, Changes, augment, rotate_quarters
from metadiff_cli.core.training.world import world
from metadiff_cli.errors import ConfigError, MetaDiffError

REPORT_EVERY = 10  # steps between two records: reading the loss waits for the device


@dataclass(frozen=True)
class PretrainStep:
    """Means over the steps since the last record; `loss` in nats, `accuracy` on base classes in percent."""

    epoch: int
    step: int
    steps: int
    loss: float
    accuracy: float
    lr: float


@dataclass(frozen=True)
class PretrainEpoch:
    """An epoch is over; `validation` is few-shot accuracy on validation classes in percent, None without them."""

    epoch: int
    epochs: int
    size: int
    loss: float
    accuracy: float
    validation: float | None
    best: bool


class Pretrainer:
    """The state of a pretraining run: encoder, heads, optimiser, and the best encoder so far."""

    def __init__(
        self,
        encoder: Encoder,
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
    ) -> None:
        """`images` (n, S, S, 3) uint8, may be memory-mapped; `labels` (n,) in 0..classes - 1."""
        self.config, self.seed, self.size, self.device = config, seed, size, device
        self.pixels = Pixels(images, device)
        self.labels = torch.as_tensor(np.asarray(labels))
        self.turns = 4 if config.rotated_classes else 1
        self.mean, self.std = torch.tensor(mean, device=device), torch.tensor(std, device=device)
        self.encoder = encoder.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        side = 1 if encoder.pooled else encoder.side(self.size_of(0))
        self.how = Augmentation(**config.augment.model_dump())
        self.pairs = Pairs(labels, self.turns, config.batch // 2) if config.objective == "pairs" else None
        outputs = 0 if self.pairs else classes * self.turns
        self.heads = Heads(encoder.channels, side, outputs, config.rotation_weight > 0, config.cosine_head)
        self.heads.to(device)
        self.part, self.weight = self._share()  # of a batch's images, those of this process; what their loss weighs
        self._prepare()
        self.epoch = 0
        self.step = 0  # of the epoch
        self.generator = torch.Generator()
        self.noise: dict[str, Tensor] = {}  # states of the default generators after the epoch's last step
        self.sums = torch.zeros(3, device=device)  # loss, correct ones, images since the last record
        self.reports: list[tuple[float, float]] = []  # loss and accuracy of the epoch's records so far
        self.best: dict[str, Tensor] = {}
        self.best_validation: float | None = None
        self.history: list[dict[str, Any]] = []

    def size_of(self, epoch: int) -> int:
        """Image size of an epoch: the configured stages, smaller images first."""
        end = 0.0
        for share, size in self.config.stages:
            end += share * self.config.epochs
            if epoch < round(end):
                return size
        return self.size

    @property
    def position(self) -> str:
        """How far the training is."""
        done = f"epoch {self.epoch} of {self.config.epochs}"
        return f"{done} and {self.step} of {self.steps} steps" if self.step else done

    @property
    def steps(self) -> int:
        """Steps of an epoch; the incomplete last batch is left out, as it upsets BatchNorm."""
        return max(1, len(self.labels) // self.config.batch)

    def run(self, validate: Callable[[Encoder], float | None]) -> Iterator[PretrainStep | PretrainEpoch | None]:
        """Train the epochs that are left. After each, `validate` measures the encoder and the best one is kept.

        None stands for a step without a record. At each yield and while `validate` runs, `state` is whole.
        """
        while self.epoch < self.config.epochs:
            yield from self._train_epoch()
            mean_buffers(self.encoder)
            yield self._end_epoch(validate(self.encoder.eval()))

    def _end_epoch(self, validation: float | None) -> PretrainEpoch:
        best = validation is None or self.best_validation is None or validation > self.best_validation
        if best:
            self.best_validation = validation
            self.best = {name: t.detach().clone() for name, t in self.encoder.state_dict().items()}
        losses, hits = zip(*self.reports, strict=True)
        self.epoch, self.step, self.reports = self.epoch + 1, 0, []
        end = PretrainEpoch(
            self.epoch, self.config.epochs, self.size_of(self.epoch - 1),
            float(np.mean(losses)), float(np.mean(hits)), validation, best,
        )  # fmt: skip
        self.history.append(vars(end).copy())
        return end

    def _train_epoch(self) -> Iterator[PretrainStep | None]:
        """The steps that are left of the epoch."""
        size = self.size_of(self.epoch)
        self._resize_heads(size)
        self.encoder.train()
        order = self._start_generators()
        while self.step < self.steps:
            progress = (self.epoch + self.step / self.steps) / self.config.epochs
            lr, how = learning_rate(self.config, progress), self.how.weakened(strength(self.config, progress))
            index = order[self.step * self.config.batch : (self.step + 1) * self.config.batch]
            if world().size > 1:  # each process has noise of its own, of which no state is kept but the main one's
                torch.manual_seed(mixed_seed(self.seed, self.epoch, self.step, world().rank))
            self.sums += self._train_step(index, size, lr, how, self.generator)
            self.step, self.noise = self.step + 1, default_noise(self.device)
            yield self._report(lr) if self.step % REPORT_EVERY == 0 or self.step == self.steps else None
            set_default_noise(self.noise, self.device)  # somebody else may have drawn meanwhile

    def _report(self, lr: float) -> PretrainStep:
        loss, correct, count = self.sums.tolist()
        loss, accuracy = loss / ((self.step - 1) % REPORT_EVERY + 1), 100 * correct / count
        self._check(loss)
        self.sums.zero_()
        self.reports.append((loss, accuracy))
        return PretrainStep(self.epoch + 1, self.step, self.steps, loss, accuracy, lr)

    def _start_generators(self) -> Tensor:
        """The order of the epoch's images (n,), and all generators as they are before its step `self.step`."""
        seed = mixed_seed(self.seed, self.epoch)
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.labels), generator=generator)
        if self.step == 0:
            self.generator = generator
            torch.manual_seed(seed + 1)  # DropBlock draws from the default generator of the device
        else:
            set_default_noise(self.noise, self.device)
        return order

    def _train_step(self, index: Tensor, size: int, lr: float, how: Augmentation, generator: torch.Generator) -> Tensor:
        """One SGD step on the images `index`, or on pairs; returns loss, number of correct ones, number of images.

        Of several processes each draws for the whole batch and takes its part; loss and numbers are means over them.
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
            loss, logits, labels = self._compiled_loss(batch, labels, quarters)
        loss = self.weight * loss
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimiser.step()
        correct = (logits.argmax(dim=1) == labels).sum()
        count = torch.full_like(correct, len(labels))
        return mean_of(torch.stack([loss.detach().float(), correct.float(), count.float()]))

    def _compiled_loss(self, *arguments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`_loss`, synchronised; the first call compiles where that is asked for. Raises ConfigError when it cannot."""
        try:
            return self.synchronised(*arguments)
        except Exception as error:
            if not self.config.compile or not isinstance(error, torch._dynamo.exc.TorchDynamoException):
                raise
            reason = " ".join(str(error).strip().splitlines()[:2])
            raise ConfigError(
                f"torch.compile cannot compile {type(self.encoder).__name__} here ({reason})",
                hint="leave out pretrain.compile; on a CPU it needs a C++ compiler",
            ) from error

    def _loss(self, batch: Tensor, labels: Tensor, quarters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The loss, and the logits (M, N) and labels (M,) that it is of.

        Where turns `quarters` (B,) are to be recognised, the turned images follow the others in the batch.
        """
        smoothing = self.config.label_smoothing
        if self.pairs is not None:
            halves = [features.chunk(2) for features in all_rows(self.encode(batch).float())]
            features = torch.cat([one for one, _ in halves] + [other for _, other in halves])
            logits, labels = pair_logits(features, self.config.cosine_head or 1.0)
            return F.cross_entropy(logits, labels, label_smoothing=smoothing), logits, labels
        if self.heads.rotation is None:
            logits = self.heads.class_logits(self.encode(batch))
            return F.cross_entropy(logits, labels, label_smoothing=smoothing), logits, labels
        features = self.encode(batch)
        logits = self.heads.class_logits(features[: len(labels)])
        loss = F.cross_entropy(logits, labels, label_smoothing=smoothing)
        turned = F.cross_entropy(self.heads.rotation(features[len(labels) :]), quarters)
        return loss + self.config.rotation_weight * turned, logits, labels

    def _check(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise MetaDiffError(
                f"the loss became {loss} in epoch {self.epoch + 1}; the best encoder so far is kept",
                hint="try a lower --set pretrain.lr=..., or --set pretrain.precision=fp32, with --overwrite or another "
                "--out; --init-from ENCODER starts from the one that is kept",
            )

    def _share(self) -> tuple[Tensor, float]:
        """Which images of a batch are this process's, of pairs both, and the weight of their loss.

        Raises ConfigError when they cannot be shared.
        """
        if self.pairs is None:
            count = min(self.config.batch, len(self.labels))
            part = part_of(count, "pretrain.batch")
            return torch.arange(count)[part], weight_of(part, count)
        if self.pairs.ways % world().size:
            raise ConfigError(
                f"{world().size} processes cannot share batches of {self.pairs.ways} pairs in equal parts",
                hint=f"set pretrain.batch to a multiple of {2 * world().size}",
            )
        first = torch.arange(self.pairs.ways)[part_of(self.pairs.ways, "half of pretrain.batch")]
        return torch.cat([first, first + self.pairs.ways]), 1.0  # each process has the loss of the whole batch

    def _prepare(self) -> None:
        """Optimiser and loss for the present parameters."""
        weights = [*self.encoder.parameters(), *self.heads.parameters()]
        c = self.config
        self.optimiser = torch.optim.SGD(
            weights, c.lr, momentum=c.momentum, nesterov=c.momentum > 0, weight_decay=c.weight_decay
        )
        # of an own name: what is validated and saved stays the plain module
        self.encode = torch.compile(self.encoder, dynamic=False) if c.compile else self.encoder
        self.synchronised = synchronised(self._loss, self.encoder, self.heads)

    def _resize_heads(self, size: int) -> None:
        side = 1 if self.encoder.pooled else self.encoder.side(size)
        if side == self.heads.side:
            return
        kept = self._momentum()
        self.heads.resize(side)
        self._prepare()
        self._set_momentum(kept)  # the heads' weights have a new shape and start without momentum

    def _named(self) -> dict[str, nn.Parameter]:
        parts = {"encoder": self.encoder, "heads": self.heads}
        return {f"{part}.{name}": p for part, module in parts.items() for name, p in module.named_parameters()}

    def _momentum(self) -> dict[str, Tensor]:
        states = self.optimiser.state
        return {n: states[p]["momentum_buffer"] for n, p in self._named().items() if "momentum_buffer" in states[p]}

    def _set_momentum(self, buffers: dict[str, Tensor]) -> None:
        for name, parameter in self._named().items():
            if name in buffers and buffers[name].shape == parameter.shape:
                buffer = buffers[name].to(parameter.device)
                like = torch.empty_like(parameter)  # keeps channels_last
                self.optimiser.state[parameter]["momentum_buffer"] = like.copy_(buffer)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that the next step depends on, as tensors by name and plain values; read between two steps.

        Raises MetaDiffError where the loss is no number any more: such a state is not worth keeping.
        """
        sums = self.sums.tolist()
        self._check(sums[0])
        parts = {"encoder": self.encoder.state_dict(), "heads": self.heads.state_dict()}
        parts |= {"momentum": self._momentum(), "best": self.best, "noise": self._generators()}
        tensors = {f"{part}.{name}": t for part, values in parts.items() for name, t in values.items()}
        plain = {
            "epoch": self.epoch, "step": self.step, "sums": sums, "reports": self.reports,
            "best": self.best_validation, "side": self.heads.side, "history": self.history,
        }  # fmt: skip
        return tensors, plain

    def _generators(self) -> dict[str, Tensor]:
        """States of the generators; none at the start of an epoch, which seeds them."""
        return {"images": self.generator.get_state(), **self.noise} if self.step else {}

    def restore(self, part: Callable[[str], dict[str, Tensor]], plain: dict[str, Any]) -> None:
        """Go on from a `state`; `part(prefix)` gives the tensors below a prefix."""
        self.encoder.load_state_dict(part("encoder"))
        self.heads.resize(int(plain["side"]))
        self.heads.to(self.device).load_state_dict(part("heads"))
        self._prepare()
        self._set_momentum(part("momentum"))
        self.best, self.epoch, self.step = part("best"), int(plain["epoch"]), int(plain["step"])
        self.noise = part("noise")
        if self.step:
            self.generator.set_state(self.noise.pop("images"))
        self.sums.copy_(torch.tensor(plain["sums"]))
        self.reports = [(float(loss), float(accuracy)) for loss, accuracy in plain["reports"]]
        self.best_validation = plain["best"]
        self.history = [vars(PretrainEpoch(**row)).copy() for row in plain["history"]]  # a file has keys sorted


def strength(config: PretrainConfig, progress: float) -> float:
    """Of augmentation at `progress` in 0..1: 1, and over the last `fade` of the training down to 0 in a line."""
    return 1.0 if progress <= 1 - config.fade else (1 - progress) / config.fade


def learning_rate(config: PretrainConfig, progress: float) -> float:
    """Rate at `progress` in 0..1. one-cycle: up from a tenth over the first 15 %, then a cosine to almost zero."""
    warm = 0.15 if config.schedule == "one-cycle" else 0.0
    if progress < warm:
        return config.lr * (0.1 + 0.9 * (1 - math.cos(math.pi * progress / warm)) / 2)
    return config.lr * max(1e-3, (1 + math.cos(math.pi * (progress - warm) / (1 - warm))) / 2)
