"""`python -m metadiff_cli` and the console script."""

import io
import os
import sys

from metadiff_cli.app import run


def main() -> None:
    """Run the command line and leave with its exit code."""
    _prepare_stdout()
    raise SystemExit(run())


def _prepare_stdout() -> None:
    """Names of files need not be valid text; escaped, they are valid JSON. Windows has another encoding for pipes."""
    if not isinstance(sys.stdout, io.TextIOWrapper):
        return
    sys.stdout.reconfigure(errors="backslashreplace")
    if os.name == "nt" and not sys.stdout.isatty():
        sys.stdout.reconfigure(encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
