"""Encoders that other people trained: built by name, filled from a library's download, a local file, or a checkpoint.

Nothing of that size is made before names and shapes are known to fit: networks are first built without memory.
"""

import io
import pickle
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from metadiff_cli.core.checkpoints.layout import MAX_FILE, check_layout
from metadiff_cli.core.encoders.bank import ImageEncoder
from metadiff_cli.core.encoders.library import Architecture, architecture
from metadiff_cli.core.encoders.networks import Encoder
from metadiff_cli.errors import CheckpointError, ConfigError, MetaDiffError

WRAPPERS = ("state_dict", "model", "model_state_dict")  # under which training programs keep the weights
ODD_SHOWN = 3  # names of weights that do not fit


class PretrainedEncoder(Encoder):
    """A library's network without its classification layer, for images of `size` pixels."""

    pooled = True

    def __init__(self, source: Architecture, net: nn.Module, size: int) -> None:
        super().__init__()
        self.source, self.size = source, size
        self.channels = _probe(source.name, size)[0]
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.net(images)  # (B, D)
        return features

    def feature_size(self, size: int) -> int:
        """D for images of `size` pixels. Raises ConfigError when the network takes none of that size."""
        if self.source.fixed and size != self.size:
            raise ConfigError(
                f"this {self.source.name} is built for images of {self.size} pixels, not {size}",
                hint=f"leave features.size out, or make it anew: --encoder {self.source.name}",
            )
        return _probe(self.source.name, size)[0]


class Weightless(TorchFunctionMode):
    """Makes what `torch.empty` gives, as layers take it for their weights, without memory.

    With the whole of a network made on the meta device, libraries that compute layer sizes on tensors would fail.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


@cache
def _probe(name: str, size: int) -> tuple[int, dict[str, torch.Size]]:
    """D, and the shapes of all weights, of an encoder for images of `size` pixels; nothing is allocated or computed."""
    source = architecture(name)
    try:
        with Weightless():
            net = source.network(size).to("meta").eval()
        features = net(torch.zeros(1, 3, size, size, device="meta"))
        _, channels = features.shape
    except Exception as error:  # each of a thousand models has its own way to refuse
        raise ConfigError(
            f"{name} gives no feature vector for images of {size} pixels ({_reason(error)})",
            hint=f"its own size is {source.size}: leave features.size out, or use another encoder",
        ) from error
    return int(channels), {key: tensor.shape for key, tensor in net.state_dict().items()}


def build_pretrained(name: str, size: int, tensors: Mapping[str, Tensor]) -> PretrainedEncoder:
    """The encoder of a checkpoint, still with random weights. Raises ValueError when `tensors` are not its weights."""
    shapes = {f"net.{key}": shape for key, shape in _probe(name, size)[1].items()}
    odd = _odd(shapes, {key: tensor.shape for key, tensor in tensors.items()})
    if odd:
        raise ValueError(f"its encoder is another one, see {odd[0]}")
    source = architecture(name)
    return PretrainedEncoder(source, source.network(size), size)


def pretrained_encoder(
    name: str, size: int | None = None, file: Path | None = None, *, progress: bool = False
) -> PretrainedEncoder:
    """The named encoder with its weights, from `file` or as its library downloads them, for images of `size` pixels.

    Without `size`, that of the weights. `progress` lets the library show a bar on stderr. Raises ConfigError for an
    unknown name or size, CheckpointError for a file that does not fit, MetaDiffError for a download that fails.
    """
    source = architecture(name)
    size = size or source.size
    _probe(source.name, size)  # before anything is downloaded
    if file is None:
        return PretrainedEncoder(source, _downloaded(source, size, progress), size)
    encoder = untrained_encoder(name, size)
    _fill(source, encoder.net, file)
    return encoder


def untrained_encoder(name: str, size: int | None) -> PretrainedEncoder:
    """The named encoder with random weights: as costly as the real one, and nothing is downloaded."""
    source = architecture(name)
    _probe(source.name, size or source.size)
    return PretrainedEncoder(source, source.network(size or source.size), size or source.size)


def with_statistics(encoder: PretrainedEncoder, device: torch.device, *, mirror: bool, shift: int = 0) -> ImageEncoder:
    """The encoder with the image size and the statistics of pixels that it was trained with."""
    source = encoder.source
    encoder.to(device).eval()
    return ImageEncoder(encoder, source.name, encoder.size, source.mean, source.std, mirror, device, shift)


def _downloaded(source: Architecture, size: int, progress: bool) -> nn.Module:
    if source.source is None:
        raise ConfigError(f"there are no weights of {source.name} to download", hint="give a file: --encoder-weights")
    try:
        # torch.hub says on stdout, where results belong, what it downloads
        with redirect_stdout(sys.stderr if progress else io.StringIO()):
            return source.network(size, download=True, progress=progress)
    except Exception as error:  # of the network, the disk, the hub or the file: each library has its own
        first: BaseException = error
        while first.__cause__ is not None:  # what the library's own error came from says more
            first = first.__cause__
        raise MetaDiffError(
            f"the weights of {source.name} could not be downloaded ({_reason(first)})",
            hint=f"check the network and HTTPS_PROXY; or get the file from {source.source} on another computer and "
            f"give it with --encoder-weights FILE; files that are in the cache of the library ($TORCH_HOME, $HF_HOME) "
            "are taken from there",
        ) from error


def _fill(source: Architecture, net: nn.Module, file: Path) -> None:
    """Load the weights of a file, all of them and no others."""
    try:
        state = source.fitted(read_weights(file), net)
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"{file} holds no weights of {source.name} ({_reason(error)})", hint=_other(source)
        ) from error
    wanted = {key: tensor.shape for key, tensor in net.state_dict().items()}
    odd = _odd(wanted, {key: tensor.shape for key, tensor in state.items()})
    if odd:
        raise CheckpointError(
            f"{file} does not hold the weights of {source.name}: {len(odd)} names or shapes differ "
            f"({', '.join(odd[:ODD_SHOWN])})",
            hint=_other(source),
        )
    net.load_state_dict(state)


def _reason(error: BaseException) -> str:
    """The first line of an error of a library."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def _other(source: Architecture) -> str:
    where = f"; its weights are at {source.source}" if source.source else ""
    return f"give the file of just this model{where}"


