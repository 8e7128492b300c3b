"""How a run comes by its encoder: given, made of a library's, kept from before, or trained."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from metadiff_cli.commands.train.card import SEEN
from metadiff_cli.commands.train.resume import Update, follow
from metadiff_cli.commands.train.run_folder import ENCODER, ENCODER_STATE, Run
from metadiff_cli.commands.train.training import Training, file_digest
from metadiff_cli.config.schema import LITE, Config, is_pretrained
from metadiff_cli.console import Screen
from metadiff_cli.core.baselines.learners import ON_IMAGES
from metadiff_cli.core.checkpoints.file import save_checkpoint
from metadiff_cli.core.checkpoints.model import load_encoder, save_encoder
from metadiff_cli.core.device import CPU
from metadiff_cli.core.encoders.image_encoder import ImageEncoder
from metadiff_cli.core.encoders.library import architecture, pretrained_encoder, with_statistics
from metadiff_cli.core.encoders.networks import Encoder, build_encoder
from metadiff_cli.core.evaluation.evaluate import QUICK_WAY, quick_accuracy
from metadiff_cli.core.training.pretrain import PretrainEpoch, Pretrainer, PretrainStep
from metadiff_cli.data.cache import DecodedSplit, channel_statistics
from metadiff_cli.errors import ConfigError
from metadiff_cli.files import cache_dir, copy_file, writable


def require_trainable(config: Config, what: str) -> None:
    """Raise ConfigError when `what`, which trains an encoder, is asked to train one of a library."""
    if is_pretrained(config.encoder):
        raise ConfigError(
            f"{what} trains an encoder, and {config.encoder} comes trained",
            hint=f"metadiff metatrain --encoder {config.encoder} takes it as it is",
        )


def check_encoder(config: Config, method: str, file: Path | None, weights: Path | None) -> None:
    """Raise ConfigError when the options about the encoder do not fit each other.

    That is an unknown encoder of a library, `weights` (--encoder-weights) without one, or a `method` that trains its
    own. `file` is that of --encoder FILE, which takes the place of the encoder in the configuration.
    """
    if file is None and is_pretrained(config.encoder):
        if method in ON_IMAGES:
            require_trainable(config, method)
        architecture(config.encoder)
    elif weights is not None:
        raise ConfigError(
            "--encoder-weights needs an encoder of a library",
            hint=f"add --encoder torchvision:MODEL or timm:MODEL; a file of metadiff is given as --encoder {weights}",
        )


def image_size(config: Config, file: Path | None) -> int:
    """The size in pixels of the images that the first stage reads, with the encoder of `file` if there is one."""
    if file is not None:
        return load_encoder(file, CPU, views=1, size=config.features.size).size
    if is_pretrained(config.encoder):
        return config.features.size or architecture(config.encoder).size
    return config.data.size


@dataclass(frozen=True)
class LibraryEncoder:
    """An encoder of a library, and the facts about its weights for the header."""

    images: ImageEncoder
    weights: dict[str, str | None]

    def save(self, run: Run) -> Path:
        """Write the run's encoder file."""
        path = run.folder / ENCODER
        save_encoder(path, self.images, {"weights": self.weights})
        return path


def library_encoder(config: Config, weights: Path | None, screen: Screen) -> LibraryEncoder:
    """The library's encoder that the configuration names, with `weights` from a file or else the library's own."""
    if weights is None and config.encoder not in LITE:
        screen.note(f"weights of {config.encoder}: from the library's cache, or downloaded")
    f, shown = config.features, screen.moves and not screen.quiet
    encoder = pretrained_encoder(config.encoder, f.size, weights, progress=shown)
    images, source = with_statistics(encoder, CPU, views=f.views, shift=f.shift), encoder.source
    facts = {"source": "a local file" if weights else source.source, "licence": source.licence}
    screen.note(f"encoder: {images.name}, images of {images.size} pixels, D = {images.feature_size}; {SEEN}")
    if weights:
        screen.note(f"the weights come from {weights}; architecture, image size and normalisation follow the name")
    screen.detail(f"weights: {facts['source']}, licence {facts['licence']}")
    return LibraryEncoder(images, facts)


def find_encoder(t: Training) -> ImageEncoder:
    """The encoder that was given, else the one that these settings and images gave before, else a new one.

    The run directory gets a copy of its file.
    """
    file = t.start.encoder
    if file is None:
        val = t.source.split("val") if t.source.has("val") else None
        key = encoder_key(t.config, t.source.split("train"), val, file_digest(t.start.init))
        file, there = t.group.on_rank_zero(lambda: _kept(key))
        if there:
            t.screen.note("taking the encoder that these settings and images gave before")
        else:
            _, file = train_encoder(t)
    f = t.config.features
    images = load_encoder(file, t.device, views=f.views, shift=f.shift, half=f.half, size=f.size)
    if t.group.rank == 0 and file.resolve() != (t.run.folder / ENCODER).resolve():
        copy_file(file, t.run.folder / ENCODER)
    return images


def train_encoder(t: Training) -> tuple[Pretrainer, Path]:
    """Train an encoder into the run directory, from its state file if there is one.

    The best encoder is also kept under its key; that file is returned.
    """
    trainer, header = _trainer(t)
    follow(
        trainer, _validation(t, header["image"]), partial(_show, t, trainer, header), label="pretraining", run=t.run,
        state=ENCODER_STATE, identity=t.identity("pretrain"), screen=t.screen,
    )  # fmt: skip
    path = t.group.on_rank_zero(lambda: _keep(t, trainer, header))
    if (cache := cache_dir()) not in path.parents:
        t.screen.note(f"{cache / 'encoders'} cannot be written to: the encoder is kept in {path.parent}")
    return trainer, path


