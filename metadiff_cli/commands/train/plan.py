"""`--dry-run`: the data that was found, the steps and parameters, and a rough estimate of the time. Writes nothing."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from metadiff_cli.commands.runtime import start
from metadiff_cli.commands.train.data import Data, open_sources
from metadiff_cli.commands.train.encoder import encoder_key, kept_encoder
from metadiff_cli.commands.train.few_images import drawn_splits, fitted, too_small
from metadiff_cli.commands.train.stages import CONFIRMING
from metadiff_cli.config.schema import Config, is_pretrained
from metadiff_cli.console import Screen
from metadiff_cli.core.checkpoints.model import load_encoder
from metadiff_cli.core.device import CPU
from metadiff_cli.core.encoders.image_encoder import MIRRORED
from metadiff_cli.core.encoders.library import untrained_encoder
from metadiff_cli.core.encoders.networks import Encoder, build_encoder
from metadiff_cli.core.method.denoisers import build_denoiser
from metadiff_cli.core.training.pretrain import scaled
from metadiff_cli.data.cache import DecodedSplit, decoded_already
from metadiff_cli.data.folders import Split
from metadiff_cli.data.open import Source
from metadiff_cli.files import cache_dir

# rough figures per second on two CPU cores
TRAINED = {"conv4": 400, "conv4-padded": 400, "resnet10": 240, "resnet12": 15}  # images of TRAINED_SIDE pixels
TRAINED_SIDE = 84
ENCODED = 3  # times as many images pass a frozen encoder
LIBRARY = 20  # images that pass an encoder of a library
READ = 200  # images that are decoded
TASKS, EPISODES = 300, 350  # of meta-training and of evaluation


@dataclass(frozen=True)
class Stage:
    """One part of the work: `amount` of `unit`, and the estimated seconds."""

    stage: str
    amount: int
    unit: str
    seconds: float


@dataclass(frozen=True)
class PlannedEncoder:
    """The encoder that would be used: name, network, image size, and whether it is there already."""

    name: str
    network: Encoder
    size: int
    given: bool


def show_plan(
    command: str, config: Config, data: Data, screen: Screen, *, as_json: bool, encoder: Path | None = None
) -> None:
    """Find the data and print the plan of `command` (pretrain or metatrain); `encoder` is the file of --encoder."""
    document = make_plan(command, config, data, encoder, screen)
    if as_json:
        screen.json(document)
        return
    sets = (document["data"], *document.get("further_data", ()))
    for note in (note for data_set in sets for note in data_set["notes"]):
        screen.text(note)
    for data_set in sets:
        rows = [(name, *(str(split[key]) for key in ("classes", "images")), "yes" if split["decoded"] else "no")
                for name, split in data_set["splits"].items()]  # fmt: skip
        screen.table(f"Data in {data_set['root']}", ("split", "classes", "images", "in the cache"), rows)
    screen.text(f"encoder: {_encoder_line(document['encoder'])}")
    if command == "metatrain":
        kind, count = document["denoiser"]["kind"], document["denoiser"]["parameters"]
        screen.text(f"denoiser: {kind}, {count:,} parameters")
    stages = [(s["stage"], f"{s['amount']:,} {s['unit']}", _duration(s["seconds"])) for s in document["stages"]]
    stages.append(("in all, about", "", _duration(document["seconds"])))
    screen.table(f"Plan of {command} on {document['device']}", ("stage", "work", "time"), stages)
    screen.text("nothing was written; times are rough estimates for two CPU cores, and a GPU is far faster")


def make_plan(command: str, config: Config, data: Data, encoder: Path | None, screen: Screen) -> dict[str, Any]:
    """The document of `--dry-run --json`. Raises DataError where the run itself would."""
    device = start(config)
    source, *further = sources = open_sources(config, data, Screen(quiet=True))
    config = _fitted(config, sources, encoder, command, screen, validated=bool(data.validation))
    planned = _planned(config, encoder)
    kept = encoder or _kept_encoder(source)
    size = sum(planned.network.groups(planned.size))
    document: dict[str, Any] = {
        "schema": "metadiff.plan/1",
        "command": command,
        "name": config.name,
        "device": str(device),
        "data": _describe(source, planned.size),
        "encoder": {
            "name": planned.name,
            "parameters": _parameters(planned.network),
            "feature_size": size,
            "kept": str(kept) if kept and command == "metatrain" else None,
        },
    }
    if further:
        document["further_data"] = [_describe(of, planned.size) for of in further]
    stages = _reading(sources, planned.size)
    if command == "pretrain" or (kept is None and not planned.given):
        stages.append(_pretraining(config, source))
    if command == "metatrain":
        document["denoiser"] = {"kind": config.denoiser.kind, "parameters": _denoiser_parameters(config, size)}
        stages += [_features(config, sources, planned), *_meta_training(config)]
    document["stages"] = [{**asdict(stage), "seconds": round(stage.seconds, 1)} for stage in stages]
    document["seconds"] = round(sum(stage.seconds for stage in stages), 1)
    return document


def _fitted(
    config: Config, sources: Sequence[Source], encoder: Path | None, command: str, screen: Screen, *, validated: bool
) -> Config:
    """The configuration as the run would fit it to the data, by the files that were found; see `fitted_to_data`."""
    first, *further = sources
    splits = {name: _counts(split) for name, split in first.dataset.splits.items()}
    for source in (source for source in further if source.has("train")):
        counts = _counts(source.dataset.splits["train"])
        splits["train"] |= {f"{source.dataset.name}/{cls}": n for cls, n in counts.items()}
    left_out = too_small(splits, screen.warn)
    used = {name: counts for name, counts in splits.items() if name not in left_out}
    trains = command == "pretrain" or (encoder is None and not is_pretrained(config.encoder))
    stages = [*(["pretrain"] if trains else []), *(["metadiff"] if command == "metatrain" else [])]
    return fitted(config, used, stages, drawn_splits(used, several=bool(further), validated=validated), screen.warn)


def _counts(split: Split) -> dict[str, int]:
    counts = np.bincount(split.labels, minlength=len(split.classes)).tolist()
    return dict(zip(split.classes, counts, strict=True))


def _planned(config: Config, file: Path | None) -> PlannedEncoder:
    """The encoder of the file, else one of the right shape without trained weights."""
    f = config.features
    if file is not None:
        images = load_encoder(file, CPU, views=f.views, shift=f.shift, size=f.size)
        return PlannedEncoder(images.name, images.encoder, images.size, True)
    if is_pretrained(config.encoder):
        library = untrained_encoder(config.encoder, f.size)
        return PlannedEncoder(library.source.name, library, library.size, True)
    with torch.device("meta"):
        network = build_encoder(config.encoder)
    return PlannedEncoder(config.encoder, network, config.data.size, False)


def _kept_encoder(source: Source) -> Path | None:
    """The encoder that `metatrain` would find; its key needs the images' hash, known once they are decoded."""
    size = source.config.data.size
    train = _decoded(source, "train", size)
    val = _decoded(source, "val", size) if source.has("val") else None
    if train is None or (val is None and source.has("val")):
        return None
    path = kept_encoder(encoder_key(source.config, train, val))
    return path if path.is_file() else None


