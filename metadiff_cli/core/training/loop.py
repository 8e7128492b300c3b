"""Trainings that count steps and measure themselves on validation classes now and then."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from metadiff_cli.config.schema import InnerLoop, MetatrainConfig
from metadiff_cli.errors import MetaDiffError

REPORT_EVERY = 20  # steps between two records

Step = TypeVar("Step")
Validation = TypeVar("Validation")
Validate = Callable[[Any], tuple[float, float] | None]  # what was trained -> a measure and its interval


class StepTrainer(ABC, Generic[Step, Validation]):
    """`run` and where it is; what a step and a validation are is the trainer's own. `history` has the validations.

    `trained` names what is trained, and `remedy` says what to try when its loss is lost.
    """

    trained: str
    remedy: str
    config: MetatrainConfig | InnerLoop
    step: int
    history: list[dict[str, Any]]

    @property
    def position(self) -> str:
        """How far the training is."""
        return f"step {self.step} of {self.config.steps}"

    def run(self, validate: Validate) -> Iterator[Step | Validation | None]:
        """Train the steps that are left, measuring with `validate` on the way.

        None stands for a step without a record. At each yield and while `validate` runs, `state` is whole.
        """
        while self.step < self.config.steps or self._due():
            if self._due():
                record = self._validate(validate)
                self.history.append(vars(record).copy())
                yield record
                continue
            self._advance()
            self.step += 1
            yield self._now() if self.step % REPORT_EVERY == 0 and not self._due() else None

    def _due(self) -> bool:
        """Whether the validation after `step` steps is still to be made."""
        done = self.history[-1]["step"] if self.history else 0
        every, steps = self.config.validate_every, self.config.steps
        return self.step > done and (self.step % every == 0 or self.step == steps)

    def _finite(self, loss: float) -> float:
        """The loss. It is read with the records alone, as a GPU is waited for. Raises MetaDiffError for no number."""
        if not math.isfinite(loss):
            raise MetaDiffError(
                f"the loss became {loss} before step {self.step + 1}; the best {self.trained} so far is kept",
                hint=self.remedy,
            )
        return loss

    @abstractmethod
    def _advance(self) -> None:
        """One step; what it gave is taken into the means of the next record."""

    @abstractmethod
    def _now(self) -> Step:
        """A record of the means since the last validation."""

    @abstractmethod
    def _validate(self, validate: Validate) -> Validation:
        """Measure, keep the best, begin new means."""


def adam_tensors(module: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The moments of Adam or AdamW for a module's parameters, named adam.<parameter>.<key>."""
    return {
        f"adam.{name}.{key}": value
        for name, parameter in module.named_parameters()
        for key, value in optimiser.state[parameter].items()
    }


def restore_adam(module: nn.Module, optimiser: torch.optim.Optimizer, part: Callable[[str], dict[str, Tensor]]) -> None:
    """Put back what `adam_tensors` gave; `part(prefix)` gives the tensors below a prefix."""
    for name, parameter in module.named_parameters():
        values = part(f"adam.{name}")
        if values:
            moments = {
                key: torch.empty_like(parameter).copy_(t)  # in the parameter's memory format
                for key, t in values.items()
                if key != "step"
            }
            optimiser.state[parameter] = {"step": values["step"].cpu(), **moments}
