"""`metadiff cache`: only what metadiff named, only in its folder, and not without a yes."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from metadiff_cli.commands.look.cache import KINDS, clear, in_units
from metadiff_cli.console import Screen
from metadiff_cli.errors import ConfigError
from tests.worlds import Result

CLI = Callable[..., Result]
KEY = "0123456789abcdef" * 2
PERSONAL = {
    "images/holiday.jpg", f"images/{KEY}.jpg", f"images/{KEY}/photo.npy", f"images/{KEY}.npy.bak", "thesis.txt",
    "other/x", "features/notes.json", f"features/{KEY}-{KEY}.parts/notes.txt", f"encoders/{KEY}.pth",
    f"encoders/{KEY}/photo.jpg", f"graphs/{KEY}.onnx",
}  # fmt: skip


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with files of ours, and files of a person beside them."""
    root = tmp_path / "cache"
    for name in (f"images/{KEY}.npy", f"images/s{KEY[:31]}.json", f"images/{KEY}.npy.lock", f"images/.{KEY}.npy.x.tmp",
                 f"features/{KEY}-{KEY}.npy", f"features/{KEY}-{KEY}.parts/000000.npy", f"encoders/{KEY}.safetensors",
                 f"graphs/{KEY}-224.onnx", *PERSONAL):  # fmt: skip
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"12345")
    monkeypatch.setenv("METADIFF_CACHE_DIR", str(root))
    return root


def files(root: Path) -> set[str]:
    return {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()}


def test_list_counts_what_is_ours(cli: CLI, cache: Path) -> None:
    document = json.loads(cli("cache", "list", "--json").out)
    assert {row["kind"]: (row["files"], row["bytes"]) for row in document["kinds"]} == {
        "images": (4, 20), "features": (2, 10), "encoders": (1, 5), "graphs": (1, 5),
    }  # fmt: skip
    assert document["folder"] == str(cache)
    assert "20 B" in cli("cache", "list").out


def test_clear_leaves_everything_else(cli: CLI, cache: Path) -> None:
    assert cli("cache", "clear", "features", "--yes").code == 0
    assert f"encoders/{KEY}.safetensors" in files(cache) and f"features/{KEY}-{KEY}.npy" not in files(cache)
    assert cli("cache", "clear", "--yes").code == 0
    assert files(cache) == PERSONAL
    assert "nothing of" in cli("cache", "clear").err


@pytest.mark.parametrize(("answer", "code"), [("y\n", 0), ("n\n", 2), ("", 2)])
def test_clear_asks(cli: CLI, cache: Path, answer: str, code: int) -> None:
    before = files(cache)
    result = cli("cache", "clear", stdin=answer)
    assert result.code == code and result.out == "" and "Remove 40 B" in result.err
    assert files(cache) == (PERSONAL if code == 0 else before)


def test_a_closed_stdin_is_no_yes(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = files(cache)
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(ConfigError, match="nothing was removed"):
        clear([], Screen(), yes=False)
    assert files(cache) == before


def test_links_are_not_followed(cli: CLI, cache: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (outside / KEY).mkdir(parents=True)
    (outside / KEY / "photo.jpg").write_bytes(b"1")
    os.symlink(outside / KEY / "photo.jpg", cache / "images" / f"{'f' * 32}.npy")
    os.symlink(outside / KEY, cache / "images" / f"{'e' * 32}.npy")
    os.symlink(outside / KEY / "photo.jpg", cache / "features" / f"{KEY}-{KEY}.parts" / "000001.npy")
    for name in ("features", "encoders"):
        (cache / name).rename(cache / f"{name}-old")
        os.symlink(outside, cache / name)  # a whole kind that leads elsewhere
    assert cli("cache", "clear", "--yes").code == 0
    assert (outside / KEY / "photo.jpg").is_file()
    assert not list((cache / "images").glob(f"{'f' * 32}*")) and not list((cache / "images").glob(f"{'e' * 32}*"))


def test_a_cache_that_is_not_there_is_empty(cli: CLI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METADIFF_CACHE_DIR", str(tmp_path / "none"))
    assert cli("cache", "list").code == 0 and cli("cache", "clear", "--yes").code == 0
    assert not (tmp_path / "none").exists()


def test_unknown_kinds(cli: CLI, cache: Path) -> None:
    assert cli("cache", "clear", "everything", "--yes").code == 2


def test_real_files_are_known_as_ours(cli: CLI, small_run: Path) -> None:
    kinds = {row["kind"]: row["files"] for row in json.loads(cli("cache", "list", "--json").out)["kinds"]}
    root = Path(os.environ["METADIFF_CACHE_DIR"])
    assert kinds == {kind: sum(p.is_file() for p in (root / kind).rglob("*")) for kind in KINDS}
    assert all(count for kind, count in kinds.items() if kind != "graphs")  # the run is too small for one


def test_sizes_as_people_read_them() -> None:
    assert [in_units(n) for n in (0, 999, 1000, 1_500_000, 2e9, 3e12)] == [
        "0 B", "999 B", "1.0 kB", "1.5 MB", "2.0 GB", "3.0 TB",
    ]  # fmt: skip
