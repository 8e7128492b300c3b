"""What the stages of one run share: settings, data, run directory, screen, device, and the files to start from."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from metadiff_cli.commands.evaluate.methods import feature_bank
from metadiff_cli.commands.runtime import start as start_device
from metadiff_cli.commands.train.data import Data, open_sources
from metadiff_cli.commands.train.few_images import FEWEST, drawn_splits, fitted, too_small
from metadiff_cli.commands.train.run_folder import Run, depends
from metadiff_cli.config.schema import Config
from metadiff_cli.console import Screen
from metadiff_cli.core.baselines.learners import ON_IMAGES
from metadiff_cli.core.checkpoints.file import read_header
from metadiff_cli.core.checkpoints.model import load_model
from metadiff_cli.core.device import CPU
from metadiff_cli.core.distributed import Group
from metadiff_cli.core.encoders.bank import FeatureBank
from metadiff_cli.core.encoders.image_encoder import ImageEncoder
from metadiff_cli.core.training.metatrain import MetaTrainer
from metadiff_cli.data.cache import DecodedSplit
from metadiff_cli.data.open import Source
from metadiff_cli.errors import ConfigError


@dataclass(frozen=True)
class StartingWeights:
    """The files that a run starts from: a trained `encoder`, and weights `init` that training goes on with.

    An encoder file as `init` starts the training of the encoder. A checkpoint as `init` (then `checkpoint` is true)
    gives its encoder, unless there is another, and starts the training of the denoiser.
    """

    encoder: Path | None = None
    init: Path | None = None
    checkpoint: bool = False

    @classmethod
    def of(cls, encoder: Path | None, init: Path | None, method: str, denoiser: str) -> "StartingWeights":
        """From --encoder FILE and --init-from, for a `method` and the kind of `denoiser` that is configured.

        Raises ConfigError when the training could not start from these files, CheckpointError when they are damaged.
        """
        if method in ON_IMAGES and (encoder or init):
            raise ConfigError(
                f"{method} trains an encoder of its own",
                hint="leave out --encoder FILE and --init-from, or give a name",
            )
        header = None if init is None else read_header(init)
        checkpoint = header is not None and header["kind"] == "model"
        if checkpoint and method != "metadiff":
            raise ConfigError(f"--method {method} cannot start from {init}", hint="leave out --init-from")
        if init is not None and not checkpoint and encoder is not None:
            raise ConfigError(
                f"--init-from {init} has no effect here: --encoder already supplies a trained encoder",
                hint="leave out --encoder or --init-from",
            )
        if header is not None and checkpoint:
            _check_denoiser(header["denoiser"]["kind"], denoiser, init)
        return cls(encoder or (init if checkpoint else None), init, checkpoint)

    def begin(self, trainer: MetaTrainer) -> None:
        """Let the training of a denoiser begin with that of the checkpoint `init`, if it is one.

        Raises ConfigError when that denoiser is of another size.
        """
        if self.init is None or not self.checkpoint:
            return
        try:
            trainer.start_from(load_model(self.init, CPU).metadiff.denoiser)
        except ValueError as error:
            raise ConfigError(f"{self.init} holds {error}", hint="give its --set denoiser.width") from error


def _check_denoiser(found: str, wanted: str, path: Path | None) -> None:
    """Raise ConfigError when a checkpoint's denoiser of kind `found` is none that a `wanted` one could start from."""
    if found == "analytic":
        raise ConfigError(f"{path} holds no trained denoiser", hint=f"give --encoder {path} to start from its encoder")
    if found != wanted:
        raise ConfigError(f"{path} holds a denoiser of kind {found}", hint=f"add --set denoiser.kind={found}")


@dataclass(frozen=True)
class Base:
    """The features of the base classes, and the number of images of each class, by data set."""

    bank: FeatureBank
    sets: list[list[int]]