def encoder_key(config: Config, train: DecodedSplit, val: DecodedSplit | None, init: str | None = None) -> str:
    """Name of the encoder that these settings and these images give; `init` identifies the weights it starts from."""
    settings = {
        "encoder": config.encoder,
        "seed": config.seed,
        "size": config.data.size,
        "pretrain": config.pretrain.model_dump(mode="json"),
        "train": train.key,
        "val": val.key if val else None,
    }
    if init is not None:
        settings["init"] = init
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]


def kept_encoder(key: str) -> Path:
    """Where the encoder of a key is kept for later runs, or will be."""
    path = cache_dir() / "encoders" / f"{key}.safetensors"
    return path if path.is_file() else writable(path.parent) / path.name


def _kept(key: str) -> tuple[Path, bool]:
    path = kept_encoder(key)
    return path, path.is_file()


def _trainer(t: Training) -> tuple[Pretrainer, dict[str, Any]]:
    """The trainer, and the header of the encoder's file."""
    config, train = t.config, t.source.split("train")
    mean, std = channel_statistics(train.images)
    trainer = Pretrainer(
        partial(build_encoder, config.encoder), config.pretrain, train.images, train.labels,
        classes=len(train.classes), size=config.data.size, mean=mean, std=std, seed=config.seed, device=t.device,
        weights=None if t.start.init is None else _weights(t.start.init, config.encoder), group=t.group,
    )  # fmt: skip
    header = {
        "encoder": config.encoder,
        "classes": list(train.classes),
        "image": {"size": config.data.size, "mean": mean, "std": std},
        "config": config.model_dump(mode="json", exclude={"runtime"}),
    }
    return trainer, header


def _weights(init: Path, name: str) -> dict[str, torch.Tensor]:
    """The weights of the encoder in a file. Raises ConfigError when it is another encoder than `name`."""
    found = load_encoder(init, CPU, views=1)
    if found.name != name:
        raise ConfigError(f"{init} holds a {found.name}, not a {name}", hint=f"give --encoder {found.name}")
    weights: dict[str, torch.Tensor] = found.encoder.state_dict()
    return weights


def validation_way(t: Training) -> int:
    """The ways of the measurement after each epoch."""
    return min(QUICK_WAY, len(t.source.split("val").classes)) if t.source.has("val") else QUICK_WAY


def _validation(t: Training, image: dict[str, Any]) -> Callable[[Encoder], float | None]:
    """The measurement after each epoch: prototype, 1-shot, on part of the validation images."""
    if not t.source.has("val"):
        return lambda encoder: None
    val, config = t.source.split("val"), t.config

    def validate(encoder: Encoder) -> float | None:
        frozen = ImageEncoder(
            encoder, config.encoder, image["size"], tuple(image["mean"]), tuple(image["std"]), 1, t.device
        )
        batch = config.runtime.batch_size
        return t.group.on_rank_zero(
            lambda: quick_accuracy(frozen, val.images, val.labels, batch=batch, seed=config.seed)
        )

    return validate


def _show(
    t: Training, trainer: Pretrainer, header: dict[str, Any], record: PretrainStep | PretrainEpoch, update: Update
) -> bool:
    """Draw a record; at the end of an epoch write metrics and the best encoder, and have the state saved."""
    if isinstance(record, PretrainStep):
        done = (record.epoch - 1) * record.steps + record.step
        text = f"epoch {record.epoch} loss {record.loss:.3f} train {record.accuracy:.1f} %"
        update(done, trainer.steps, text)
        return False
    measured = ""
    if record.validation is not None:
        measured = f"  {validation_way(t)}-way 1-shot on validation classes {record.validation:.1f} %"
    t.screen.note(
        f"epoch {record.epoch}/{record.epochs} ({record.size} px)  loss {record.loss:.3f}"
        f"  train {record.accuracy:.1f} %{measured}{'  best' if record.best and measured else ''}"
    )
    t.run.save_metrics(trainer.history, "pretrain")
    if record.best and t.group.rank == 0:
        _save_best(t, trainer, header)
    return True


def _keep(t: Training, trainer: Pretrainer, header: dict[str, Any]) -> Path:
    """Write the best encoder into the run directory and to where later runs find it."""
    _save_best(t, trainer, header)
    val = t.source.split("val") if t.source.has("val") else None
    path = kept_encoder(encoder_key(t.config, t.source.split("train"), val, file_digest(t.start.init)))
    save_checkpoint(path, "encoder", _best(trainer), {**header, "metrics": {"validation": trainer.best_value}})
    return path


def _save_best(t: Training, trainer: Pretrainer, header: dict[str, Any]) -> None:
    best = next(row for row in reversed(trainer.history) if row["best"])
    metrics = {key: best[key] for key in ("epoch", "validation")}
    save_checkpoint(t.run.folder / ENCODER, "encoder", _best(trainer), {**header, "metrics": metrics})


def _best(trainer: Pretrainer) -> dict[str, torch.Tensor]:
    return {f"encoder.{name}": tensor for name, tensor in trainer.best.items()}
