"""Encoding by onnxruntime: the features of torch, from a graph that is made once."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from metadiff_cli.core.encoders import graphs
from metadiff_cli.core.encoders.graphs import Graphs
from metadiff_cli.core.encoders.image_encoder import ImageEncoder
from metadiff_cli.errors import ConfigError, MetaDiffError
from tests.worlds import small_encoder

PIXELS = torch.randint(0, 256, (3, 28, 28, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def encoder() -> ImageEncoder:
    return small_encoder(28, "resnet10", views=6)


def test_features_are_those_of_torch_and_graphs_are_made_once(encoder: ImageEncoder, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed; it is the extra [fast]")
    fast = replace(encoder, graphs=Graphs(encoder.encoder, tmp_path / "graphs"))
    assert fast.graphs is not None and not fast.graphs.made(encoder.sides)
    cosines = torch.nn.functional.cosine_similarity(fast.encode(PIXELS), encoder.encode(PIXELS), dim=1)
    assert bool((cosines > 0.9999).all()) and fast.key == encoder.key
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "graphs").glob("*.onnx")}
    assert len(made) == 2 and encoder.sides == (28, 20) and fast.graphs.made((28, 20))
    again = replace(encoder, graphs=Graphs(encoder.encoder, tmp_path / "graphs"))
    again.encode(PIXELS[:1])
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "graphs").glob("*.onnx")} == made
    other = Graphs(small_encoder(28, "resnet10", seed=1).encoder, tmp_path / "graphs")
    assert not other.made([28])


def test_a_damaged_graph_is_made_again(encoder: ImageEncoder, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed; it is the extra [fast]")
    Graphs(encoder.encoder, tmp_path)(torch.zeros(1, 3, 28, 28))
    (path,) = tmp_path.glob("*.onnx")
    sound = path.read_bytes()
    path.write_bytes(sound[: len(sound) // 2])
    assert Graphs(encoder.encoder, tmp_path)(torch.zeros(1, 3, 28, 28)).shape == (1, 1024)
    assert len(path.read_bytes()) == len(sound)


def test_a_graph_that_gives_other_features_is_refused_and_not_kept(
    encoder: ImageEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed; it is the extra [fast]")
    monkeypatch.setattr(graphs, "AGREEMENT", 1.1)
    fast = Graphs(encoder.encoder, tmp_path)
    with pytest.raises(MetaDiffError, match="differ from those of torch") as caught:
        fast(torch.zeros(1, 3, 28, 28))
    assert caught.value.hint is not None and "--backend torch" in caught.value.hint and not fast.made([28])
    told: list[str] = []
    images = torch.randn(2, 3, 28, 28)
    found = Graphs(encoder.encoder, tmp_path, told.append, required=False)(images)
    assert torch.equal(found, encoder.encoder.describe(images)) and told[-1].startswith("encoding by torch: ")


def test_missing_packages_are_named(encoder: ImageEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "find_spec", lambda name: None)
    assert graphs.missing_packages() == ["onnx", "onnxscript", "onnxruntime"]
    with pytest.raises(ConfigError, match="onnxruntime") as caught:
        Graphs(encoder.encoder, tmp_path)
    assert caught.value.hint is not None and "[fast]" in caught.value.hint
