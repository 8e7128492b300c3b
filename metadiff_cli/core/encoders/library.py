"""Models of torchvision and timm as encoders: their names, image sizes and weights, without the classification layer.

`torchvision:resnet50` and `timm:vit_small_patch14_dinov2.lvd142m`; after the dot stand the weights, as the libraries
call them, and without it the library's default. Image size, mean and standard deviation are those of the weights.
"""

import difflib
import importlib
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor, nn

from metadiff_cli.config.schema import PRETRAINED
from metadiff_cli.errors import ConfigError, MetaDiffError

# two whose trained weights want pixels prepared in a way of their own, and heads that only training uses
UNUSABLE = frozenset({"googlenet", "inception_v3"})
ONE_SIZE = ("vit_", "maxvit_")  # torchvision's models that are built for one image size
CLOSE = 3  # names that are suggested


@dataclass(frozen=True)
class Architecture:
    """A model of a library with one of its sets of weights; `size` in pixels, `mean` and `std` of pixels in 0..1.

    `name` has the weights in it. `fixed` says that the model is built for one image size; `source` where its weights
    are downloaded from, None when there are none.
    """

    name: str
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fixed: bool
    source: str | None
    licence: str
    handle: Any  # the library's own description of the weights

    @property
    def model(self) -> str:
        """The library's name of the model, without the weights."""
        return self.name.partition(":")[2].partition(".")[0]

    def network(self, size: int, *, download: bool = False, progress: bool = False) -> nn.Module:
        """Images (B, 3, size, size) -> features (B, D); random weights, or those that `download` gets or finds."""
        raise AssertionError("a library defines its own networks")

    def fitted(self, state: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
        """The weights of a file, as `network` calls them, without those of the classification layer."""
        raise AssertionError("a library defines its own names")


class TorchvisionModel(Architecture):
    """A classification model of torchvision; `handle` is a member of its weights enumeration."""

    def network(self, size: int, *, download: bool = False, progress: bool = False) -> nn.Module:
        if self.fixed and size != self.size:
            raise ValueError(f"it is built for images of {self.size} pixels")
        sized = {"image_size": size} if self.model.startswith("vit_") else {}
        weights = self.handle if download else None
        whole: nn.Module = _torchvision().get_model(self.model, weights=weights, progress=progress, **sized)
        # the last layer is the classifier in all of them, a convolution in SqueezeNet; what it is given is pooled
        layers = [name for name, m in whole.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        whole.set_submodule(layers[-1], nn.Identity())
        return whole

    def fitted(self, state: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
        gone = {name for name, module in network.named_modules() if isinstance(module, nn.Identity)}
        # DenseNet's files have names of old: denselayer1.norm.1.weight
        names = {name: re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2.", name) for name in state}
        return {names[name]: t for name, t in state.items() if name.rpartition(".")[0] not in gone}


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
        # timm's convention for names of the authors' files and for positions at another image size
        rename = getattr(importlib.import_module(type(network).__module__), "checkpoint_filter_fn", None)
        state = rename(state, network) if rename is not None else state
        return {name: t for name, t in state.items() if name.rpartition(".")[0] not in gone}


@cache
def architecture(name: str) -> Architecture:
    """What stands behind `torchvision:...` or `timm:...`. Raises ConfigError with near misses, or naming the extra."""
    match = re.fullmatch(PRETRAINED, name)
    if match is None:
        raise ConfigError(f"unknown encoder '{name:.80}'", hint="write torchvision:MODEL or timm:MODEL")
    library, model, weights = match.groups()
    return (_of_torchvision if library == "torchvision" else _of_timm)(model, weights)


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
    beginning = [other for other in known if other.startswith(name)]
    close = [*beginning[:CLOSE], *difflib.get_close_matches(name, known, n=CLOSE)][:CLOSE]
    return ConfigError(
        f"{library} has no {what} '{name}'",
        hint=f"did you mean {', '.join(f'{library}:{other}' for other in close)}?" if close
        else f"{library}'s documentation lists its models",
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
    """Progress bars of the hub's downloads only where they are wanted; a person's own setting stays.

    Its warnings of every attempt that fails are left out: the error at the end says what happened.
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
