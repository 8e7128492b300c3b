"""Runs that go on: a training with its state file, and the refusal of settings that are not those it began with."""

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from metadiff_cli import __version__
from metadiff_cli.commands.train.signals import HeldSignals
from metadiff_cli.config.load import flat
from metadiff_cli.config.schema import Config
from metadiff_cli.console import Screen
from metadiff_cli.core.training.world import world
from metadiff_cli.errors import ConfigError, Stopped

if TYPE_CHECKING:
    from metadiff_cli.commands.train.run_folder import Run

SAVE_EVERY = 60.0  # seconds: what a `kill -9` loses of an epoch at most, beside the step at hand
NONE = "none"

Update = Callable[[int, int, str], None]


class Trainer(Protocol):
    """What the trainers of the core have in common."""

    @property
    def position(self) -> str: ...

    def run(self, validate: Any) -> Iterator[Any]: ...

    def state(self) -> tuple[dict[str, Any], dict[str, Any]]: ...

    def restore(self, part: Callable[[str], dict[str, Any]], plain: dict[str, Any]) -> None: ...


def depends(config: Config, **further: str | None) -> dict[str, Any]:
    """All that the result of a training depends on: settings, and `further` identities of data and files."""
    return {
        **flat(config.model_dump(mode="json", exclude={"runtime"})),
        **{key: value or NONE for key, value in further.items()},
    }


def file_digest(path: Path | None) -> str | None:
    """Identifies the content of a file that a training starts from."""
    if path is None:
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


def refuse_changes(before: Mapping[str, Any], now: Mapping[str, Any], where: Path) -> None:
    """Raises ConfigError that lists what is not as it was."""
    changed = [key for key in dict.fromkeys([*before, *now]) if before.get(key, NONE) != now.get(key, NONE)]
    if changed:
        lines = "; ".join(f"{key}: {before.get(key, NONE)} -> {now.get(key, NONE)}" for key in changed)
        raise ConfigError(
            f"{where} was begun with other settings ({lines})",
            hint="to go on, give the same ones; for a new run, another --out or --overwrite, and --init-from FILE to "
            "start from trained weights",
        )


def follow(
    trainer: Trainer, validate: Callable[[Any], Any], show: Callable[[Any, Update], bool], *,
    label: str, state: Path, identity: dict[str, Any], screen: Screen,
) -> None:  # fmt: skip
    """Run a training, from its state file when there is one, and keep that file up to date.

    Several processes have the same state, and the main one keeps it: any number of them can go on from there.

    `show` takes each record, draws it, writes what belongs to it, and says whether the state is to be saved now. Raises
    Stopped after SIGINT or SIGTERM, with the state saved; ConfigError when the state has another `identity`.
    """
    from metadiff_cli.core.checkpoints.file import save_checkpoint
    from metadiff_cli.core.training.distributed import barrier

    def save() -> float:
        if world().main:
            tensors, plain = trainer.state()
            save_checkpoint(state, "state", tensors, {"plain": plain, "depends": identity})
        return time.monotonic()

    _restore(trainer, state, identity, screen)
    with screen.status(label) as update, HeldSignals() as held:
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
                    barrier()  # the end of any process has the others killed
            raise


def show_step(
    run: "Run", history: list[dict[str, Any]], screen: Screen, record: Any, update: Update, measured: str | None
) -> bool:
    """Draw a record of a training by steps; at a validation, which `measured` is of, write the metrics and save."""
    update(record.step, record.steps, f"loss {record.loss:.3f}")
    if measured is None:
        return False
    screen.note(f"step {record.step}/{record.steps}  loss {record.loss:.3f}{measured}{'  best' * record.best}")
    run.save_metrics(history, "metatrain")
    return True


def _restore(trainer: Trainer, state: Path, identity: dict[str, Any], screen: Screen) -> None:
    from metadiff_cli.core.checkpoints.file import load_checkpoint
    from metadiff_cli.core.checkpoints.model import checkpoint_errors
    from metadiff_cli.core.training.distributed import on_main

    kept = on_main(lambda: load_checkpoint(state, "state") if state.is_file() else None)
    if kept is None:
        return
    with checkpoint_errors(state):
        before, plain = kept.header["depends"], kept.header["plain"]
        refuse_changes(before, identity, state)
        trainer.restore(kept.part, plain)
    if kept.header["package"] != __version__:
        screen.warn(f"{state} is of metadiff {kept.header['package']}: this one may not end with the same bytes")
    screen.note(f"going on after {trainer.position}")
