"""Where files are, and that nothing of a user's is lost when one is written."""

import os
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from metadiff_cli import files
from metadiff_cli.errors import ConfigError
from metadiff_cli.files import LEFTOVER, atomic, cache_dir, copy_file, data_dir, sweep, write_text
from tests.processes import ROOT, as_plain_user


@pytest.mark.parametrize("variable", ["METADIFF_CACHE_DIR", "METADIFF_DATA_DIR"])
def test_a_variable_moves_a_folder_and_is_refused_if_it_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    def folder() -> Path:
        return cache_dir() if "CACHE" in variable else data_dir("x").parent

    monkeypatch.setenv(variable, str(tmp_path / "new"))
    assert folder() == tmp_path / "new"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(variable, "~/mine")
    assert folder() == tmp_path / "mine"
    (tmp_path / "file").touch()
    for value, told in (("", "is empty"), (" ", "is empty"), (str(tmp_path / "file"), "not a folder")):
        monkeypatch.setenv(variable, value)
        with pytest.raises(ConfigError, match=f"{variable} .*{told}") as caught:
            folder()
        assert caught.value.exit_code == 2 and caught.value.hint


def test_without_a_home_there_is_a_temporary_folder_and_a_notice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def homeless(name: str) -> Path:
        raise RuntimeError("could not determine the home directory")

    monkeypatch.setattr(files.tempfile, "tempdir", str(tmp_path))
    for variable in ("METADIFF_CACHE_DIR", "METADIFF_DATA_DIR"):
        monkeypatch.delenv(variable)
    assert files.without_home() is None
    monkeypatch.setattr(files.platformdirs, "user_cache_path", homeless)
    monkeypatch.setattr(files.platformdirs, "user_data_path", homeless)
    assert tmp_path in cache_dir().parents and tmp_path in data_dir("x").parents
    assert cache_dir() == cache_dir() and str(tmp_path) in str(files.without_home())


def test_a_user_without_a_name_and_a_home_can_run_commands() -> None:
    if os.geteuid() != 0 or not shutil.which("setpriv"):
        pytest.skip("only root can become a user without a name, by setpriv")
    rights = "+dac_override"  # Python and the package may lie where only root can read
    nameless = ["--reuid=54321", "--regid=54321", "--clear-groups", f"--inh-caps={rights}", f"--ambient-caps={rights}"]
    env = {key: value for key, value in os.environ.items() if key != "HOME" and not key.startswith("METADIFF_")}
    done = subprocess.run(
        ["setpriv", *nameless, sys.executable, "-m", "metadiff_cli", "cache", "list"], capture_output=True, text=True,
        cwd=ROOT, env=env,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "there is no home folder" in done.stderr and "METADIFF_CACHE_DIR" in done.stderr


def test_a_link_stays_and_its_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("old")
    (tmp_path / "link").symlink_to(Path("there") / "file")
    (tmp_path / "dangling").symlink_to(Path("there") / "new")
    for name, target in (("link", "file"), ("dangling", "new")):
        write_text(tmp_path / name, "new")
        assert (tmp_path / name).is_symlink() and (tmp_path / "there" / target).read_text() == "new"
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["dangling", "file", "link", "new", "there"]


def test_a_replaced_file_keeps_its_permissions_and_a_new_one_has_the_usual(tmp_path: Path) -> None:
    private, new = tmp_path / "private", tmp_path / "new"
    private.write_text("old")
    private.chmod(0o600)
    for path in (private, new):
        write_text(path, "text")
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    assert stat.S_IMODE(new.stat().st_mode) == files.usual_mode()


def test_a_read_only_file_is_copied_by_a_plain_user() -> None:
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        place.chmod(0o777)
        (place / "a").write_text("old")
        (place / "a").chmod(0o444)
        as_plain_user(lambda: copy_file(place / "a", place / "b"))
        assert (place / "b").read_text() == "old" and stat.S_IMODE((place / "b").stat().st_mode) == 0o444


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_or_a_device_is_written_to_and_stays(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()))
    reader.start()
    write_text(tmp_path / "pipe", "text")
    reader.join()
    assert read == ["text"] and stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    write_text(Path(os.devnull), "text")
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)
    assert [p.name for p in tmp_path.iterdir()] == ["pipe"]


def test_folders_and_taken_names_are_errors_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(IsADirectoryError, match="folder"), atomic(tmp_path / "folder"):
        pytest.fail("it was begun")
    for name in ("file", "link"):
        with pytest.raises(FileExistsError, match=name), atomic(tmp_path / name, new=True):
            pytest.fail("it was begun")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(OSError, match="full") as caught, atomic(tmp_path / "file") as temporary:
        temporary.write_text("half")
        raise OSError(28, "full")
    assert caught.value.filename == str(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_sweeping_takes_what_writers_leave_and_nothing_of_a_user(tmp_path: Path) -> None:
    with atomic(tmp_path / "file") as temporary:
        assert LEFTOVER.fullmatch(temporary.name)
        left = temporary.with_name(f".other.{temporary.name.split('.')[-2]}.tmp")
        left.touch()
    mine = [".notes.tmp", ".tmp", "x.tmp", ".a.b.tmp", ".tmp-notes", ".config.yaml.swp"]
    for name in mine:
        (tmp_path / name).touch()
    sweep(tmp_path, "file")
    assert left.exists()
    sweep(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"file", *mine}


def test_names_that_are_no_text_are_written_as_escapes(tmp_path: Path) -> None:
    write_text(tmp_path / "file", '{"path": "caf\udce9"}')
    assert (tmp_path / "file").read_bytes() == b'{"path": "caf\\udce9"}'
