"""A user's mistakes and a run's failures, each with the exit code that the command line ends with."""

import difflib
from collections.abc import Iterable


class MetaDiffError(Exception):
    """Something a person can act on: what is wrong and where, and in `hint` what to type or change next."""

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
    """A file that is no checkpoint of ours, or one of another kind or version."""

    exit_code = 4


class GateError(MetaDiffError):
    """A gate such as `--fail-under` was not met; the results themselves are fine."""

    exit_code = 5


class ProcessLost(MetaDiffError):
    """Another process of the same run has ended or is not reached any more."""

    def __init__(self, message: str, *, resumable: bool) -> None:
        """`resumable` says that --resume goes on from what is saved."""
        super().__init__(message)
        self.resumable = resumable


class Stopped(BaseException):
    """SIGINT or SIGTERM asked the command to stop; not an Exception, so that nothing on the way up swallows it."""

    def __init__(self, number: int, *, resumable: bool = False) -> None:
        """`number` is the signal's; `resumable` says that --resume goes on from what is saved."""
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
    """For a hint: a question after the known word that is closest, or nothing when none is close."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"{before}did you mean '{close[0]}'?{after}" if close else ""
