"""The errors that the command line reports, and the exit code of each."""

import difflib
from collections.abc import Iterable

# what each exit code means; tests compare the classes below, and the README, with it
EXIT_CODES = {
    0: "ok",
    1: "failure at run time",
    2: "usage or configuration",
    3: "data",
    4: "checkpoint",
    5: "a gate such as `--fail-under` not met",
    130: "interrupted",
    143: "terminated",
}


class MetaDiffError(Exception):
    """An error that a person can act on: what is wrong and where, and in `hint` the next step."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}: {self.hint}"


class ConfigError(MetaDiffError):
    """A flag, a preset or a configuration key that cannot be used."""

    exit_code = 2


class DataError(MetaDiffError):
    """Images or folders that are missing, broken or too few."""

    exit_code = 3


class CheckpointError(MetaDiffError):
    """A file that is damaged, is not a checkpoint, or is a checkpoint of another kind or format."""

    exit_code = 4


class GateError(MetaDiffError):
    """A gate such as `--fail-under` was not met. The results themselves are fine."""

    exit_code = 5


class ProcessLost(MetaDiffError):
    """Another process of the same run has ended or cannot be reached any more."""

    def __init__(self, message: str, *, resumable: bool) -> None:
        """`resumable` says whether `--resume` can continue from the saved state."""
        super().__init__(message)
        self.resumable = resumable


class Stopped(BaseException):
    """SIGINT or SIGTERM asked the command to stop. It is not an Exception, so that no handler swallows it."""

    def __init__(self, number: int, *, resumable: bool = False) -> None:
        """`number` is the number of the signal; `resumable` says whether `--resume` can continue."""
        super().__init__(number)
        self.exit_code, self.resumable = 128 + number, resumable


class Told(BaseException):
    """An error that another process of the same run tells; this one only leaves with its exit code."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code


def exit_code(error: BaseException) -> int:
    """The exit code of the command line after `error`."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    code = getattr(error, "exit_code", 1)
    return code if isinstance(code, int) else 1


def suggest(word: str, known: Iterable[str], before: str = "", after: str = " ") -> str:
    """The question "did you mean ...?" for the closest known word, or an empty text if none is close."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"{before}did you mean '{close[0]}'?{after}" if close else ""
