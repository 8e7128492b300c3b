"""The checkpoint reader on hostile files: success or CheckpointError, and no memory for what a header merely claims."""

import copy
import json
import resource
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metadiff_cli.core.checkpoints.file import read_header
from metadiff_cli.errors import CheckpointError, MetaDiffError
from tests.fuzz.targets import checkpoint, read_any, small_classifier
from tests.worlds import small_model

KEY, METADATA = "metadiff", "__metadata__"


class Sound:
    """A sound checkpoint in its parts: the safetensors header, ours inside it, and the tensors' bytes."""

    def __init__(self, path: Path) -> None:
        self.raw = path.read_bytes()
        length = int.from_bytes(self.raw[:8], "little")
        self.outer: dict[str, Any] = json.loads(self.raw[8 : 8 + length])
        self.inner: dict[str, Any] = json.loads(self.outer[METADATA][KEY])
        self.body = self.raw[8 + length :]

    def bytes(self, outer: Any = None, inner: Any = None, body: bytes | None = None) -> bytes:
        outer = dict(self.outer if outer is None else outer)
        if inner is not None:
            outer[METADATA] = {KEY: json.dumps(inner)}
        head = json.dumps(outer).encode()
        return len(head).to_bytes(8, "little") + head + (self.body if body is None else body)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Sound:
    return Sound(small_model(tmp_path_factory.mktemp("sound") / "model.safetensors"))


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Sound:
    return Sound(small_classifier(tmp_path_factory.mktemp("sound") / "classifier.safetensors"))


ODD = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=6),
    st.just([]), st.just({}), st.just([[[]]]), st.just({"a": {}}), st.just(["F32", -1]), st.just("x" * 5000),
)  # fmt: skip


def places(value: Any, before: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The ways to everything inside a JSON value."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [before, *(place for key in keys for place in places(value[key], (*before, key)))]


def replaced(value: Any, place: tuple[Any, ...], new: Any, drop: bool) -> Any:
    """A copy with the thing at `place` changed or left out."""
    changed = copy.deepcopy(value)
    if not place:
        return new
    inner = changed
    for key in place[:-1]:
        inner = inner[key]
    if drop and isinstance(inner, dict):
        del inner[place[-1]]
    else:
        inner[place[-1]] = new
    return changed


def test_the_sound_ones_are_read(sound: Sound, classifier: Sound, tmp_path: Path) -> None:
    for whole in (sound, classifier):
        (tmp_path / "x").write_bytes(whole.bytes(inner=whole.inner))
        read_any(tmp_path / "x")


def test_a_classifier_with_a_scale_or_names_that_are_none_is_refused(classifier: Sound, tmp_path: Path) -> None:
    odd: tuple[tuple[tuple[Any, ...], Any], ...] = (
        (("settings", "scale"), float("inf")), (("settings", "guidance"), "4"), (("support", 0), 7),
        (("support",), "abcd"),
    )  # fmt: skip
    for place, value in odd:
        (tmp_path / "x").write_bytes(classifier.bytes(inner=replaced(classifier.inner, place, value, drop=False)))
        with pytest.raises(CheckpointError):
            read_any(tmp_path / "x")


@settings(max_examples=100, deadline=None)
@given(data=st.data(), new=ODD, drop=st.booleans())
def test_any_change_of_our_header(sound: Sound, data: st.DataObject, new: Any, drop: bool) -> None:
    place = data.draw(st.sampled_from(places(sound.inner)))
    checkpoint(sound.bytes(inner=replaced(sound.inner, place, new, drop)))


@settings(max_examples=60, deadline=None)
@given(data=st.data(), new=ODD, drop=st.booleans())
def test_any_change_of_a_classifier(classifier: Sound, data: st.DataObject, new: Any, drop: bool) -> None:
    place = data.draw(st.sampled_from([place for place in places(classifier.inner) if place[:1] != ("tuning",)]))
    checkpoint(classifier.bytes(inner=replaced(classifier.inner, place, new, drop)))


@settings(max_examples=200, deadline=None)
@given(data=st.data(), new=ODD, drop=st.booleans())
def test_any_change_of_the_tensors_entries(sound: Sound, data: st.DataObject, new: Any, drop: bool) -> None:
    place = data.draw(st.sampled_from(places(sound.outer)))
    changed = replaced(sound.outer, place, new, drop)
    if isinstance(changed, dict):
        checkpoint(sound.bytes(outer=changed))


@settings(max_examples=200, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), new=st.binary(max_size=12), cut=st.booleans())
def test_any_damage_of_the_bytes(sound: Sound, place: float, new: bytes, cut: bool) -> None:
    start = int(place * 4000) if place < 0.9 else int(place * len(sound.raw))  # most of it where the header is
    rest = b"" if cut else sound.raw[start + len(new) :]
    checkpoint(sound.raw[:start] + new + rest)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300), st.integers(0, 2**64 - 1) | st.integers(0, 300))
