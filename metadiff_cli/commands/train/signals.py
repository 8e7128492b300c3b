"""Ctrl-C and SIGTERM while something is trained: the step is finished and saved before the command stops."""

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

from metadiff_cli.core.training.distributed import largest_of
from metadiff_cli.core.training.world import world
from metadiff_cli.errors import Stopped

HELD = (signal.SIGINT, signal.SIGTERM)
Result = TypeVar("Result")


class HeldSignals:
    """While it is open, a signal waits until `stop_if_asked`; a second one raises Stopped at once, a third one kills.

    What may be interrupted at any moment runs through `interruptible`. Outside of the main thread, which alone gets
    signals, it does nothing. Of several processes all stop after the same step, whichever got the signal; only the main
    one, which saves, stops at once within `interruptible`.
    """

    def __init__(self) -> None:
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
        """Raises Stopped when a signal has arrived, at any of the processes."""
        if asked := largest_of(self.asked or 0):
            self.together = True
            raise Stopped(asked)

    def interruptible(self, work: Callable[..., Result]) -> Callable[..., Result]:
        """`work` as a function that a signal stops at once; only for what leaves the state of a training alone."""

        def run(*arguments: Any) -> Result:
            try:
                self._free = world().main
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
