"""`metadiff presets`."""

from collections.abc import Callable
from pathlib import Path

import yaml

from tests.worlds import Result

CLI = Callable[..., Result]


def test_the_folder_preset_can_be_copied_and_used(cli: CLI, tmp_path: Path) -> None:
    copy = tmp_path / "my.yaml"
    result = cli("presets", "copy", "folder", copy)
    assert result.code == 0 and f"--config {copy}" in result.err
    assert yaml.safe_load(copy.read_text())["kind"] == "own"
    assert cli("config", "show", "--config", copy).code == 0
