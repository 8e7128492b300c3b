"""Configuration from strangers: any text gives a configuration or a ConfigError, within limits."""

import time
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from metadiff_cli.config.load import preset_folder, read_yaml, resolve
from metadiff_cli.config.schema import Config
from metadiff_cli.errors import ConfigError
from tests.fuzz.targets import config

KEYS = [
    "seed",
    "name",
    "data",
    "pretrain",
    "lr",
    "stages",
    "augment",
    "crop",
    "runtime",
    "glyphs",
    "denoiser",
    "x",
    "<<",
]
SCALARS = [
    "1", "-1", "0.5", ".inf", ".nan", "yes", "~", "''", "2001-99-99", "1:60:61", "0b1", "0x", "*a", "&a b", "9" * 5000,
    "!!int ''", "!!timestamp x", "!!bool x", "!!binary x", "!!python/name:os.system x",
]  # fmt: skip
LINES = st.tuples(st.integers(0, 3), st.sampled_from(KEYS), st.sampled_from(SCALARS) | st.text(max_size=8))


@settings(max_examples=150, deadline=None)
@given(st.lists(LINES, max_size=8))
def test_yaml_like_text(lines: list[tuple[int, str, str]]) -> None:
    config("\n".join(f"{'  ' * depth}{key}: {value}" for depth, key, value in lines).encode(errors="replace"))


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200) | st.text(alphabet="{}[]:,&*!|>-?# \n\t\"'%@`ab1.", max_size=60).map(str.encode))
def test_any_bytes(raw: bytes) -> None:
    config(raw)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 600), st.binary(max_size=6), st.booleans())
def test_a_damaged_preset(place: int, new: bytes, cut: bool) -> None:
    whole = (preset_folder() / "glyphs-5w1s.yaml").read_bytes()
    config(whole[:place] + new + (b"" if cut else whole[place + len(new) :]))


NUMBERS = st.integers(-(2**70), 2**70) | st.floats() | st.sampled_from([10**9, 10**6, 0, -1])
SECTIONS = {name: list(type(getattr(Config(), name)).model_fields) for name in
            ("data", "pretrain", "denoiser", "metatrain", "sampler", "evaluation", "runtime")}  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_number_anywhere(data: st.DataObject) -> None:
    section = data.draw(st.sampled_from(sorted(SECTIONS)))
    key = data.draw(st.sampled_from(SECTIONS[section]))
    value = data.draw(NUMBERS | st.lists(NUMBERS, max_size=3) | st.lists(st.lists(NUMBERS, max_size=3), max_size=2))
    config(yaml.safe_dump({section: {key: value}}).encode())


LAUGHS = "".join(f"{c}: &{c} [{', '.join([f'*{p}'] * 9)}]\n" for p, c in pairwise("abcdefghi"))
BOMBS = {
    "laughs": "a: &a [x]\n" + LAUGHS,
    "itself": "data: &a {data: *a}",
    "depth": "[" * 30_000,
    "size": "# " + "x" * 100_000,
    "digits": "seed: " + "9" * 50_000,
    "sexagesimal": "seed: " + ":".join(["59"] * 20_000),
    "binary": "seed: 0b" + "1" * 60_000,
    "two documents": "seed: 1\n---\nseed: 2",
    "objects": "seed: !!python/object/apply:os.system ['true']",
    "glyphs": "data: {size: 1024, glyphs: {train: 100000, images_per_class: 100000}}",
    "width": "denoiser: {width: 1000000000}",
    "stages": "pretrain: {stages: [[1.0, -5]]}",
    "backwards": "metatrain: {ways: [9, 2]}",
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_soon(tmp_path: Path, name: str) -> None:
    (tmp_path / "c.yaml").write_text(BOMBS[name])
    started = time.process_time()
    with pytest.raises(ConfigError) as caught:
        resolve(file=tmp_path / "c.yaml", environ={})
    assert time.process_time() - started < 3 and len(caught.value.message) < 1500


def test_a_device_without_end_is_too_large() -> None:
    with pytest.raises(ConfigError, match="larger than"):
        read_yaml(Path("/dev/zero"))


def test_a_few_aliases_are_fine(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("pretrain: {augment: {crop: &c [0.5, 1.0]}}\nmetatrain: {ways: [2, 3]}\n")
    assert resolve(file=tmp_path / "c.yaml", environ={}).pretrain.augment.crop == (0.5, 1.0)
    (tmp_path / "d.yaml").write_text("seed: &s 3\nevaluation: {shot: *s, query: *s}\n")
    assert resolve(file=tmp_path / "d.yaml", environ={}).evaluation.shot == 3


def test_endless_keys_are_refused() -> None:
    with pytest.raises(ConfigError, match="unknown key"):
        resolve(settings=["." * 3000 + "=1"] * 2, environ={})
