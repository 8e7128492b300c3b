"""`--encoder torchvision:MODEL` and `timm:MODEL`: an encoder of a library becomes the encoder file of a run."""

from pathlib import Path
from typing import TYPE_CHECKING

from metadiff_cli.config.schema import Config, is_pretrained
from metadiff_cli.console import Screen
from metadiff_cli.errors import ConfigError

if TYPE_CHECKING:
    from metadiff_cli.commands.train.run_folder import Run

SEEN = "its weights come from elsewhere, and may have seen the classes that it is measured on"


def trains_no_library(config: Config, what: str) -> None:
    """Raise ConfigError when `what`, which trains an encoder, is to train one of a library."""
    if is_pretrained(config.encoder):
        raise ConfigError(
            f"{what} trains an encoder, and {config.encoder} comes trained",
            hint=f"metadiff metatrain --encoder {config.encoder} takes it as it is",
        )


def check_encoder(config: Config, method: str, file: Path | None, weights: Path | None) -> None:
    """Raise ConfigError for a library's encoder that is unknown, --encoder-weights without one, and a method that
    trains its own.

    `file` is that of `--encoder FILE`, which takes the place of what the configuration names.
    """
    if file is None and is_pretrained(config.encoder):
        from metadiff_cli.core.baselines.learners import ON_IMAGES
        from metadiff_cli.core.encoders.library import architecture

        if method in ON_IMAGES:
            trains_no_library(config, method)
        architecture(config.encoder)
        return
    if weights is not None:
        raise ConfigError(
            "--encoder-weights needs an encoder of a library",
            hint=f"add --encoder torchvision:MODEL or timm:MODEL; a file of metadiff is given as --encoder {weights}",
        )


def pretrained_file(config: Config, weights: Path | None, run: "Run", screen: Screen) -> Path | None:
    """The encoder file of the run, made of the library's encoder; None when the configuration names one of ours.

    A run that goes on takes the file that it has.
    """
    import torch

    from metadiff_cli.commands.train.run_folder import ENCODER
    from metadiff_cli.core.checkpoints.model import save_encoder
    from metadiff_cli.core.encoders.library import pretrained_encoder, with_statistics

    if not is_pretrained(config.encoder):
        return None
    path = run.folder / ENCODER
    if path.is_file():
        return path
    if weights is None:
        screen.note(f"weights of {config.encoder}: from the cache of the library, or downloaded")
    f, shown = config.features, screen.err.is_terminal and not screen.quiet
    encoder = pretrained_encoder(config.encoder, f.size, weights, progress=shown)
    images, source = with_statistics(encoder, torch.device("cpu"), mirror=f.mirror, shift=f.shift), encoder.source
    facts = {"source": "a local file" if weights else source.source, "licence": source.licence}
    screen.note(f"encoder: {images.name}, images of {images.size} pixels, D = {images.feature_size}; {SEEN}")
    if weights:
        screen.note(f"its weights are those of {weights}; shape, image size and normalisation go by its name")
    screen.detail(f"weights: {facts['source']}, licence {facts['licence']}")
    save_encoder(path, images, {"weights": facts})
    return path