@dataclass(frozen=True)
class Training:
    """The surroundings of a run's stages.

    `source` is the first data set. `further` ones have base classes in their split "train", or validation classes in
    their split "val", or both. `validated` says that some were given for validation alone.
    """

    config: Config
    source: Source
    run: Run
    screen: Screen
    start: StartingWeights
    device: torch.device
    further: tuple[Source, ...] = field(default=())
    validated: bool = False

    @property
    def group(self) -> Group:
        """The processes that share the work."""
        return self.run.group

    def with_encoder(self, file: Path | None) -> "Training":
        """The same with `file` as the encoder that the run starts from."""
        return replace(self, start=replace(self.start, encoder=file))

    def fitted_to_data(self, stages: Sequence[str], size: int) -> "Training":
        """The same with episodes that the images can fill. They are read here; the first stage needs them at `size`.

        Raises DataError when they cannot fill any; see `few_images.fitted`.
        """
        method, sizes = stages[-1], {"train": size, "val": size}
        later = size if method in ON_IMAGES else self.config.features.size or size
        if method != "pretrain":
            sizes["test"] = later
        there = [name for name in sizes if name == "train" or self.source.has(name)]
        splits = {name: _counts(self.source.split(name, sizes[name])) for name in there}
        for source in self.further:
            found = {name: _counts(source.split(name, later)) for name in ("train", "val") if source.has(name)}
            splits["train"] |= {f"{source.dataset.name}/{cls}": n for cls, n in found.get("train", {}).items()}
        left_out = too_small(splits, self.screen.warn)
        kept = {name: split for name, split in self.source.dataset.splits.items() if name not in left_out}
        source = replace(self.source, dataset=replace(self.source.dataset, splits=kept))
        used = {name: counts for name, counts in splits.items() if name in kept}
        drawn = drawn_splits(used, several=bool(self.further), validated=self.validated)
        config = fitted(self.config, used, stages, drawn, self.screen.warn)
        return replace(self, source=source, config=config)

    @property
    def sources(self) -> tuple[Source, ...]:
        """All data sets."""
        return (self.source, *self.further)

    def base(self, images: ImageEncoder) -> Base:
        """The base classes of all data sets; with several, the name of a class begins with that of its set."""
        sources = [source for source in self.sources if source.has("train")]
        banks = [self.features(images, "train", source) for source in sources]
        sets = [[len(rows) for rows in bank.class_indices()] for bank in banks]
        if len(banks) == 1:
            return Base(banks[0], sets)
        first = np.cumsum([0, *(len(bank.classes) for bank in banks)])
        classes = [f"{s.dataset.name}/{cls}" for s, bank in zip(sources, banks, strict=True) for cls in bank.classes]
        labels = np.concatenate([bank.labels + start for bank, start in zip(banks, first[:-1], strict=True)])
        return Base(FeatureBank(np.concatenate([bank.features for bank in banks]), labels, tuple(classes)), sets)

    def validation(self, images: ImageEncoder) -> dict[str, FeatureBank]:
        """The validation classes of each data set that has any, by its name.

        Classes of one image are left out, and sets of one class.
        """
        found = {}
        for source in (source for source in self.sources if source.has("val")):
            bank, name = self.features(images, "val", source), source.dataset.name
            bank, left_out = bank.with_images(FEWEST)
            if left_out:
                self.screen.note(f"{name}: {len(left_out)} validation classes of one image are left out")
            if len(bank.classes) < FEWEST:
                self.screen.warn(f"{name} has too few validation classes, and is left out")
                continue
            found[name] = bank
        return found

    def features(self, images: ImageEncoder, split: str, source: Source | None = None) -> FeatureBank:
        """The features of a split of a data set, by default of the first, from the cache when they are there."""
        return feature_bank(images, source or self.source, split, self.config, self.screen, self.group)

    def identity(self, method: str, frozen: ImageEncoder | None = None) -> dict[str, Any]:
        """All that the result of a training depends on; `frozen` is its encoder where it does not train that."""
        size = frozen.size if frozen else None
        return depends(
            self.config,
            method,
            method=method,
            train=self._keys("train", size),
            val=self._keys("val", size),
            frozen=frozen.key[:12] if frozen else None,
            init=file_digest(self.start.init),
        )

    def _keys(self, split: str, size: int | None) -> str | None:
        """What identifies the images of a split of all data sets."""
        keys = [source.split(split, size).key for source in self.sources if source.has(split)]
        return "+".join(key[:12] for key in keys) if len(keys) > 1 else next(iter(keys), None)


def begin(config: Config, data: Data, run: Run, screen: Screen, start: StartingWeights) -> Training:
    """Open the data sets, pick the device, and set threads and memory."""
    device = start_device(config, run.group)

    def in_turn(decode: Callable[[], DecodedSplit]) -> DecodedSplit:
        decoded = run.group.rank_zero_first(decode)
        run.group.check_equal(decoded.key, "the images")
        return decoded

    first, *further = open_sources(config, data, screen, in_turn)
    return Training(config, first, run, screen, start, device, tuple(further), validated=bool(data.validation))


def _counts(split: DecodedSplit) -> dict[str, int]:
    counts = np.bincount(split.labels, minlength=len(split.classes))
    return dict(zip(split.classes, counts.tolist(), strict=True))


def file_digest(path: Path | None) -> str | None:
    """Identifies the content of a file that a training starts from."""
    if path is None:
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]
