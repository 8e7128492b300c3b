"""Files of weights that other programs wrote: reading them safely, and the names that they give to weights."""

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metadiff_cli.core.checkpoints.file import check_file, open_tensors, reason_of
from metadiff_cli.errors import CheckpointError

WRAPPERS = ("state_dict", "model", "model_state_dict")  # keys under which training programs keep the weights
SHOWN = 3  # names of one kind in a message

# the layers of EfficientNet as EfficientNet-PyTorch and its Lite models call them, and timm's names of the same
EFFICIENTNET = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
SQUEEZE = {"_se_reduce": "se.conv_reduce", "_se_expand": "se.conv_expand"}
BLOCK = {
    "_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2", "_project_conv": "conv_pwl",
    "_bn2": "bn3", **SQUEEZE,
}  # fmt: skip
FIRST_BLOCK = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2", **SQUEEZE}


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a state dictionary that torch saved. Nothing else is unpickled.

    Raises CheckpointError for any other file.
    """
    if path.suffix == ".safetensors":
        with open_tensors(path) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    try:
        check_file(path, hint="give a .safetensors or .pth file")
        return _plain(torch.load(path, map_location="cpu", weights_only=True))
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than tensors, and is not opened",
            hint="save its state dictionary alone, best as safetensors",
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be read as weights ({reason_of(error)})", hint="copy it again") from error


def _plain(found: Any) -> dict[str, Tensor]:
    """The state dictionary inside a saved object, without the prefix of distributed training."""
    for key in WRAPPERS:
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not all(isinstance(t, Tensor) for t in found.values()) or not found:
        raise ValueError("no state dictionary")
    return {str(name).removeprefix("module."): tensor for name, tensor in found.items()}


def difference(wanted: Mapping[str, torch.Size], found: Mapping[str, Tensor]) -> str:
    """What keeps the tensors `found` from being weights of the shapes `wanted`, or an empty text.

    A missing counter of batches does not matter.
    """
    missing = sorted(n for n in wanted.keys() - found.keys() if not n.endswith("num_batches_tracked"))
    unknown = sorted(found.keys() - wanted.keys())
    shapes = [
        f"{name} {tuple(found[name].shape)} instead of {tuple(shape)}"
        for name, shape in wanted.items()
        if name in found and found[name].shape != shape
    ]
    kinds = {
        f"of {len(wanted)} weights are missing": missing,
        "weights of the file are unknown": unknown,
        f"of {len(wanted)} weights have another shape": shapes,
    }
    return "; ".join(
        f"{len(odd)} {kind} ({', '.join(odd[:SHOWN])}{', ...' if len(odd) > SHOWN else ''})"
        for kind, odd in kinds.items()
        if odd
    )


def densenet_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a DenseNet, whose files have older names such as denselayer1.norm.1.weight, under today's."""
    return {re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2.", name): t for name, t in state.items()}


def efficientnet_names(state: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """The weights of an EfficientNet under timm's names, if they have those of EfficientNet-PyTorch.

    timm numbers the blocks within their stages. Raises LookupError for layers that EfficientNet does not have, and
    AttributeError for another network.
    """
    if "_conv_stem.weight" not in state:
        return state
    stages: Any = network.blocks
    places = [f"blocks.{s}.{i}" for s, stage in enumerate(stages) for i in range(len(stage))]
    expanded = {name.split(".")[1] for name in state if "._expand_conv." in name}

    def renamed(name: str) -> str:
        first, *rest = name.split(".")
        if first != "_blocks":
            return ".".join([EFFICIENTNET[first], *rest])
        number, layer, *rest = rest
        return ".".join([places[int(number)], (BLOCK if number in expanded else FIRST_BLOCK)[layer], *rest])

    return {renamed(name): tensor for name, tensor in state.items()}