def test_any_bytes(raw: bytes, length: int) -> None:
    checkpoint(raw)
    checkpoint(length.to_bytes(8, "little") + raw)


@settings(max_examples=100, deadline=None)
@given(st.recursive(ODD, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3)))
def test_any_header(sound: Sound, inner: Any) -> None:
    for kind in ("model", "encoder", "classifier", "state"):
        checkpoint(
            sound.bytes(inner={**(inner if isinstance(inner, dict) else {"x": inner}), "kind": kind, "format": 1})
        )


BOMBS: dict[str, Any] = {
    "shape": {"t": {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 4]}},
    "overflow": {"t": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 0]}},
    "negative": {"t": {"dtype": "F32", "shape": [-1, -4], "data_offsets": [0, 16]}},
    "offsets": {"t": {"dtype": "F32", "shape": [4], "data_offsets": [2**60, 2**60 + 16]}},
    "dtype": {"t": {"dtype": "F4096", "shape": [4], "data_offsets": [0, 16]}},
    "dimensions": {"t": {"dtype": "U8", "shape": [1] * 60, "data_offsets": [0, 1]}},
    "true": {"t": {"dtype": "U8", "shape": [True], "data_offsets": [0, 1]}},
    "name": {"n" * 100_000: {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}},
    "control": {"a\x1b[2J": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}},
    "overlap": {n: {"dtype": "U8", "shape": [16], "data_offsets": [0, 16]} for n in ("a", "b")},
    "gap": {"t": {"dtype": "U8", "shape": [8], "data_offsets": [8, 16]}},
    "rest": {"t": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}},
    "metadata": {METADATA: {KEY: {"deep": 1}}},
    "many": {f"t{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(60_000)},
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_and_take_no_memory(sound: Sound, tmp_path: Path, name: str) -> None:
    (tmp_path / "x").write_bytes(sound.bytes(outer={METADATA: sound.outer[METADATA], **BOMBS[name]}, body=bytes(16)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError) as caught:
        read_header(tmp_path / "x")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kilobytes
    assert len(caught.value.message) < 1000 and "\x1b" not in caught.value.message


HEADERS: dict[str, dict[tuple[Any, ...], Any]] = {
    "a denoiser of terabytes": {("denoiser", "width"): 16_384},
    "a denoiser beyond the limits": {("denoiser", "width"): 10**9},
    "a huge image": {("image", "size"): 10**6},
    "a scale that overflows": {("tuning", "scale", "values"): [[1e5]]},
    "no number": {("tuning", "guidance"): "1"},
    "not finite": {("image", "mean"): [float("nan")] * 3},
    "no deviation": {("image", "std"): [0, 1, 1]},
    "names that are none": {("classes",): [1, {}]},
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_that_ask_for_too_much(sound: Sound, tmp_path: Path, name: str) -> None:
    inner = sound.inner
    for place, value in HEADERS[name].items():
        inner = replaced(inner, place, value, drop=False)
    (tmp_path / "x").write_bytes(sound.bytes(inner=inner))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(MetaDiffError):
        read_any(tmp_path / "x")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 5000 + "1" + "}" * 5000, "9" * 10_000, '{"kind": 1, "kind": 2}']
)
def test_configuration_bombs_in_the_header(sound: Sound, tmp_path: Path, text: str) -> None:
    outer = {**sound.outer, METADATA: {KEY: text}}
    (tmp_path / "x").write_bytes(sound.bytes(outer=outer))
    with pytest.raises(CheckpointError):
        read_header(tmp_path / "x")


def test_a_sparse_giant_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "x").open("wb") as file:
        size = 2**40
        head = json.dumps({"t": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
        file.write(len(head).to_bytes(8, "little") + head)
        file.truncate(8 + len(head) + size)
    with pytest.raises(CheckpointError, match="GB"):
        read_header(tmp_path / "x")
