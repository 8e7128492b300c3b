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
    assert fast.graphs is not None and not fast.graphs.made(28)
    cosines = torch.nn.functional.cosine_similarity(fast.encode(PIXELS), encoder.encode(PIXELS), dim=1)
    assert bool((cosines > 0.9999).all()) and fast.key == encoder.key
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "graphs").glob("*.onnx")}
    assert len(made) == 2 and fast.graphs.made(28) and fast.graphs.made(20)  # of whole images, and of corners
    again = replace(encoder, graphs=Graphs(encoder.encoder, tmp_path / "graphs"))
    again.encode(PIXELS[:1])
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "graphs").glob("*.onnx")} == made
    other = Graphs(small_encoder(28, "resnet10", seed=1).encoder, tmp_path / "graphs")
    assert not other.made(28)


def test_a_graph_that_gives_other_features_is_refused_and_not_kept(
    encoder: ImageEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed; it is the extra [fast]")
    monkeypatch.setattr(graphs, "AGREEMENT", 1.1)
    fast = Graphs(encoder.encoder, tmp_path)
    with pytest.raises(MetaDiffError, match="differ from those of torch") as caught:
        fast(torch.zeros(1, 3, 28, 28))
    assert caught.value.hint is not None and "--backend torch" in caught.value.hint and not fast.made(28)


def test_missing_packages_are_named(encoder: ImageEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "find_spec", lambda name: None)
    assert not graphs.can_make_graphs()
    with pytest.raises(ConfigError, match="onnxruntime") as caught:
        Graphs(encoder.encoder, tmp_path)
    assert caught.value.hint is not None and "[fast]" in caught.value.hint
