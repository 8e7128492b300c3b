"""The entry point of `python -m metadiff_cli` and of the console script."""

import io
import os
import sys

from metadiff_cli.app import run


def main() -> None:
    """Run the command line and leave with its exit code."""
    _prepare_stdout()
    raise SystemExit(run())


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
