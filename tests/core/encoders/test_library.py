"""Encoders of torchvision and timm: the right features, only the right files, and no memory before both are sure.

All weights are random; downloads are cut off where torch.hub and the hub of timm open their connections.
"""

import io
import pickle
import re
import resource
import sys
from email.message import Message
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.error import URLError

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision import models

from metadiff_cli.config import schema as config
from metadiff_cli.core.checkpoints.file import save_checkpoint
from metadiff_cli.core.checkpoints.model import load_encoder, save_encoder
from metadiff_cli.core.encoders import library as libraries
from metadiff_cli.core.encoders.image_encoder import ImageEncoder
from metadiff_cli.core.encoders.library import (
    PretrainedEncoder,
    pretrained_encoder,
    probe,
    read_weights,
    with_statistics,
)
from metadiff_cli.core.encoders.networks import ENCODERS
from metadiff_cli.errors import CheckpointError, ConfigError, MetaDiffError

CPU = torch.device("cpu")
SQUEEZE = "torchvision:squeezenet1_1"
NO_TIMM = "the extra [timm] is not installed"


def images(size: int) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def whole(model: str) -> nn.Module:
    """A model of torchvision with random weights and all its layers."""
    torch.manual_seed(0)
    made: nn.Module = models.get_model(model, weights=None)
    return made.eval()


