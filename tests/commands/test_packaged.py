"""The checkpoint that comes with the package: there, small enough, described, and of use right after installation."""

import json
from collections.abc import Callable
from pathlib import Path

from metadiff_cli import FewShotClassifier
from metadiff_cli.core.checkpoints.file import read_header
from metadiff_cli.files import PACKAGED
from tests.worlds import COLOURS, Result

CLI = Callable[..., Result]


def test_it_is_at_most_16_megabytes() -> None:
    assert 0 < PACKAGED.stat().st_size <= 16_000_000


def test_adapt_needs_no_checkpoint(cli: CLI, photos: Path) -> None:
    result = cli("adapt", "--support", photos / "support", "--query", photos / "query", "--json")
    assert result.code == 0, result.err
    labels = {Path(p["path"]).stem: p["label"] for p in json.loads(result.out)["predictions"]}
    assert labels == {name: name for name in COLOURS}


def test_python_needs_no_checkpoint(photos: Path) -> None:
    paths = sorted((photos / "support").glob("*/*.png"))
    classifier = FewShotClassifier.from_pretrained().fit(paths, [path.parent.name for path in paths])
    queries = sorted((photos / "query").glob("*.png"))
    assert classifier.score(queries, [path.stem for path in queries]) == 1.0


def test_inspect_prints_its_card(cli: CLI) -> None:
    shown = cli("inspect").out
    for key in (
        "data: ",
        "licence: ",
        "protocol:",
        "accuracy:",
        "limits: ",
        "made by: metadiff metatrain --preset photos",
    ):
        assert key in shown
    assert "1-shot prototype: " in shown and "5-shot metadiff: " in shown
    assert read_header(PACKAGED)["config"]["name"] == "photos"
