"""`python -m metadiff_cli` and the console script."""

from metadiff_cli.app import run


def main() -> None:
    """Run the command line and leave with its exit code."""
    raise SystemExit(run())


if __name__ == "__main__":
    main()
