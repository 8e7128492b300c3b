"""Coverage-guided fuzzing with atheris: `python tests/fuzz/run.py TARGET [libFuzzer options]`; see README.md."""

import sys
import tempfile
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[2]))  # this checkout, whatever is installed
with atheris.instrument_imports(include=["metadiff_cli"]):
    from tests.fuzz.targets import TARGETS

    if sys.argv[1:2] == ["checkpoint"]:  # the targets import late, and only what is imported here is followed
        import metadiff_cli.core.checkpoints.classifier  # noqa: F401


def main() -> None:
    """Never returns: libFuzzer ends the process. It writes into the first folder that it is given, never the seeds."""
    target, options = sys.argv[1], sys.argv[2:]
    given = any(not option.startswith("-") for option in options)
    folders = [] if given else [tempfile.mkdtemp(prefix="fuzz-"), str(Path(__file__).parent / "corpus" / target)]
    atheris.Setup([sys.argv[0], *options, *folders], TARGETS[target])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
