"""`adapt` starts fast: it loads nothing that labelling images does not need."""

from pathlib import Path

from tests.processes import HEAVY, loaded_by
from tests.worlds import paint


def test_the_packaged_model_loads_no_compiler_and_no_library_of_other_encoders(tmp_path: Path) -> None:
    for name, colour in (("red", (220, 30, 30)), ("blue", (40, 50, 220))):
        paint(tmp_path / "imgs" / name / "1.png", colour, seed=0)
    modules, out = loaded_by("adapt", "-S", tmp_path / "imgs", "-Q", tmp_path / "imgs", "--views", "1", "-f", "csv")
    assert out.count("\n") == 3 and "torch" in modules
    assert not modules & HEAVY
