"""Meta-training of the gradient-based family: Adam in the outer loop, over tasks of base classes.

A step's tasks follow from (seed, step) alone.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metadiff_cli.config.schema import InnerLoop
from metadiff_cli.core.baselines.learners import InnerLearner
from metadiff_cli.core.device import sent
from metadiff_cli.core.distributed import SINGLE, Group
from metadiff_cli.core.encoders.bank import Bank
from metadiff_cli.core.evaluation.episodes import Episodes, check_episodes, mixed_seed, training_batch
from metadiff_cli.core.training.loop import Trainer
from metadiff_cli.core.training.transforms import Augmentation, Changes, changed

LR = 1e-3  # of Adam
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
    """`validation` is the accuracy on validation episodes in percent, with its interval; None without them."""

    validation: float | None
    ci95: float | None
    best: bool


class InnerTrainer(Trainer[InnerStep, InnerValidation]):
    """Trains one learner; the best parameters are kept."""

    trained = "learner"
    remedy = "try a lower rate in --set baselines.images.rate=... or baselines.frozen.rate=..."
    validation_type = InnerValidation
    module: InnerLearner

    def __init__(
        self, learner: InnerLearner, bank: Bank, config: InnerLoop, *, shot: int, seed: int,
        device: torch.device, cosine: bool = False, quarters: int = 1, augmentation: Augmentation | None = None,
        group: Group = SINGLE,
    ) -> None:  # fmt: skip
        """`bank` is a PixelBank for a learner on images, else a FeatureBank.

        With `cosine` the learning rate falls by half a cosine over all steps. With `quarters` = 4 each class of images,
        turned by 90, 180 and 270 degrees, counts as three further classes. With an `augmentation` each image of a task
        undergoes it, by what follows from (seed, step, task). Raises DataError when a base class has too few images.
        """
        super().__init__(2, seed=seed, device=device, group=group)
        self.bank, self.config, self.shot, self.cosine, self.augmentation = bank, config, shot, cosine, augmentation
        own = bank.class_indices()
        check_episodes(own, bank.classes, learner.way, shot, config.query)
        # a row beyond the bank's end means the same image turned: row + q n by q quarters
        self.indices = [rows + q * len(bank.labels) for q in range(quarters) for rows in own]
        self.module = learner.to(device)
        self.optimiser = torch.optim.Adam(self.module.parameters(), lr=LR)
        self.part = group.slice_of(config.batch, "the batch of tasks")  # this process's tasks of a step

    @property
    def steps(self) -> int:
        return self.config.steps

    @property
    def validate_every(self) -> int:
        return self.config.validate_every

    def chosen(self) -> InnerLearner:
        """The learner with the best parameters so far, in evaluation mode."""
        chosen = copy.deepcopy(self.module)
        chosen.load_state_dict(self.best or self.module.state_dict())
        return chosen.eval()

    def _advance(self) -> None:
        self.sums.add(self._train_step())

    def _report(self) -> InnerStep:
        loss, accuracy = self._read()
        return InnerStep(self.step, self.steps, loss / self.sums.count, 100 * accuracy / self.sums.count)

    def _validate(self, validate: Callable[[InnerLearner], tuple[float, float] | None]) -> InnerValidation:
        now = self._report()
        measured = validate(self.module)
        accuracy, ci95 = measured if measured else (None, None)
        best = self._keep_best(accuracy, self.module.state_dict())
        self.sums.reset()
        return InnerValidation(**vars(now), validation=accuracy, ci95=ci95, best=best)

    def _train_step(self) -> Tensor:
        """Take one step of the outer optimiser; returns loss and accuracy in 0..1, (2,), the means over all tasks."""
        way = self.module.way
        episodes = training_batch(
            self.indices, (way, way), (self.shot, self.shot), self.config.query,
            batch=self.config.batch, seed=self.seed, step=self.step,
        )  # fmt: skip
        self.module.train()
        for parameters in self.optimiser.param_groups:
            parameters["lr"] = LR * self._pace()
        self.optimiser.zero_grad(set_to_none=True)
        found = []
        for first in range(self.part.start, self.part.stop, self.module.at_once):
            part = episodes.part(slice(first, min(first + self.module.at_once, self.part.stop)))
            share = len(part.labels) / self.config.batch * self.group.world_size
            loss, accuracy = self.loss(part, first)
            (share * loss).backward()  # type: ignore[no-untyped-call]
            found.append(share * torch.stack([loss.detach(), accuracy]))
        self.group.mean_gradients_(self.module)
        nn.utils.clip_grad_value_(self.module.parameters(), LARGEST_SLOPE)
        self.optimiser.step()
        return self.group.mean_(torch.stack(found).sum(dim=0))

    def _pace(self) -> float:
        """Share of the learning rate in this step: all of it, or falling by half a cosine (Antoniou et al. 2019)."""
        return 0.5 * (1 + math.cos(math.pi * self.step / self.steps)) if self.cosine else 1.0

    def loss(self, episodes: Episodes, first: int = 0) -> tuple[Tensor, Tensor]:
        """Cross-entropy of the queries after adaptation to the support, and their accuracy in 0..1.

        `first` is the place of the first task in the step's batch.
        """
        labels = sent(torch.from_numpy(episodes.labels), self.device)
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, self.step, first))
        support, query = (self._fetch(rows, generator) for rows in (episodes.support, episodes.query))
        logits = self.module(support, query)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return loss, (logits.detach().argmax(dim=-1) == labels).float().mean()

    def _fetch(self, rows: np.ndarray, generator: torch.Generator) -> Tensor:
        """Features (..., D) or pixels (..., S, S, 3) of rows (...), turned where a row says so.

        The draws of the augmentation come from `generator`.
        """
        turns, rows = np.divmod(rows, len(self.bank.labels))
        values = self.bank.take(rows)
        for q in (1, 2, 3):
            if (turned := torch.from_numpy(turns == q)).any():
                values[turned] = values[turned].rot90(q, dims=(1, 2))
        values = sent(values, self.device)
        return values if self.augmentation is None else _augmented(values, self.augmentation, generator)


def _augmented(pixels: Tensor, how: Augmentation, generator: torch.Generator) -> Tensor:
    """Pixels (..., S, S, 3) uint8, each image changed in its own way."""
    side = pixels.shape[-2]
    squares = pixels.flatten(0, -4)
    changes = Changes.draw(len(squares), how, generator).to(pixels.device)
    values = changed(squares, side, changes).mul_(255).round_().to(torch.uint8)
    return values.permute(0, 2, 3, 1).reshape(pixels.shape)
