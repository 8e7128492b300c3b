"""`metadiff inspect`: checkpoints, results and manifests; everything else is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.worlds import Result

CLI = Callable[..., Result]


def test_a_checkpoint_is_shown_with_its_card(cli: CLI, checkpoint: Path) -> None:
    shown = cli("inspect", checkpoint)
    assert shown.code == 0 and shown.out.startswith("summary: ")
    assert "kind: model" in shown.out and "classes: '12: " in shown.out
    document = json.loads(cli("inspect", checkpoint, "--json").out)
    assert document["file"] == str(checkpoint) and len(document["classes"]) == 12


def test_an_encoder_and_a_result_are_shown(cli: CLI, small_run: Path) -> None:
    assert "kind: encoder" in cli("inspect", small_run / "encoder.safetensors").out
    result = cli("inspect", small_run / "result.json")
    assert result.code == 0 and "kind: result" in result.out and "split: test" in result.out


OTHERS = {
    "a.json": "{",
    "b.json": "[1]",
    "c.json": '{"schema": "other/1"}',
    "deep.json": "[" * 100_000,
    "empty.json": "",
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_documents_are_refused(cli: CLI, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(OTHERS[name])
    result = cli("inspect", tmp_path / name)
    assert result.code == 3 and name in result.err and "try:" in result.err and result.out == ""


def test_other_files_are_refused_with_what_is_read(cli: CLI, small_run: Path, tmp_path: Path) -> None:
    (tmp_path / "graph.onnx").touch()
    for file in (small_run / "metrics.csv", small_run / "config.yaml", tmp_path / "graph.onnx"):
        result = cli("inspect", file)
        assert result.code == 4 and f"{file} is not a file that inspect reads" in result.err
        assert "try: give a .safetensors file" in result.err
    assert "does not exist" in cli("inspect", tmp_path / "gone.safetensors").err
    assert cli("inspect", tmp_path / "gone.json").code == 3


def test_a_folder_is_answered_with_a_file_in_it(cli: CLI, small_run: Path, tmp_path: Path) -> None:
    run = cli("inspect", small_run)
    assert run.code == 4 and "is a folder" in run.err and f"such as {small_run / 'checkpoint.safetensors'}" in run.err
    assert "is a folder" in cli("inspect", tmp_path).err


def test_a_damaged_file_is_named(cli: CLI, checkpoint: Path, tmp_path: Path) -> None:
    for keep in (0, 7, 300):
        (tmp_path / "cut.safetensors").write_bytes(checkpoint.read_bytes()[:keep])
        result = cli("inspect", tmp_path / "cut.safetensors")
        assert result.code == 4 and "cut.safetensors" in result.err and "try:" in result.err and result.out == ""
