"""The page of `metatrain --report`."""

import json
from collections.abc import Callable
from pathlib import Path

from metadiff_cli.core.checkpoints.file import read_header
from tests.worlds import SMALL, Page, Result

CLI = Callable[..., Result]


def test_the_page_of_a_training_has_its_curves(cli: CLI, tmp_path: Path) -> None:
    page = tmp_path / "m.html"
    result = cli("metatrain", "--preset", "glyphs-5w1s", "--out", tmp_path / "run", "--seed", "5", "--report", page,
                 "--json", *SMALL)  # fmt: skip
    assert result.code == 0, result.err
    assert "pictures" not in json.loads(result.out) and "pictures" not in read_header(
        tmp_path / "run" / "checkpoint.safetensors"
    )
    text = Page(page).text
    for words in (
        "Training loss",
        "Gain over the analytic",
        "Pretraining: training loss",
        "Weights on their way",
    ):
        assert words in text
