"""`python -m tests.hasty ...`: the command line with the few episodes that it fits on in the process of the tests."""

import sys

from metadiff_cli.app import run
from tests.worlds import hasty

if __name__ == "__main__":
    with hasty():
        code = run(sys.argv[1:])
    sys.exit(code)
