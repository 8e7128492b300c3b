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


def test_a_copy_replaces_nothing(cli: CLI, tmp_path: Path) -> None:
    (tmp_path / "kept.yaml").write_text("mine")
    (tmp_path / "link.yaml").symlink_to(tmp_path / "later.yaml")
    for name in ("kept.yaml", "link.yaml", "."):
        result = cli("presets", "copy", "folder", tmp_path / name)
        assert result.code == 2 and "exists already" in result.err and "new file" in result.err, result.err
    assert (tmp_path / "kept.yaml").read_text() == "mine" and not (tmp_path / "later.yaml").exists()
    result = cli("presets", "copy", "folder", tmp_path / "kept.yaml" / "x.yaml")
    assert result.code == 2 and "cannot be written" in result.err
    assert {path.name for path in tmp_path.iterdir()} == {"kept.yaml", "link.yaml"}
