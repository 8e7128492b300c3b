"""Trainings that can be stopped and resumed: state files, and Ctrl-C and SIGTERM between two steps."""

import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from metadiff_cli import __version__
from metadiff_cli.commands.train.run_folder import Run, refuse_changes
from metadiff_cli.console import Screen
from metadiff_cli.core.baselines.train import InnerStep, InnerTrainer, InnerValidation
from metadiff_cli.core.checkpoints.file import load_checkpoint, save_checkpoint
from metadiff_cli.core.checkpoints.model import checkpoint_errors
from metadiff_cli.core.distributed import Group
from metadiff_cli.core.training.loop import Trainer
from metadiff_cli.core.training.metatrain import MetaStep, MetaTrainer, MetaValidation
from metadiff_cli.errors import Stopped

SAVE_EVERY = 60.0  # seconds: the most of an epoch that a `kill -9` loses, beside the step at hand
HELD = (signal.SIGINT, signal.SIGTERM)

Update = Callable[[int, int, str], None]
Result = TypeVar("Result")


def follow(
    trainer: Trainer[Any, Any],
    validate: Callable[[Any], Any],
    show: Callable[[Any, Update], bool],
    *,
    label: str,
    run: Run,
    state: str,
    identity: dict[str, Any],
    screen: Screen,
) -> None:
    """Run a training from its file `state` in the run directory, if there is one, and keep that file up to date.

    `show` takes each record, draws it, writes the files that belong to it, and says whether to save the state now. All
    processes have the same state and rank 0 saves it, so any number of processes can resume it. Raises Stopped after
    SIGINT or SIGTERM, with the state saved; ConfigError when the state has another `identity`.
    """
    path, group = run.folder / state, run.group

    def save() -> float:
        if group.rank == 0:
            tensors, plain = trainer.state()
            save_checkpoint(path, "state", tensors, {"plain": plain, "depends": identity})
        return time.monotonic()

    _restore(trainer, path, identity, screen, group)
    with screen.status(label) as update, HeldSignals(group) as held:
        saved = time.monotonic()
        try:
            for record in trainer.run(held.interruptible(validate)):
                due = record is not None and show(record, update)
                if due or time.monotonic() - saved > SAVE_EVERY:
                    saved = save()
                held.stop_if_asked()
        except Stopped:
            if not held.twice:
                save()
                if held.together:
                    group.barrier()  # when one process ends, torchrun kills the others
            raise


def show_step(
    run: Run,
    trainer: MetaTrainer | InnerTrainer,
    screen: Screen,
    record: MetaStep | MetaValidation | InnerStep,
    update: Update,
    measured: str,
) -> bool:
    """Draw a record of a training by steps; `measured` is the text of a validation, empty for other records.

    At a validation, write the metrics and have the state saved.
    """
    update(record.step, record.steps, f"loss {record.loss:.3f}")
    if not isinstance(record, MetaValidation | InnerValidation):
        return False
    screen.note(f"step {record.step}/{record.steps}  loss {record.loss:.3f}{measured}{'  best' * record.best}")
    run.save_metrics(trainer.history, "metatrain")
    return True


def _restore(trainer: Trainer[Any, Any], path: Path, identity: dict[str, Any], screen: Screen, group: Group) -> None:
    kept = group.on_rank_zero(lambda: load_checkpoint(path, "state") if path.is_file() else None)
    if kept is None:
        return
    with checkpoint_errors(path):
        refuse_changes(kept.header["depends"], identity, path)
        trainer.restore(kept.part, kept.header["plain"])
    if kept.header["package"] != __version__:
        screen.warn(f"{path} was made by metadiff {kept.header['package']}: the result may differ in its last bits")
    screen.note(f"going on after {trainer.position}")


class HeldSignals:
    """Holds SIGINT and SIGTERM back until `stop_if_asked`; a second one raises Stopped at once, a third one kills.

    Work that may be interrupted at any moment runs through `interruptible`. Outside of the main thread, the only one
    that gets signals, this does nothing. All processes of a group stop after the same step, whichever got the signal;
    only rank 0, which saves, stops at once within `interruptible`.
    """

    def __init__(self, group: Group) -> None:
        self.group = group
        self.asked: int | None = None
        self.twice = False
        self.together = False  # whether all processes have stopped
        self._free = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "HeldSignals":
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._arrived) for number in HELD}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def stop_if_asked(self) -> None:
        """Raise Stopped when a signal has arrived at any of the processes."""
        if asked := self.group.max(self.asked or 0):
            self.together = True
            raise Stopped(asked)

    def interruptible(self, work: Callable[..., Result]) -> Callable[..., Result]:
        """`work` as a function that a signal stops at once; only for work that leaves the trainer's state alone."""

        def run(*arguments: Any) -> Result:
            try:
                self._free = self.group.rank == 0
                if self._free and self.asked is not None:
                    raise Stopped(self.asked)
                return work(*arguments)
            finally:
                self._free = False

        return run

    def _arrived(self, number: int, frame: FrameType | None) -> None:
        self.twice, self.asked = self.asked is not None, number
        if self.twice:
            for each in HELD:
                signal.signal(each, signal.SIG_DFL)
        if self.twice or self._free:
            raise Stopped(number)