@pytest.fixture(scope="module")
def squeezenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state dictionary of SqueezeNet, as torch saves one."""
    path = tmp_path_factory.mktemp("weights") / "squeezenet.pth"
    torch.save(whole("squeezenet1_1").state_dict(), path)
    return path


@pytest.mark.parametrize("model", ["squeezenet1_1", "mobilenet_v3_small", "shufflenet_v2_x0_5"])
def test_features_are_what_the_classification_layer_is_given(model: str, tmp_path: Path) -> None:
    full = whole(model)
    save_file(full.state_dict(), tmp_path / "w.safetensors")
    last = [m for m in full.modules() if isinstance(m, nn.Linear | nn.Conv2d)][-1]
    given: list[Tensor] = []
    last.register_forward_pre_hook(lambda module, inputs: given.append(inputs[0]))
    encoder = pretrained_encoder(f"torchvision:{model}", 64, tmp_path / "w.safetensors").eval()
    with torch.inference_mode():
        full(images(64))
        features = encoder(images(64))
    expected = given[0].mean(dim=(2, 3)) if given[0].dim() == 4 else given[0]
    assert torch.allclose(features, expected, atol=1e-6)
    assert features.shape == (2, encoder.feature_size(64)) and encoder.feature_size(64) == encoder.feature_size(96)


@pytest.mark.parametrize("model", ["test_vit", "test_convnext"])
def test_features_of_timm_are_its_pooled_ones(model: str, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm", reason=NO_TIMM)
    torch.manual_seed(0)
    full = timm.create_model(model).eval()
    torch.save({"state_dict": {f"module.{n}": t for n, t in full.state_dict().items()}}, tmp_path / "w.pth")
    encoder = pretrained_encoder(f"timm:{model}", None, tmp_path / "w.pth").eval()
    x = images(encoder.size)
    with torch.inference_mode():
        expected = full.forward_head(full.forward_features(x), pre_logits=True)
        assert torch.allclose(encoder(x), expected, atol=1e-6)


def test_a_transformer_of_timm_at_another_size_has_its_positions_resampled(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm", reason=NO_TIMM)
    save_file(timm.create_model("test_vit").state_dict(), tmp_path / "w.safetensors")
    encoder = pretrained_encoder("timm:test_vit", 64, tmp_path / "w.safetensors").eval()
    assert encoder(images(64)).shape == (2, encoder.feature_size(64))
    with pytest.raises(ConfigError, match="built for images of 64 pixels, not 160"):
        encoder.feature_size(160)


def test_densenet_files_with_names_of_old(tmp_path: Path) -> None:
    full = whole("densenet121")
    old = {re.sub(r"(denselayer\d+\.(?:norm|conv))([12])\.", r"\1.\2.", n): t for n, t in full.state_dict().items()}
    assert old.keys() != full.state_dict().keys()
    torch.save(old, tmp_path / "w.pth")
    encoder = pretrained_encoder("torchvision:densenet121", 32, tmp_path / "w.pth").eval()
    with torch.inference_mode():
        expected = torch.relu(full.get_submodule("features")(images(32))).mean(dim=(2, 3))
        assert torch.allclose(encoder(images(32)), expected, atol=1e-5)


def test_a_checkpoint_has_all_that_it_takes(squeezenet: Path, tmp_path: Path) -> None:
    made = with_statistics(pretrained_encoder(SQUEEZE, 64, squeezenet), CPU, views=2)
    save_encoder(tmp_path / "e.safetensors", made, {})
    back = load_encoder(tmp_path / "e.safetensors", CPU, views=2)
    pixels = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(back.encode(pixels), made.encode(pixels)) and back.key == made.key
    assert (back.name, back.size, back.mean) == ("torchvision:squeezenet1_1.IMAGENET1K_V1", 64, (0.485, 0.456, 0.406))
    again: ImageEncoder = pickle.loads(pickle.dumps(back))
    assert torch.equal(again.encode(pixels), made.encode(pixels))


@pytest.mark.parametrize("encoder", ["torchvision:vit_h_14", "torchvision:squeezenet1_1", "torchvision:googlenet"])
def test_a_header_that_names_another_network(encoder: str, squeezenet: Path, tmp_path: Path) -> None:
    tensors = {f"encoder.net.{name}": t for name, t in list(read_weights(squeezenet).items())[:3]}
    image = {"size": 518, "mean": [0.5] * 3, "std": [0.5] * 3, "views": 1}
    save_checkpoint(tmp_path / "e.safetensors", "encoder", tensors, {"encoder": encoder, "image": image})
    with pytest.raises(CheckpointError if "google" not in encoder else ConfigError):
        load_encoder(tmp_path / "e.safetensors", CPU, views=1)


def test_shapes_are_known_without_memory_for_them() -> None:
    before = resource.getrusage(
        resource.RUSAGE_SELF
    ).ru_maxrss  # kilobytes on Linux, bytes on macOS: less is said there
    channels, shapes = probe("torchvision:vit_h_14.IMAGENET1K_SWAG_E2E_V1", 518)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert channels == 1280 and sum(shape.numel() for shape in shapes.values()) > 600_000_000
    assert grown < 500_000 or sys.platform != "linux"


def test_pixels_are_prepared_as_the_weights_want_them() -> None:
    found = {name: libraries.architecture(f"torchvision:{name}") for name in ("resnet50", "efficientnet_v2_l")}
    assert (found["resnet50"].size, found["efficientnet_v2_l"].size) == (224, 480)
    assert found["efficientnet_v2_l"].mean == (0.5, 0.5, 0.5)
    named = libraries.architecture("torchvision:vit_b_16.imagenet1k_swag_e2e_v1")
    assert named.name.endswith(".IMAGENET1K_SWAG_E2E_V1") and named.size == 384
    with pytest.raises(ConfigError, match="224"):
        pretrained_encoder("torchvision:vit_b_16", 256)


@pytest.mark.parametrize(
    ("name", "told"),
    [("torchvision:resnet5", "torchvision:resnet50"), ("torchvision:resnet50.v9", "IMAGENET1K_V2"),
     ("torchvision:inception_v3", "torchvision"), ("timm:vit_small_patch14_dino", "timm:vit_small_patch14_dinov2"),
     ("timm:test_vit.nope", "r160_in1k"), ("timm:hf-hub:someone/model", "timm:MODEL"), ("timm:../x", "timm:MODEL")],
)  # fmt: skip
def test_an_unknown_name_is_told_with_what_comes_near(name: str, told: str) -> None:
    if name.startswith("timm"):
        pytest.importorskip("timm", reason=NO_TIMM)
    with pytest.raises(ConfigError) as error:
        libraries.architecture(name)
    assert told in str(error.value)


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    libraries.architecture.cache_clear()
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match=re.escape("[timm]: pip install timm")):
        libraries.architecture("timm:test_vit")


def test_names_of_our_own_encoders_stand_in_the_configuration() -> None:
    assert tuple(ENCODERS) == config.ENCODERS
    assert not config.is_pretrained("torchvision:resnet50@file") and config.is_pretrained("timm:a.b")


class Bomb:
    """What a hostile file would run."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def test_files_that_do_not_fit(squeezenet: Path, tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "args": Bomb(tmp_path / "mark")}, tmp_path / "bomb.pth")
    (tmp_path / "cut.pth").write_bytes(squeezenet.read_bytes()[:1000])
    (tmp_path / "cut.safetensors").write_bytes(b"\xff" * 64)
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    torch.save({"encoder": torch.zeros(2)}, tmp_path / "other.pth")
    for name in ("bomb.pth", "cut.pth", "cut.safetensors", "list.pth", "other.pth", "gone.pth"):
        with pytest.raises(CheckpointError, match=re.escape(name)):
            pretrained_encoder(SQUEEZE, 64, tmp_path / name)
    assert not (tmp_path / "mark").exists()


