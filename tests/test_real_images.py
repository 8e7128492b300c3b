"""Real images, where a checkout has them beside it: TEST_IMAGES or ../shared/data. Nothing of them is kept."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from metadiff_cli.data.benchmarks import open_dataset
from tests.worlds import invoke

SOURCE = Path(os.environ.get("TEST_IMAGES") or Path(__file__).parent.parent.parent / "shared" / "data")
UNPACK = SOURCE / "unpack.py"
pytestmark = pytest.mark.skipif(not UNPACK.is_file(), reason=f"no real images: {UNPACK} is not there")


@pytest.fixture(scope="module")
def omniglot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("images")
    subprocess.run([sys.executable, str(UNPACK), str(out), "omniglot"], check=True, capture_output=True)
    return out / "omniglot-py"


def test_omniglot_has_the_classes_of_the_literature(omniglot: Path) -> None:
    dataset = open_dataset(omniglot, layout="omniglot")
    assert {name: len(split.classes) for name, split in dataset.splits.items()} == {
        "train": 1028,
        "val": 172,
        "test": 423,
    }
    assert all(len(split.paths) == 20 * len(split.classes) for split in dataset.splits.values())


def test_adapt_on_real_characters(omniglot: Path, checkpoint: Path, tmp_path: Path) -> None:
    characters = sorted((omniglot / "images_evaluation" / "Angelic").iterdir())[:5]
    for character in characters:
        for i, image in enumerate(sorted(character.iterdir())[:8]):
            folder = tmp_path / ("support" if i < 4 else "query") / character.name
            folder.mkdir(parents=True, exist_ok=True)
            (folder / image.name).symlink_to(image)
    result = invoke("adapt", "-S", tmp_path / "support", "-Q", tmp_path / "query", "-c", checkpoint, "--format", "csv")
    assert result.code == 0, result.err
    rows = [line.split(",") for line in result.out.splitlines()[1:]]
    right = sum(Path(path).parent.name == label for path, label, *_ in rows)
    assert len(rows) == 20 and right >= 12  # chance is 4; the encoder saw generated glyphs for seconds
