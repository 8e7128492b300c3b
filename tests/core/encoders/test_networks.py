"""Our encoders: sizes, blocks, DropBlock."""

import pytest
import torch

from metadiff_cli.core.encoders.networks import Conv4, DropBlock, build_encoder
from metadiff_cli.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "size", "features"),
    [
        ("conv4", 84, 1600), ("conv4", 28, 64), ("conv4-padded", 28, 256), ("conv4-padded", 31, 256),
        ("conv4-padded", 32, 256), ("resnet12", 32, 640),
    ],
)  # fmt: skip
def test_encoders_have_the_sizes_of_the_field(name: str, size: int, features: int) -> None:
    encoder = build_encoder(name).eval()
    assert encoder.feature_size(size) == features
    with torch.no_grad():
        assert encoder(torch.randn(2, 3, size, size)).shape == (2, features)


def test_the_padded_conv4_is_conv4_on_a_larger_image() -> None:
    padded, plain = build_encoder("conv4-padded").eval(), build_encoder("conv4").eval()
    plain.load_state_dict(padded.state_dict())
    x = torch.randn(2, 3, 28, 28)
    larger = torch.nn.functional.pad(x, (2, 2, 2, 2), mode="replicate")
    with torch.no_grad():
        assert torch.equal(padded(x), plain(larger)) and torch.equal(padded(larger), plain(larger))


def test_unknown_encoder() -> None:
    with pytest.raises(ConfigError, match="conv5"):
        build_encoder("conv5")


def test_pooling_before_relu_is_the_usual_block() -> None:
    block = Conv4().blocks[0].eval()
    x = torch.randn(2, 3, 12, 12)
    usual = torch.nn.functional.max_pool2d(torch.relu(block.norm(block.conv(x))), 2)
    assert torch.equal(block(x), usual)


def test_dropblock_drops_its_rate_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    drop, x = DropBlock(0.1, 5), torch.ones(64, 8, 20, 20)
    out = drop.train()(x)
    assert float((out == 0).float().mean()) == pytest.approx(0.1, abs=0.02)
    assert float(out.mean()) == pytest.approx(1.0, abs=0.01)
    assert torch.equal(drop.eval()(x), x)
