"""Bad input: every case has a message that names the thing and the next step, and the exit code of the design."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from metadiff_cli import files
from metadiff_cli.commands.look import inspect
from metadiff_cli.core.checkpoints.file import load_checkpoint, save_checkpoint
from tests.worlds import COLOURS, Result, paint

CLI = Callable[..., Result]


def assert_refused(result: Result, code: int, *words: str) -> None:
    assert result.code == code, result.err
    assert result.out == ""
    assert "Traceback" not in result.err
    for word in (*words, "try:"):
        assert word in result.err, result.err


def test_missing_folder(cli: CLI, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    result = cli("pretrain", "--data", tmp_path / "fotos", "--out", tmp_path / "run")
    assert_refused(result, 3, "fotos does not exist", f"did you mean {tmp_path / 'photos'}?")
    assert not (tmp_path / "run").exists()  # the next try, with the right name, is not told of its remains


def test_missing_data_set(cli: CLI, tmp_path: Path) -> None:
    result = cli("metatrain", "--preset", "mini-5w1s", "--out", tmp_path / "run")
    assert_refused(result, 3, "data set mini-imagenet is not in", "--data DIR", "metadiff data prepare mini-imagenet")
    assert_refused(cli("metatrain", "--out", tmp_path / "run"), 3, "no data set was given", "--preset")
    assert not (tmp_path / "run").exists()


def test_classes_that_are_not_there(cli: CLI, photos: Path) -> None:
    result = cli("evaluate", "--data", photos / "support", "--split", "train")
    assert result.code == 3 and "has no train classes" in result.err and "from 6 classes on" in result.err


def test_missing_configuration(cli: CLI, tmp_path: Path) -> None:
    assert_refused(cli("config", "show", "--config", tmp_path / "my.yaml"), 2, "my.yaml does not exist", "presets copy")


def test_missing_support(cli: CLI, photos: Path, checkpoint: Path) -> None:
    result = cli("adapt", "-S", photos / "suport", "-Q", photos / "query", "-c", checkpoint)
    assert_refused(result, 3, "suport does not exist", f"did you mean {photos / 'support'}?", "--support")


def test_empty_class(cli: CLI, photos: Path, checkpoint: Path) -> None:
    (photos / "support" / "void").mkdir()
    result = cli("adapt", "-S", photos / "support", "-Q", photos / "query", "-c", checkpoint)
    assert_refused(result, 3, "'void'", "no images")


def test_one_class_only(cli: CLI, tmp_path: Path, checkpoint: Path) -> None:
    paint(tmp_path / "support" / "only" / "1.png", COLOURS["red"], seed=0)
    paint(tmp_path / "q.png", COLOURS["red"], seed=1)
    result = cli("adapt", "-S", tmp_path / "support", "-Q", tmp_path / "q.png", "-c", checkpoint)
    assert_refused(result, 3, "'only'")


def test_too_few_images_for_the_episodes(cli: CLI, checkpoint: Path) -> None:
    result = cli("evaluate", "-c", checkpoint, "--shot", "5", "--query", "15")
    assert_refused(result, 3, "5-way 5-shot", "15 queries", "classes of 20 images", "0 of 8", "--query")


def test_too_few_classes_for_the_way(cli: CLI, checkpoint: Path) -> None:
    assert_refused(cli("evaluate", "-c", checkpoint, "--way", "50", "--query", "3"), 3, "50", "8", "--way")


def test_a_class_of_files_that_are_no_images(cli: CLI, photos: Path, checkpoint: Path) -> None:
    for path in (photos / "support" / "green").iterdir():
        path.write_bytes(b"this is text")
    result = cli("adapt", "-S", photos / "support", "-Q", photos / "query", "-c", checkpoint)
    assert_refused(result, 3, "'green'", "can be read")


def test_broken_training_images_are_named_and_counted(cli: CLI, tmp_path: Path) -> None:
    for split in ("train", "val"):
        for c in range(5):
            for i in range(4):
                paint(tmp_path / "set" / split / f"{split}{c}" / f"{i}.png", (50 * c, 90, 200), seed=9 * c + i)
    (tmp_path / "set" / "train" / "train1" / "broken.png").write_bytes(b"x")
    result = cli("pretrain", "--data", tmp_path / "set", "--out", tmp_path / "run", "--set", "data.size=16",
                 "--epochs", "1", "--set", "pretrain.batch=4")  # fmt: skip
    assert result.code == 0, result.err
    assert "broken.png" in result.err and "1 of 21 train images" in result.err


def test_unknown_preset(cli: CLI, tmp_path: Path) -> None:
    result = cli("metatrain", "--preset", "glyphs-5w1", "--out", tmp_path / "run")
    assert_refused(result, 2, "glyphs-5w1", "did you mean 'glyphs-5w1s'")
    assert_refused(cli("metatrain", "--preset", "", "--out", tmp_path / "run"), 2, "unknown preset ''")


def test_unknown_keys_are_reported_together(cli: CLI, tmp_path: Path) -> None:
    result = cli("metatrain", "--preset", "glyphs-5w1s", "--out", tmp_path / "run", "--set", "pretrain.epoch=3",
                 "--set", "metatrain.steps=-1")  # fmt: skip
    assert_refused(result, 2, "pretrain.epoch", "did you mean 'pretrain.epochs'", "metatrain.steps")
    assert not (tmp_path / "run").exists()


UNKNOWN = [
    ("--controls", "magic", "magic"),
    ("--split", "best", "best"),
    ("--device", "tpu", "tpu"),
    ("--guidance", "x", "auto"),
]


@pytest.mark.parametrize(("flag", "value", "word"), UNKNOWN)
def test_unknown_values(cli: CLI, checkpoint: Path, flag: str, value: str, word: str) -> None:
    assert_refused(cli("evaluate", "-c", checkpoint, flag, value), 2, word)


def test_usage_errors_are_exit_code_2(cli: CLI) -> None:
    assert cli("evaluate", "--episodes", "0").code == 2
    assert cli("adapt").code == 2
    assert cli("nonsense").code == 2


def test_missing_checkpoint(cli: CLI, tmp_path: Path) -> None:
    assert_refused(cli("evaluate", "-c", tmp_path / "no.safetensors"), 4, "no.safetensors", "does not exist")


def test_checkpoint_of_another_kind(cli: CLI, small_run: Path) -> None:
    result = cli("evaluate", "-c", small_run / "encoder.safetensors")
    assert_refused(result, 4, "an encoder", "a full model", "metatrain")


def test_checkpoint_of_another_version(cli: CLI, checkpoint: Path, tmp_path: Path) -> None:
    kept = load_checkpoint(checkpoint)
    with safe_open(checkpoint, framework="pt") as file:
        header = json.loads(file.metadata()["metadiff"])
    header["format"] = 99
    save_file(kept.tensors, tmp_path / "new.safetensors", metadata={"metadiff": json.dumps(header)})
    assert_refused(cli("evaluate", "-c", tmp_path / "new.safetensors"), 4, "format 99", "install")


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5])
def test_truncated_checkpoint(cli: CLI, checkpoint: Path, tmp_path: Path, keep: float) -> None:
    whole = checkpoint.read_bytes()
    cut = whole[: int(keep if isinstance(keep, int) else keep * len(whole))]
    (tmp_path / "cut.safetensors").write_bytes(cut)
    assert_refused(cli("evaluate", "-c", tmp_path / "cut.safetensors"), 4, "cut.safetensors", "truncated")


def test_a_pickle_under_our_extension_is_not_opened(cli: CLI, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "exploded",))  # type: ignore[return-value]

    (tmp_path / "evil.safetensors").write_bytes(pickle.dumps(Bomb()))
    torch.save({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    for name in ("evil", "model"):
        assert_refused(cli("evaluate", "-c", tmp_path / f"{name}.safetensors"), 4, "pickle")
    assert not (tmp_path / "exploded").exists()


def test_foreign_safetensors(cli: CLI, tmp_path: Path) -> None:
    save_file({"x": torch.zeros(3)}, tmp_path / "foreign.safetensors")
    assert_refused(cli("inspect", tmp_path / "foreign.safetensors"), 4, "without a metadiff header")


def test_tensors_that_do_not_fit_the_header(cli: CLI, checkpoint: Path, tmp_path: Path) -> None:
    kept = load_checkpoint(checkpoint)
    tensors = {**kept.tensors, "encoder.blocks.0.conv.weight": torch.zeros(1)}
    save_checkpoint(tmp_path / "odd.safetensors", "model", tensors, kept.header)
    assert_refused(cli("evaluate", "-c", tmp_path / "odd.safetensors"), 4, "does not hold what its header says")


def test_support_and_classifier_exclude_each_other(cli: CLI, photos: Path) -> None:
    assert_refused(cli("adapt", "-Q", photos / "query"), 2, "--support")


def test_a_missing_packaged_checkpoint_is_said(
    cli: CLI, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "PACKAGED", tmp_path / "gone.safetensors")
    result = cli("adapt", "--support", photos / "support", "--query", photos / "query")
    assert_refused(result, 4, "gone.safetensors", "metatrain")


def test_no_query_images(cli: CLI, photos: Path, checkpoint: Path) -> None:
    (photos / "empty").mkdir()
    assert_refused(cli("adapt", "-S", photos / "support", "-Q", photos / "empty", "-c", checkpoint), 3, "--query")


def failing(error: BaseException) -> Callable[..., None]:
    """A function that raises `error`, in the place of one that reads a checkpoint."""

    def fail(*arguments: object) -> None:
        raise error

    return fail


def test_an_unforeseen_error_is_one_line(cli: CLI, monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> None:
    monkeypatch.setattr(inspect, "read_header", failing(RuntimeError("boom")))
    result = cli("inspect", checkpoint)
    assert result.code == 1 and "boom" in result.err and "METADIFF_DEBUG=1" in result.err


def test_an_interrupt_is_exit_code_130(cli: CLI, monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> None:
    monkeypatch.setattr(inspect, "read_header", failing(KeyboardInterrupt()))
    assert cli("inspect", checkpoint).code == 130