def _describe(source: Source, size: int) -> dict[str, Any]:
    splits = {
        name: {
            "classes": len(split.classes),
            "images": len(split.labels),
            "decoded": _decoded(source, name, size) is not None,
        }
        for name, split in source.dataset.splits.items()
    }
    dataset = source.dataset
    return {"name": dataset.name, "root": dataset.root, "splits": splits, "notes": list(dataset.notes)}


def _decoded(source: Source, name: str, size: int) -> DecodedSplit | None:
    return decoded_already(source.dataset.splits[name], size, cache_dir() / "images")


def _reading(sources: Sequence[Source], size: int) -> list[Stage]:
    splits = [(source, name, split) for source in sources for name, split in source.dataset.splits.items()]
    left = sum(len(split.labels) for source, name, split in splits if _decoded(source, name, size) is None)
    return [Stage("read images", left, "images", left / READ)] if left else []


def _pretraining(config: Config, source: Source) -> Stage:
    p, images = config.pretrain, len(source.dataset.splits["train"].labels)
    sizes = [(share, scaled(config.data.size, scale)) for share, scale in p.stages] or [(1.0, config.data.size)]
    area = sum(share * (size / TRAINED_SIDE) ** 2 for share, size in sizes)
    copies = 2 if p.rotation_weight > 0 else 1
    steps = p.epochs * max(1, images // p.batch)
    seconds = steps * min(p.batch, images) * copies * area / TRAINED[config.encoder]
    return Stage("pretrain the encoder", steps, f"steps in {p.epochs} epochs", seconds)


def _features(config: Config, sources: Sequence[Source], planned: PlannedEncoder) -> Stage:
    views: int = config.features.views
    if config.features.shift:
        views += 8 * (2 if views in MIRRORED else 1)
    total = sum(len(split.labels) for source in sources for split in source.dataset.splits.values())
    speed: float = LIBRARY
    if planned.name in TRAINED:
        speed = ENCODED * TRAINED[planned.name] * (TRAINED_SIDE / (config.features.size or planned.size)) ** 2
    return Stage("features", total, "images", total * views / speed)


def _meta_training(config: Config) -> list[Stage]:
    """Training steps, validations and the final table."""
    m, e = config.metatrain, config.evaluation
    stages, episodes = [], 2 * e.episodes
    if config.denoiser.kind != "analytic":
        stages.append(Stage("meta-train the denoiser", m.steps, "steps", m.steps * m.batch / TASKS))
        episodes += -(-m.steps // m.validate_every) * m.validation_episodes + max(m.validation_episodes, CONFIRMING)
    return [*stages, Stage("validate and evaluate", episodes, "episodes", episodes / EPISODES)]


def _denoiser_parameters(config: Config, size: int) -> int:
    with torch.device("meta"):
        return _parameters(build_denoiser(config.denoiser.kind, size, config.denoiser.width))


def _parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _encoder_line(encoder: dict[str, Any]) -> str:
    kept = f"; taken from {encoder['kept']}" if encoder["kept"] else ""
    return f"{encoder['name']}, {encoder['parameters']:,} parameters, D = {encoder['feature_size']}{kept}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