def test_weights_that_are_missing_are_not_left_random(squeezenet: Path, tmp_path: Path) -> None:
    state = read_weights(squeezenet)
    save_file({n: t for n, t in state.items() if n != "features.0.bias"}, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=re.escape("1 of 50 weights are missing (features.0.bias)")):
        pretrained_encoder(SQUEEZE, 64, tmp_path / "w.safetensors")
    headless = {n: t for n, t in state.items() if not n.startswith("classifier")}
    save_file(headless, tmp_path / "headless.safetensors")
    assert isinstance(pretrained_encoder(SQUEEZE, 64, tmp_path / "headless.safetensors"), PretrainedEncoder)


class Cut(io.BytesIO):
    """An answer whose connection ends in the middle."""

    def __init__(self) -> None:
        super().__init__(b"x" * 1000)
        self.headers = Message()

    def info(self) -> Message:
        return self.headers

    def read(self, size: int | None = -1, /) -> bytes:
        got = super().read(600 if self.tell() == 0 else 0)
        if not got:
            raise ConnectionResetError("connection reset")
        return got

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


@pytest.mark.parametrize("cut", [True, False])
def test_a_failed_download_says_what_to_do_and_leaves_nothing(
    cut: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def connect(*arguments: Any, **options: Any) -> Cut:
        if not cut:
            raise URLError("no route to host")
        return Cut()

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", connect)
    with pytest.raises(MetaDiffError, match="connection reset" if cut else "no route") as error:
        pretrained_encoder(SQUEEZE)
    told = str(error.value)
    assert all(part in told for part in (SQUEEZE, "--encoder-weights", "HTTPS_PROXY", "TORCH_HOME", "download.pytorch"))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert capsys.readouterr().out == ""


def test_what_is_in_the_cache_of_torchvision_is_taken_from_there(
    squeezenet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    url = models.SqueezeNet1_1_Weights.DEFAULT.url
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    (tmp_path / "hub" / "checkpoints" / url.rpartition("/")[2]).write_bytes(squeezenet.read_bytes())
    cached, given = pretrained_encoder(SQUEEZE, 64), pretrained_encoder(SQUEEZE, 64, squeezenet)
    assert all(torch.equal(a, b) for a, b in zip(cached.parameters(), given.parameters(), strict=True))
    assert capsys.readouterr().out == ""


def test_a_failed_download_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm", reason=NO_TIMM)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(MetaDiffError, match="could not be downloaded") as error:
        pretrained_encoder("timm:test_vit")
    assert "timm:test_vit.r160_in1k" in str(error.value) and "huggingface.co/timm/test_vit" in str(error.value)