def _odd(wanted: Mapping[str, torch.Size], found: Mapping[str, torch.Size]) -> list[str]:
    """Names that only one side has, or whose shapes differ; a counter of batches is no weight that one misses."""
    return sorted(
        name
        for name in {*wanted, *found}
        if wanted.get(name) != found.get(name) and not (name.endswith("num_batches_tracked") and name not in found)
    )


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a state dictionary that torch saved. Nothing else is unpickled.

    Raises CheckpointError.
    """
    if not path.is_file():
        raise CheckpointError(f"weights file {path} does not exist", hint="give a .safetensors or .pth file")
    try:
        if path.stat().st_size > MAX_FILE:
            raise CheckpointError(f"{path} has more than {MAX_FILE / 1e9:.0f} GB", hint="give the weights alone")
        if path.suffix == ".safetensors":
            check_layout(path)
            return load_file(path)
        return _plain(torch.load(path, map_location="cpu", weights_only=True))
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than tensors, and is not opened",
            hint="save its state dictionary alone, best as safetensors",
        ) from error
    except (OSError, SafetensorError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be read as weights ({_reason(error)})", hint="copy it again") from error


def _plain(found: Any) -> dict[str, Tensor]:
    """The state dictionary within what was saved, without the prefix of distributed training."""
    for key in WRAPPERS:
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not all(isinstance(t, Tensor) for t in found.values()) or not found:
        raise ValueError("no state dictionary")
    return {str(name).removeprefix("module."): tensor for name, tensor in found.items()}
