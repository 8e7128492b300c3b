"""Limits on what a checkpoint's header may ask for, checked before anything of that size is made.

All raise ValueError, which the readers in model.py tell as a damaged checkpoint.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from metadiff_cli.config.schema import DenoiserConfig

SIZES = range(16, 1025)  # pixels of an image side
# of a fitted number (the guidance of a prototype, rounded in fp32), and of one that exp() is taken of
LARGEST, LARGEST_LOG = 1.001e6, 50.0


def check_image(image: Any) -> None:
    """Size in pixels, and mean and standard deviation of three channels."""
    if type(image["size"]) is not int or image["size"] not in SIZES:
        raise ValueError(f"an image size of {image['size']!r:.40}")
    shift = image.get("shift", 0)
    if type(shift) is not int or not 0 <= shift < image["size"]:
        raise ValueError(f"images moved by {shift!r:.40} pixels")
    for key in ("mean", "std"):
        values = image[key]
        if not isinstance(values, list) or len(values) != 3 or not all(_is_number(value) for value in values):
            raise ValueError(f"an image {key} of {values!r:.80}")
    if min(image["std"]) <= 0:
        raise ValueError(f"an image std of {image['std']!r:.80}")


def check_denoiser(settings: Any, tensors: Mapping[str, Tensor], build: Callable[[], nn.Module]) -> None:
    """Kind and width within the configuration's limits, and a network of just the shapes that the file has.

    `build` is tried on the meta device, where a network takes no memory however large it is.
    """
    DenoiserConfig.model_validate({key: settings[key] for key in DenoiserConfig.model_fields})
    with torch.device("meta"):
        wanted = {name: tensor.shape for name, tensor in build().state_dict().items()}
    found = {name: tensor.shape for name, tensor in tensors.items()}
    if wanted != found:
        odd = sorted(name for name in {*wanted, *found} if wanted.get(name) != found.get(name))
        raise ValueError(f"its denoiser is another one, see {odd[0]}")


def check_tuning(values: Any) -> None:
    """Only truth values and moderate numbers at any depth; scales that exp() can take."""
    usual = values.get("usual")
    for name, value in values.items():
        fine = all(isinstance(leaf, bool) or _is_number(leaf) for leaf in _leaves(value))
        if not fine and (value is not None or name not in ("usual", "rejection")):  # fitted things that may be missing
            raise ValueError(f"its tuning has {name} {value!r:.80}")
    if usual is not None and (usual["deviation"] <= 0 or min(*usual["shift"]["ways"], *usual["shift"]["shots"]) < 1):
        raise ValueError(f"its tuning has usual {usual!r:.80}")
    rejection = values.get("rejection")
    if rejection is not None and min(*rejection["offsets"]["ways"], *rejection["offsets"]["shots"]) < 1:
        raise ValueError(f"its tuning has rejection {rejection!r:.80}")
    for name in ("calibration", "prototype_calibration"):
        calibration = values[name]
        if min(*calibration["ways"], *calibration["shots"]) < 1:
            raise ValueError(f"its tuning has {name} {calibration!r:.80}")
        if any(abs(log) > LARGEST_LOG for log in _leaves(calibration["log_scales"])):
            raise ValueError(f"its tuning has a logit scale out of all bounds: {calibration!r:.80}")


def check_task(header: Any) -> None:
    """Scale and guidance of a saved classifier, and the names of its support images."""
    if not _is_number(header["scale"]) or not _is_number(header["guidance"]):
        raise ValueError(f"a scale of {header['scale']!r:.40} and a guidance of {header['guidance']!r:.40}")
    if not isinstance(header["support"], list) or not all(isinstance(path, str) for path in header["support"]):
        raise ValueError("the names of its support are none")


def _leaves(value: Any) -> Iterator[Any]:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    if inner is None:
        yield value
    else:
        for part in inner:
            yield from _leaves(part)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and abs(value) <= LARGEST
