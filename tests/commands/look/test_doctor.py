"""`metadiff doctor`: what works here, and the failures that people meet, explained."""

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from metadiff_cli.commands.look import doctor
from metadiff_cli.errors import ConfigError
from tests.worlds import Result

CLI = Callable[..., Result]


def failing(monkeypatch: pytest.MonkeyPatch, name: str, error: Exception) -> None:
    """Importing `name` raises."""
    real = importlib.import_module

    def load(wanted: str, package: str | None = None) -> ModuleType:
        if wanted == name:
            raise error
        return real(wanted, package)

    monkeypatch.setattr(importlib, "import_module", load)


def checks(cli: CLI, code: int) -> dict[str, dict[str, str]]:
    result = cli("doctor", "--json")
    assert result.code == code, result.err
    document = json.loads(result.out)
    assert document["ok"] == (code == 0)
    return {check["name"]: check for check in document["checks"]}


def test_all_is_well_here(cli: CLI) -> None:
    found = checks(cli, 0)
    assert {
        "python",
        "torch",
        "torchvision",
        "packages",
        "devices",
        "bf16",
        "threads",
        "disk for cache",
        "cache",
    } <= set(found)
    assert all(check["state"] != "fail" for check in found.values())
    shown = cli("doctor")
    assert shown.code == 0 and "everything that is needed works" in shown.out


def test_torchvision_of_another_torch_is_explained(cli: CLI, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, "torchvision", RuntimeError("operator torchvision::nms does not exist"))
    found = checks(cli, 1)["torchvision"]
    assert found["state"] == "fail" and "torchvision::nms" in found["found"]
    assert "built for another torch" in found["advice"] and "--force-reinstall torch torchvision" in found["advice"]
    shown = cli("doctor")
    assert shown.code == 1 and "1 of the checks failed" in shown.out and "built for another torch" in shown.out


def test_without_torch(cli: CLI, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, "torch", ImportError("No module named 'torch'"))
    monkeypatch.delitem(sys.modules, "torch")
    found = checks(cli, 1)
    assert "pip install torch torchvision" in found["torch"]["advice"] and "devices" not in found
    assert "cores" in found["threads"]["found"]


def test_an_old_torch(cli: CLI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["torch"], "__version__", "2.5.1+cpu")
    assert checks(cli, 1)["torch"]["state"] == "fail"


def test_little_disk_and_a_cache_that_cannot_be_written_are_notes(
    cli: CLI, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(doctor, "LEAST_DISK", 1e18)

    def refuse(*arguments: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    found = checks(cli, 0)
    assert found["cache"]["state"] == found["disk for cache"]["state"] == "note"
    assert "METADIFF_CACHE_DIR" in found["cache"]["advice"] and "METADIFF_DATA_DIR" in found["disk for data"]["advice"]
    assert all(check["advice"] for check in found.values() if check["state"] == "note")


def test_a_check_that_ends_in_an_error_is_a_finding(cli: CLI, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> Path:
        raise ConfigError("METADIFF_CACHE_DIR is a file", hint="give it a folder")

    monkeypatch.setattr(doctor, "cache_dir", refuse)
    found = checks(cli, 1)
    assert found["cache"]["found"] == "METADIFF_CACHE_DIR is a file" and found["cache"]["advice"] == "give it a folder"
    assert found["python"]["state"] == "ok"
