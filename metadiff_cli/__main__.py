"""`python -m metadiff_cli` and the console script."""

import io
import sys

from metadiff_cli.app import run


def main() -> None:
    """Run the command line and leave with its exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files need not be valid text; escaped, they are valid JSON
        sys.stdout.reconfigure(errors="backslashreplace")
    raise SystemExit(run())


if __name__ == "__main__":
    main()
