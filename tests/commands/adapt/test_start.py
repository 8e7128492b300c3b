"""`adapt` starts fast: it loads nothing that labelling images does not need."""

import subprocess
import sys
from pathlib import Path

from tests.worlds import paint

HEAVY = ("torchvision", "timm", "sympy", "scipy", "pandas", "torch._dynamo", "torch._inductor", "onnx", "jinja2")


def loaded_by(*arguments: str | Path) -> tuple[set[str], str]:
    """The modules that a whole command loads in a process of its own, and its stdout."""
    code = (
        "import sys\nfrom metadiff_cli.app import run\n"
        "code = run(sys.argv[1:])\nprint(*sys.modules, file=sys.stderr)\nraise SystemExit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.splitlines()[-1].split()), done.stdout


def test_the_packaged_model_loads_no_compiler_and_no_library_of_other_encoders(tmp_path: Path) -> None:
    for name, colour in (("red", (220, 30, 30)), ("blue", (40, 50, 220))):
        paint(tmp_path / "imgs" / name / "1.png", colour, seed=0)
    modules, out = loaded_by("adapt", "-S", tmp_path / "imgs", "-Q", tmp_path / "imgs", "--views", "1", "-f", "csv")
    assert out.count("\n") == 3 and "torch" in modules
    assert not modules & set(HEAVY)
