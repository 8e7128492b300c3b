"""The entry point of `python -m metadiff_cli` and of the console script."""

import io
import os
import sys

from metadiff_cli.app import run


def main() -> None:
    """Run the command line and leave with its exit code."""
    _replace_closed_streams()
    _prepare_stdout()
    raise SystemExit(run())


def _replace_closed_streams() -> None:
    """A shell's `<&-`, `>&-` and `2>&-` close a stream. Results need stdout; without stderr nobody wants messages."""
    for number in range(3):  # or the first files that are opened would get these numbers
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if sys.stdout is None:
        sys.stderr.write("error: standard output is closed, and results go there\n")
        raise SystemExit(1)


def _prepare_stdout() -> None:
    """Let stdout take any file name, and on Windows write UTF-8 to pipes.

    A file name may hold bytes that are no text. Written as escapes, they are still valid JSON.
    """
    if not isinstance(sys.stdout, io.TextIOWrapper):
        return
    sys.stdout.reconfigure(errors="backslashreplace")
    if os.name == "nt" and not sys.stdout.isatty():
        sys.stdout.reconfigure(encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
