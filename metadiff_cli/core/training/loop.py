"""What all trainings share: steps, validations, the best weights so far, records, and a state to go on from."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from metadiff_cli.core.distributed import Group
from metadiff_cli.errors import MetaDiffError

Step = TypeVar("Step")
Validation = TypeVar("Validation")
Part = Callable[[str], dict[str, Tensor]]  # prefix -> the tensors of a state below it


class Sums:
    """Sums over steps of a few numbers, each step's a tensor (n,) on the device.

    The tensors are read only when somebody asks, as reading waits for a GPU. They are added in double precision on the
    CPU, as not every device has it.
    """

    def __init__(self, size: int) -> None:
        self.totals, self.count = [0.0] * size, 0
        self.unread: list[Tensor] = []

    def add(self, values: Tensor) -> None:
        """Take in the numbers (n,) of one step."""
        self.unread.append(values)
        self.count += 1

    def read(self) -> list[float]:
        """The sums so far."""
        for row in torch.stack(self.unread).tolist() if self.unread else ():
            self.totals = [total + value for total, value in zip(self.totals, row, strict=True)]
        self.unread.clear()
        return self.totals

    def reset(self, totals: Sequence[float] | None = None, count: int = 0) -> None:
        """Begin again from `totals` over `count` steps, by default from nothing."""
        self.totals = [0.0] * len(self.totals) if totals is None else [float(total) for total in totals]
        self.count = count
        self.unread.clear()


class Trainer(ABC, Generic[Step, Validation]):
    """A training that counts steps and measures itself on validation classes now and then.

    A subclass sets `module` and `optimiser`, says what a step and a validation are, names what it trains in `trained`,
    and says in `remedy` what to try when the loss is no longer finite. `history` holds the validations. The state after
    any step is all that the next step depends on: a restored training takes the same steps, bit for bit.
    """

    trained: ClassVar[str]
    remedy: ClassVar[str]
    report_every: ClassVar[int] = 20  # steps: reading the loss waits for the device
    validation_type: ClassVar[type]
    module: nn.Module
    optimiser: torch.optim.Optimizer

    def __init__(self, sums: int, *, seed: int, device: torch.device, group: Group) -> None:
        self.seed, self.device, self.group = seed, device, group
        self.sums = Sums(sums)  # of the steps since the last record or validation
        self.step = 0
        self.validated = 0  # steps that were done at the last validation
        self.best: dict[str, Tensor] = {}
        self.best_value: float | None = None
        self.history: list[dict[str, Any]] = []

    @property
    @abstractmethod
    def steps(self) -> int:
        """Steps of the whole training."""

    @property
    @abstractmethod
    def validate_every(self) -> int:
        """Steps between two validations."""

    @property
    def position(self) -> str:
        """How far the training is."""
        return f"step {self.step} of {self.steps}"

    def run(self, validate: Callable[[Any], Any]) -> Iterator[Step | Validation | None]:
        """Train the steps that are left; `validate` measures what is trained now and then, and the best is kept.

        None stands for a step without a record. At each yield and while `validate` runs, `state` is whole.
        """
        while self.step < self.steps or self._due():
            if self._due():
                record = self._validate(validate)
                self.validated = self.step
                self.history.append(vars(record).copy())
                yield record
                continue
            self._advance()
            self.step += 1
            due = (self.step - self.validated) % self.report_every == 0 or self._due()
            yield self._report() if due else None

    def _due(self) -> bool:
        """Whether the validation after `step` steps is still to be made."""
        return self.step > self.validated and (self.step % self.validate_every == 0 or self.step == self.steps)

    def _keep_best(self, value: float | None, weights: dict[str, Tensor]) -> bool:
        """Keep a copy of `weights` when they are better than all before; without a value the last ones are kept."""
        best = value is None or self.best_value is None or value > self.best_value
        if best:
            self.best_value, self.best = value, {name: t.detach().clone() for name, t in weights.items()}
        return best

    def _read(self) -> list[float]:
        """The sums, the loss first. Raises MetaDiffError when it is not finite."""
        totals = self.sums.read()
        if not math.isfinite(totals[0]):
            raise MetaDiffError(
                f"the loss became {totals[0]} after {self.position}; the best {self.trained} so far is kept",
                hint=self.remedy,
            )
        return totals

    @abstractmethod
    def _advance(self) -> None:
        """Take one step and add what it gave to `sums`."""

    @abstractmethod
    def _report(self) -> Step:
        """Make the record of a step from `sums`."""

    @abstractmethod
    def _validate(self, validate: Callable[[Any], Any]) -> Validation:
        """Measure, keep the best, and begin new sums."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors by name and plain values. Raises MetaDiffError for a loss that is not finite."""
        parts = {"model": self.module.state_dict(), "best": self.best}
        parts["optimiser"] = optimiser_tensors(self.module, self.optimiser)
        plain = {
            "step": self.step, "validated": self.validated, "sums": self._read(), "count": self.sums.count,
            "best": self.best_value, "history": self.history,
        }  # fmt: skip
        return {f"{part}.{name}": t for part, tensors in parts.items() for name, t in tensors.items()}, plain

    def restore(self, part: Part, plain: dict[str, Any]) -> None:
        """Go on from a `state`."""
        self.module.load_state_dict(part("model"))
        restore_optimiser(self.module, self.optimiser, part("optimiser"))
        self.best, self.best_value = part("best"), plain["best"]
        self.step, self.validated = int(plain["step"]), int(plain["validated"])
        self.sums.reset(plain["sums"], int(plain["count"]))
        # a file has its keys sorted, a record has an order
        self.history = [vars(self.validation_type(**row)).copy() for row in plain["history"]]


class Ema:
    """Exponential moving average of a module's parameters, warmed up so that early steps do not linger.

    The published code updated nothing here and sampled with random weights.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.average = {name: p.detach().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Take in the current parameters."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        current = dict(module.named_parameters())
        torch._foreach_lerp_(list(self.average.values()), [current[name] for name in self.average], 1 - decay)

    def state(self) -> dict[str, Tensor]:
        """The averaged parameters by name."""
        return {name: t.clone() for name, t in self.average.items()}


def optimiser_tensors(module: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What the optimiser keeps for each parameter of a module, by <parameter>.<key>: momentum, moments, steps."""
    return {
        f"{name}.{key}": value
        for name, parameter in module.named_parameters()
        for key, value in optimiser.state[parameter].items()
        if isinstance(value, Tensor)
    }


def restore_optimiser(module: nn.Module, optimiser: torch.optim.Optimizer, kept: dict[str, Tensor]) -> None:
    """Put back what `optimiser_tensors` gave; a parameter that has another shape now starts without it."""
    parameters = dict(module.named_parameters())
    for place, value in kept.items():
        name, _, key = place.rpartition(".")
        parameter = parameters[name]
        if key == "step":  # a number, on the CPU
            optimiser.state[parameter][key] = value.cpu().clone()
        elif value.shape == parameter.shape:
            optimiser.state[parameter][key] = torch.empty_like(parameter).copy_(value)  # in its memory format
