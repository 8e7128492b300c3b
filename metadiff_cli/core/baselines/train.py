"""Meta-training of the gradient-based family: the outer loop over tasks of base classes, by Adam.

A step's tasks follow from (seed, step) alone. `InnerTrainer.run` is a generator of records, as the other trainers'.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metadiff_cli.config.schema import InnerLoop
from metadiff_cli.core.baselines.learners import InnerLearner
from metadiff_cli.core.device import sent
from metadiff_cli.core.encoders.bank import Bank
from metadiff_cli.core.evaluation.episodes import Episodes, check_episodes, mixed_seed, training_batch
from metadiff_cli.core.training.distributed import mean_gradients, mean_of, part_of
from metadiff_cli.core.training.loop import StepTrainer, Validate, adam_tensors, restore_adam
from metadiff_cli.core.training.transforms import Augmentation, Changes, changed
from metadiff_cli.core.training.world import world

LARGEST_SLOPE = 10.0  # entries of the outer gradient are clipped there, as MAML's code does on mini-ImageNet


@dataclass(frozen=True)
class InnerStep:
    """Means since the last validation: loss of the queries in nats, their accuracy in percent."""

    step: int
    steps: int
    loss: float
    accuracy: float


@dataclass(frozen=True)
class InnerValidation(InnerStep):
    """`validation` is the accuracy on validation episodes in percent with its interval, None without them."""

    validation: float | None
    ci95: float | None
    best: bool


class InnerTrainer(StepTrainer[InnerStep, InnerValidation]):
    """The state of the training of one learner: its parameters, optimiser, and the best parameters so far."""

    config: InnerLoop
    trained = "learner"
    remedy = "try a lower rate or lr in --set baselines.images.rate=... or baselines.frozen.rate=..."

    def __init__(
        self, learner: InnerLearner, bank: Bank, config: InnerLoop, *, shot: int, seed: int,
        device: torch.device, quarters: int = 1, augmentation: Augmentation | None = None,
    ) -> None:  # fmt: skip
        """`bank` is a PixelBank for a learner on images, else a FeatureBank.

        With `quarters` = 4 each class of images, turned by 90, 180 and 270 degrees, counts as three further classes.
        With an `augmentation` each image of a task undergoes it, by what follows from (seed, step, task).
        Raises DataError when the base classes do not suffice.
        """
        self.bank, self.config, self.shot, self.seed, self.device = bank, config, shot, seed, device
        self.augmentation = augmentation
        own = bank.class_indices()
        check_episodes(own, bank.classes, learner.way, shot, config.query)
        # a row beyond the bank's end means the same image turned: row + q n by q quarters
        self.indices = [rows + q * len(bank.labels) for q in range(quarters) for rows in own]
        self.learner = learner.to(device)
        self.optimiser = torch.optim.Adam(self.learner.parameters(), lr=config.lr)
        self.part = part_of(config.batch, "the batch of tasks")  # of a step's tasks, those of this process
        self.step = 0
        # sums of loss and accuracy over the `count` steps since the last validation
        self.seen, self.count = torch.zeros(2, dtype=torch.float64, device=device), 0
        self.best: dict[str, Tensor] = {}
        self.best_validation: float | None = None
        self.history: list[dict[str, Any]] = []

    def chosen(self) -> InnerLearner:
        """The learner with the best parameters so far, in evaluation mode."""
        chosen = copy.deepcopy(self.learner)
        chosen.load_state_dict(self.best or self.learner.state_dict())
        return chosen.eval()

    def _advance(self) -> None:
        self.seen += self._train_step()
        self.count += 1

    def _now(self) -> InnerStep:
        loss, accuracy = self.seen.tolist()
        return InnerStep(self.step, self.config.steps, self._finite(loss) / self.count, 100 * accuracy / self.count)

    def _validate(self, validate: Validate) -> InnerValidation:
        now = self._now()
        measured = validate(self.learner)
        accuracy, ci95 = measured if measured else (None, None)
        best = accuracy is None or self.best_validation is None or accuracy > self.best_validation
        if best:
            self.best_validation = accuracy
            self.best = {name: t.detach().clone() for name, t in self.learner.state_dict().items()}
        record = InnerValidation(**vars(now), validation=accuracy, ci95=ci95, best=best)
        self.seen.zero_()
        self.count = 0
        return record

    def _train_step(self) -> Tensor:
        """One step of the outer optimiser; returns loss and accuracy in 0..1."""
        way = self.learner.way
        episodes = training_batch(
            self.indices, (way, way), (self.shot, self.shot), self.config.query,
            batch=self.config.batch, seed=self.seed, step=self.step,
        )  # fmt: skip
        self.learner.train()
        for group in self.optimiser.param_groups:
            group["lr"] = self.config.lr * self._pace()
        self.optimiser.zero_grad(set_to_none=True)
        seen = torch.zeros_like(self.seen)
        for first in range(self.part.start, self.part.stop, self.learner.at_once):
            part = episodes.part(slice(first, min(first + self.learner.at_once, self.part.stop)))
            share = len(part.labels) / self.config.batch * world().size
            part_loss, part_accuracy = self.loss(part, first)
            (share * part_loss).backward()  # type: ignore[no-untyped-call]
            seen += share * torch.stack([part_loss.detach(), part_accuracy])
        mean_gradients(self.learner)
        nn.utils.clip_grad_value_(self.learner.parameters(), LARGEST_SLOPE)
        self.optimiser.step()
        return mean_of(seen)

    def _pace(self) -> float:
        """The share of the learning rate in this step: all, or falling by half a cosine (Antoniou et al. 2019)."""
        if self.config.schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * self.step / self.config.steps))

    def loss(self, episodes: Episodes, first: int = 0) -> tuple[Tensor, Tensor]:
        """Cross-entropy of the queries after adaptation to the support, and their accuracy in 0..1.

        `first` is the place of the first task in the step's batch.
        """
        labels = sent(torch.from_numpy(episodes.labels), self.device)
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, self.step, first))
        support, query = (self._fetch(rows, generator) for rows in (episodes.support, episodes.query))
        logits = self.learner(support, query, self.config.inner_steps)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return loss, (logits.detach().argmax(dim=-1) == labels).float().mean()

    def _fetch(self, rows: np.ndarray, generator: torch.Generator) -> Tensor:
        """Features or pixels (..., D) of rows (...), turned where it says so, augmented by draws of `generator`."""
        turns, rows = np.divmod(rows, len(self.bank.labels))
        values = self.bank.take(rows)
        for q in (1, 2, 3):
            if (turned := torch.from_numpy(turns == q)).any():
                values[turned] = values[turned].rot90(q, dims=(1, 2))
        values = sent(values, self.device)
        return values if self.augmentation is None else _augmented(values, self.augmentation, generator)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that the next step depends on, as tensors by name and plain values."""
        tensors = {f"learner.{n}": t for n, t in self.learner.state_dict().items()}
        tensors |= {f"best.{n}": t for n, t in self.best.items()} | adam_tensors(self.learner, self.optimiser)
        loss, accuracy = self.seen.tolist()
        plain = {
            "step": self.step, "seen": [self._finite(loss), accuracy, self.count], "best": self.best_validation,
            "history": self.history,
        }  # fmt: skip
        return tensors, plain

    def restore(self, part: Callable[[str], dict[str, Tensor]], plain: dict[str, Any]) -> None:
        """Go on from a `state`; `part(prefix)` gives the tensors below a prefix."""
        self.learner.load_state_dict(part("learner"))
        self.best = part("best")
        restore_adam(self.learner, self.optimiser, part)
        self.step, self.best_validation = int(plain["step"]), plain["best"]
        self.history = [vars(InnerValidation(**row)).copy() for row in plain["history"]]  # a file has keys sorted
        *sums, count = plain["seen"]
        self.seen.copy_(torch.tensor(sums, dtype=torch.float64))
        self.count = int(count)


def _augmented(pixels: Tensor, how: Augmentation, generator: torch.Generator) -> Tensor:
    """Pixels (..., S, S, 3) uint8, each image changed in its own way."""
    side = pixels.shape[-2]
    squares = pixels.flatten(0, -4)
    changes = Changes.draw(len(squares), how, generator).to(pixels.device)
    values = changed(squares, side, changes).mul_(255).round_().to(torch.uint8)
    return values.permute(0, 2, 3, 1).reshape(pixels.shape)
