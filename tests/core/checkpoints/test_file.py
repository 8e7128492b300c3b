"""Checkpoint files: exact round trip, equal bytes, metadata in one order, nothing half-written, clear refusals."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from metadiff_cli.core.checkpoints import file as module
from metadiff_cli.core.checkpoints.file import KINDS, load_checkpoint, read_header, save_checkpoint
from metadiff_cli.errors import CheckpointError

TENSORS = {
    "a.x": torch.randn(3, 4),
    "a.y": torch.arange(5),
    "b": torch.randn(2, dtype=torch.float64).to(torch.bfloat16),
}
HEADER = {"classes": ["ß", "日本"], "metrics": {"z": 1.5, "a": None}}


def test_round_trip(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c.safetensors", "encoder", TENSORS, HEADER)
    back = load_checkpoint(tmp_path / "c.safetensors", "encoder")
    assert all(torch.equal(back.tensors[n], t) and back.tensors[n].dtype == t.dtype for n, t in TENSORS.items())
    assert {key: back.header[key] for key in HEADER} == HEADER
    assert set(back.part("a")) == {"x", "y"}


def test_equal_content_gives_equal_bytes(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "1", "encoder", TENSORS, HEADER)
    save_checkpoint(tmp_path / "2", "encoder", dict(reversed(TENSORS.items())), dict(reversed(HEADER.items())))
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_metadata_has_one_order(tmp_path: Path) -> None:
    """safetensors alone would take one of two orders by chance, anew for each file."""
    for number in range(10):
        save_checkpoint(tmp_path / str(number), "encoder", TENSORS, HEADER)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
    with safe_open(tmp_path / "0", framework="pt") as file:
        assert set(file.metadata()) == {"format", "metadiff"} and file.metadata()["format"] == "pt"
    assert (tmp_path / "0").read_bytes()[8:].startswith(b'{"__metadata__":{"format":"pt","metadiff":')


@pytest.mark.parametrize("text", ["", '"\\/', "\x00\x1f\x7f\n\t\b\f", "\u2028 \U0001f600 ß日", "x" * 10_000])
def test_sorting_keeps_odd_text_and_tensors(tmp_path: Path, text: str) -> None:
    save_checkpoint(tmp_path / "c", "encoder", {text or "a": torch.arange(7)}, {"note": text})
    back = load_checkpoint(tmp_path / "c")
    assert back.header["note"] == text and torch.equal(back.tensors[text or "a"], torch.arange(7))


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, "encoder", TENSORS, HEADER)
    before = path.read_bytes()

    def half(tensors: object, file: Path, metadata: object) -> None:
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_file", half)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(path, "encoder", TENSORS, HEADER)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]


def test_views_are_written_as_they_are(tmp_path: Path) -> None:
    whole = torch.randn(4, 6)
    save_checkpoint(tmp_path / "c", "state", {"view": whole[:, 1:3], "twin": whole}, {})
    assert torch.equal(load_checkpoint(tmp_path / "c").tensors["view"], whole[:, 1:3])


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "is empty"), (b"abc", "damaged"), (b"\x80\x04.", "pickle"), (b"PK\x03\x04....", "pickle"),
        (b"\xff" * 64, "damaged"), ((2).to_bytes(8, "little") + b"{}", "without a metadiff header"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\n", "git lfs pull"),
        ((20 << 20).to_bytes(8, "little") + b"{" + bytes(21 << 20), "longer"),
    ],
)  # fmt: skip
def test_other_files_are_told_apart(tmp_path: Path, content: bytes, told: str) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_header(tmp_path / "x")
    assert told in str(caught.value) and str(tmp_path / "x") in caught.value.message


def test_a_folder_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is a folder"):
        read_header(tmp_path)


def test_another_format_is_told_before_all_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as later:
        later.setattr(module, "FORMAT", 2)
        save_checkpoint(tmp_path / "c", "encoder", TENSORS, {"classes": "of another form"})
    with pytest.raises(CheckpointError, match="format 2"):
        read_header(tmp_path / "c")


def test_a_header_whose_length_looks_like_a_pickle_is_read(tmp_path: Path) -> None:
    """The first byte of a pickle is 0x80, and so is that of every 32nd safetensors file: its header's length."""
    path = tmp_path / "c.safetensors"
    for size in range(300):
        save_checkpoint(path, "encoder", {"a": torch.zeros(1)}, {"note": "x" * size})
        if path.read_bytes()[0] == 0x80:
            break
    assert path.read_bytes()[0] == 0x80
    assert load_checkpoint(path, "encoder").header["note"] == "x" * size


@pytest.mark.parametrize("found", KINDS)
@pytest.mark.parametrize("wanted", ["model", "classifier", "baseline"])
def test_a_file_of_another_kind_is_told_with_the_option_that_takes_it(tmp_path: Path, found: str, wanted: str) -> None:
    save_checkpoint(tmp_path / "c", found, {}, {})
    if found == wanted:
        assert load_checkpoint(tmp_path / "c", wanted).kind == wanted
        return
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path / "c", wanted)
    assert f"is {KINDS[found]}, not {KINDS[wanted]}" in caught.value.message
    assert caught.value.hint is not None and "`" in caught.value.hint
