"""Run directories: whose they are, what --overwrite removes, and what it never touches."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from metadiff_cli.commands.train.run_folder import DEPENDS, LOCK, OURS, depends, is_run, open_run
from metadiff_cli.config.load import resolve
from metadiff_cli.errors import ConfigError, DataError
from tests.worlds import SMALL, Result, paint

CLI = Callable[..., Result]
CONFIG = resolve("glyphs-5w1s", environ={})
PRETRAIN = ["pretrain", "--preset", "glyphs-5w1s", "--seed", "8", *SMALL]


def photos(folder: Path, classes: int = 6, images: int = 4) -> Path:
    for c in range(classes):
        for i in range(images):
            paint(folder / f"class-{c}" / f"{i}.png", (40 * c, 200 - 30 * c, 90), seed=10 * c + i, size=16)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_that_failed_at_once_is_tried_again_without_a_flag(tmp_path: Path) -> None:
    out = tmp_path / "run"

    def fail() -> None:
        with open_run(out, "metatrain", CONFIG, overwrite=False, resume=False) as run:
            run.begin(CONFIG)
            raise DataError("no weights")

    for _ in range(2):
        with pytest.raises(DataError, match="no weights"):
            fail()
    own = (out / "config.yaml").read_text() + "# of a person\n"
    (out / "config.yaml").write_text(own)
    with pytest.raises(ConfigError, match="is not empty"):
        fail()
    assert (out / "config.yaml").read_text() == own


@pytest.mark.parametrize("flag", ["--overwrite", "--resume"])
@pytest.mark.parametrize("own", ["", "name: mine\n", "# settings of a camera\n"])
def test_a_folder_with_any_config_is_no_run(flag: str, own: str, tmp_path: Path, cli: CLI) -> None:
    """The folder of the report: photos, notes, a config.yaml of something else."""
    photos(tmp_path / "p" / "photos")
    (tmp_path / "p" / "config.yaml").write_text(own)
    (tmp_path / "p" / "notes.txt").write_text("years of work")
    before = contents(tmp_path / "p")
    refused = cli("pretrain", "--data", tmp_path / "p" / "photos", "--out", tmp_path / "p", flag)
    assert refused.code == 2 and "no run directory" in refused.err
    assert contents(tmp_path / "p") == before


def test_overwriting_removes_the_files_of_a_run_alone(tmp_path: Path, cli: CLI) -> None:
    out = tmp_path / "run"
    assert cli(*PRETRAIN, "--out", out).code == 0
    (out / "state.safetensors").write_text("of an earlier metatrain")
    (out / ".result.json.abcd_123.tmp").write_text("begun and killed")
    for name in ("notes.txt", "photos/cat/1.jpg", ".thesis.tex.backup.tmp", "checkpoint.safetensors.old"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("mine")
    again = cli(*PRETRAIN, "--set", "pretrain.epochs=1", "--out", out, "--overwrite")
    assert again.code == 0, again.err
    assert "checkpoint.safetensors.old, notes.txt, photos" in again.err
    assert not (out / "state.safetensors").exists() and not (out / ".result.json.abcd_123.tmp").exists()
    for name in ("notes.txt", "photos/cat/1.jpg", ".thesis.tex.backup.tmp", "checkpoint.safetensors.old"):
        assert (out / name).read_text() == "mine"


@pytest.mark.parametrize("what", ["the working folder", "below it", "home", "data", "config", "encoder", "repository"])
def test_overwriting_reaches_no_input_and_no_place_of_the_person(
    what: str, tmp_path: Path, cli: CLI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where the folder is a run directory."""
    out, more, data = tmp_path / "run", [], ["--preset", "glyphs-5w1s", *SMALL]
    assert cli(*PRETRAIN, "--out", out).code == 0
    (out / "sub").mkdir()
    if what == "the working folder":
        monkeypatch.chdir(out)
    elif what == "below it":
        monkeypatch.chdir(out / "sub")
    elif what == "home":
        monkeypatch.setenv("HOME", str(out / "sub"))
    elif what == "data":
        data = ["--data", str(photos(out / "sub" / "photos")), "--set", "pretrain.epochs=1"]
    elif what == "config":
        more = ["--config", str(out / "config.yaml")]
    elif what == "encoder":
        more = ["--init-from", str(out / "encoder.safetensors")]
    else:
        (out / ".git").mkdir()
    before = contents(out)
    refused = cli("pretrain", *data, *more, "--out", Path() if what == "the working folder" else out, "--overwrite")
    assert refused.code == 2 and "--overwrite would reach" in refused.err
    assert contents(out) == before


@pytest.mark.parametrize("arguments", [
    ["--data", "gone"],
    ["--data", "empty"],
    ["--data", "broken"],
    ["--init-from", "gone.safetensors"],
    ["--init-from", "broken.safetensors"],
    ["--device", "cuda:99"],
])  # fmt: skip
def test_nothing_is_removed_before_all_inputs_were_opened(arguments: list[str], tmp_path: Path, cli: CLI) -> None:
    out = tmp_path / "run"
    assert cli(*PRETRAIN, "--out", out).code == 0
    before = contents(out)
    (tmp_path / "empty").mkdir()
    for path in photos(tmp_path / "broken").rglob("*.png"):
        path.write_bytes(b"no image")
    (tmp_path / "broken.safetensors").write_bytes(b"no checkpoint")
    flag, name = arguments
    given = [flag, name if flag == "--device" else tmp_path / name]
    data = [] if flag == "--data" else PRETRAIN[1:]
    failed = cli("pretrain", *data, *given, "--out", out, "--overwrite")
    assert failed.code in (2, 3, 4), failed.err
    assert contents(out) == before


def test_a_damaged_encoder_or_library_weights_remove_nothing(small_run: Path, tmp_path: Path, cli: CLI) -> None:
    out = tmp_path / "run"
    shutil.copytree(small_run, out)
    before = contents(out)
    (tmp_path / "broken.safetensors").write_bytes(b"no checkpoint")
    broken = tmp_path / "broken.safetensors"
    for more in (["--encoder", broken], ["--encoder", "torchvision:squeezenet1_1", "--encoder-weights", broken]):
        failed = cli("metatrain", "--preset", "glyphs-5w1s", *SMALL, *more, "--out", out, "--overwrite")
        assert failed.code in (2, 4), failed.err
        assert contents(out) == before


def test_what_a_training_depends_on() -> None:
    for stage, prefixes in DEPENDS.items():
        keys = depends(CONFIG, stage)
        assert all(any(f"{key}.".startswith(f"{prefix}.") for key in keys) for prefix in prefixes)  # none is misspelt
    never = ("card", "runtime", "sampler", "evaluation.episodes", "evaluation.card_shots", "name")
    assert not [key for key in depends(CONFIG, *DEPENDS) if key.startswith(never)]
    assert depends(CONFIG, "metadiff", init=None)["init"] == "none"


def test_a_run_knows_its_files(tmp_path: Path, small_run: Path) -> None:
    assert is_run(small_run) and not is_run(tmp_path) and not is_run(tmp_path / "gone")
    assert {path.name for path in small_run.iterdir()} <= {*OURS, LOCK}
