"""`--dry-run`: what `pretrain` and `metatrain` would do, on which data, and about how long it takes on this machine.

Nothing is written. Times come from a few real steps: a handful of images is decoded and trained on, and episodes of
random features of the right size stand in for those that are not computed yet.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metadiff_cli.config.schema import Config, is_pretrained
from metadiff_cli.console import Screen

if TYPE_CHECKING:
    import numpy as np
    import torch

    from metadiff_cli.commands.train.run_folder import Source
    from metadiff_cli.core.encoders.image_encoder import ImageEncoder
    from metadiff_cli.core.encoders.networks import Encoder

BATCHES = 2  # of pretraining that are timed, after as many that warm up
META_STEPS, EPISODES = 4, 10  # likewise of meta-training and of evaluation
CONFIRMING = 1000  # episodes, at least, of the last comparison with `analytic`


@dataclass(frozen=True)
class Stage:
    """One part of the work: `amount` of `unit`, and the estimated seconds."""

    stage: str
    amount: int
    unit: str
    seconds: float


def show_plan(
    command: str, config: Config, data: Path | None, screen: Screen, *, as_json: bool, encoder: Path | None = None
) -> None:
    """Find the data, time a few steps, and print the plan of `command` (pretrain or metatrain)."""
    document = make_plan(command, config, data, screen, encoder)
    if as_json:
        screen.json(document)
        return
    for note in document["data"]["notes"]:
        screen.text(note)
    rows = [(name, *(str(split[key]) for key in ("classes", "images")), "yes" if split["decoded"] else "no")
            for name, split in document["data"]["splits"].items()]  # fmt: skip
    screen.table(f"Data in {document['data']['root']}", ("split", "classes", "images", "in the cache"), rows)
    screen.text(f"encoder: {_encoder_line(document['encoder'])}")
    if command == "metatrain":
        kind, count = document["denoiser"]["kind"], document["denoiser"]["parameters"]
        screen.text(f"denoiser: {kind}, {count:,} parameters")
    stages = [(s["stage"], f"{s['amount']:,} {s['unit']}", _duration(s["seconds"])) for s in document["stages"]]
    stages.append(("in all, about", "", _duration(document["seconds"])))
    screen.table(f"Plan of {command} on {document['device']}", ("stage", "work", "time"), stages)
    screen.text("nothing was written; times are from a few steps and leave out start-up and fitting the confidence")


def make_plan(command: str, config: Config, data: Path | None, screen: Screen, encoder: Path | None) -> dict[str, Any]:
    """The document of `--dry-run --json`."""
    from metadiff_cli.commands.settings import start
    from metadiff_cli.commands.train.run_folder import open_source
    from metadiff_cli.data.folders import require_split

    device = start(config)
    source = open_source(config, data, Screen(quiet=True))
    train = require_split(source.dataset, "train")
    with screen.progress("timing a few steps"):
        frozen = _frozen(config, encoder, device)
        ready = encoder is not None or is_pretrained(config.encoder)
        if ready:  # then the encoder says which size images are read in
            config = config.model_copy(update={"data": config.data.model_copy(update={"size": frozen.size})})
            source.config = config
        network, kept = frozen.encoder, encoder or _kept_encoder(source)
        images, labels, read = _sample(source)
        stages = _reading(source, read)
        if command == "pretrain" or (kept is None and not ready):
            stages.append(_pretraining(config, network, images, labels, len(train.classes), len(train.labels), device))
        document: dict[str, Any] = {
            "schema": "metadiff.plan/1",
            "command": command,
            "name": config.name,
            "device": str(device),
            "data": _describe(source),
            "encoder": {
                "name": frozen.name, "parameters": _parameters(network),
                "feature_size": network.feature_size(config.data.size),
                "kept": str(kept) if kept and command == "metatrain" else None,
            },
        }  # fmt: skip
        if command == "metatrain":
            stages.append(_features(source, frozen, images))
            more, parameters = _meta_training(config, network.feature_size(config.data.size), device)
            stages += more
            document["denoiser"] = {"kind": config.denoiser.kind, "parameters": parameters}
    document["stages"] = [{**asdict(stage), "seconds": round(stage.seconds, 1)} for stage in stages]
    document["seconds"] = round(sum(stage.seconds for stage in stages), 1)
    return document


def _describe(source: "Source") -> dict[str, Any]:
    splits = {
        name: {"classes": len(s.classes), "images": len(s.labels), "decoded": _decoded(source, name) is not None}
        for name, s in source.dataset.splits.items()
    }
    dataset = source.dataset
    return {"name": dataset.name, "root": dataset.root, "splits": splits, "notes": list(dataset.notes)}


def _decoded(source: "Source", name: str) -> Any:
    from metadiff_cli.data.cache import decoded_already
    from metadiff_cli.files import cache_dir

    return decoded_already(source.dataset.splits[name], source.config.data.size, cache_dir() / "images")


def _kept_encoder(source: "Source") -> Path | None:
    """The encoder that `metatrain` would find; its name needs the images' hash, known once they are decoded."""
    from metadiff_cli.commands.train.run_folder import encoder_key, kept_encoder

    train = _decoded(source, "train")
    val = _decoded(source, "val") if source.has("val") else None
    if train is None or (val is None and source.has("val")):
        return None
    path = kept_encoder(encoder_key(source.config, train, val))
    return path if path.is_file() else None


def _frozen(config: Config, file: Path | None, device: "torch.device") -> "ImageEncoder":
    """The encoder that is planned for: that of a file, else a network of the right shape without trained weights."""
    from metadiff_cli.core.checkpoints.model import load_encoder
    from metadiff_cli.core.encoders.image_encoder import ImageEncoder
    from metadiff_cli.core.encoders.library import untrained_encoder, with_statistics
    from metadiff_cli.core.encoders.networks import build_encoder

    f = config.features
    if file is not None:
        return load_encoder(file, device, mirror=f.mirror, shift=f.shift, size=f.size)
    if is_pretrained(config.encoder):
        return with_statistics(untrained_encoder(config.encoder, f.size), device, mirror=f.mirror, shift=f.shift)
    half = (0.5,) * 3
    return ImageEncoder(
        build_encoder(config.encoder), config.encoder, config.data.size, half, half, f.mirror, device, f.shift
    )


def _sample(source: "Source") -> tuple["np.ndarray", "np.ndarray", float]:
    """Images (n, S, S, 3) and labels (n,) for BATCHES batches, and the seconds that one took to decode."""
    import numpy as np

    from metadiff_cli.data.cache import decode_images
    from metadiff_cli.data.images import to_square
    from metadiff_cli.errors import DataError

    split, size = source.dataset.splits["train"], source.config.data.size
    count = min(BATCHES * source.config.pretrain.batch, len(split.labels))
    rows = np.linspace(0, len(split.labels) - 1, count).astype(int).tolist()
    started = time.perf_counter()
    if split.pixels is None:
        workers = source.config.runtime.num_workers
        found = [pixels for _, pixels in decode_images([Path(split.paths[i]) for i in rows], size, workers=workers)]
    else:
        from PIL import Image

        found = [to_square(Image.fromarray(split.pixels[i]), size) for i in rows]
    seconds = (time.perf_counter() - started) / count
    good = [(pixels, split.labels[i]) for pixels, i in zip(found, rows, strict=True) if not isinstance(pixels, str)]
    if not good:
        raise DataError("none of the images that were tried can be read", hint="metadiff data verify DIR")
    return np.stack([pixels for pixels, _ in good]), np.array([label for _, label in good]), seconds


def _reading(source: "Source", seconds: float) -> list[Stage]:
    left = sum(len(s.labels) for name, s in source.dataset.splits.items() if _decoded(source, name) is None)
    return [Stage("read images", left, "images", left * seconds)] if left else []


def _pretraining(
    config: Config, encoder: "Encoder", images: "np.ndarray", labels: "np.ndarray", classes: int, total: int,
    device: "torch.device",
) -> Stage:  # fmt: skip
    """Every image size of the configured stages is timed on its own."""
    from metadiff_cli.core.training.pretrain import Pretrainer
    from metadiff_cli.data.cache import channel_statistics

    mean, std = channel_statistics(images)
    short = config.pretrain.model_copy(update={"epochs": 2, "stages": ()})
    steps, seconds = max(1, total // config.pretrain.batch), {}

    def trainer(settings: Any, size: int) -> Pretrainer:
        return Pretrainer(encoder, settings, images, labels, classes=classes, size=size, mean=mean, std=std,
                          seed=config.seed, device=device)  # fmt: skip

    whole = trainer(config.pretrain, config.data.size)
    sizes = [whole.size_of(epoch) for epoch in range(config.pretrain.epochs)]
    for size in set(sizes):
        seconds[size] = _second_epoch(trainer(short, size), max(1, len(labels) // config.pretrain.batch))
    total_seconds = sum(steps * seconds[size] for size in sizes)
    return Stage("pretrain the encoder", steps * len(sizes), f"steps in {len(sizes)} epochs", total_seconds)


def _second_epoch(trainer: Any, steps: int) -> float:
    """Seconds of a step in the second epoch; the first one warms up."""
    from metadiff_cli.core.training.pretrain import PretrainEpoch

    ends = [time.perf_counter() for record in trainer.run(lambda encoder: None) if isinstance(record, PretrainEpoch)]
    return (ends[1] - ends[0]) / steps


def _features(source: "Source", frozen: "ImageEncoder", images: "np.ndarray") -> Stage:
    import torch

    pixels = torch.from_numpy(images)
    each = _timed(lambda: frozen.encode(pixels).cpu()) / len(images)
    total = sum(len(split.labels) for split in source.dataset.splits.values())
    return Stage("features", total, "images", total * each)


def _meta_training(config: Config, size: int, device: "torch.device") -> tuple[list[Stage], int]:
    """Training steps, validations and the final table; and the parameters of the denoiser."""
    from dataclasses import replace

    from metadiff_cli.core.evaluation.evaluate import Protocol
    from metadiff_cli.core.method.adapt import MetaDiff, Tuning
    from metadiff_cli.core.method.denoisers import AnalyticDenoiser
    from metadiff_cli.core.training.fit import paired_gain

    m, e = config.metatrain, config.evaluation
    bank, space = _stand_in(config, size)
    metadiff = MetaDiff(space.to(device), AnalyticDenoiser(), False, Tuning())
    stages, parameters, measured = [], 0, 2 * e.episodes
    if config.denoiser.kind != "analytic":
        trainer, each = _trained(config, bank, space, device)
        stages.append(Stage("meta-train the denoiser", m.steps, "steps", m.steps * each))
        metadiff, parameters = (
            replace(metadiff, denoiser=trainer.averaged(), learned=True),
            _parameters(trainer.denoiser),
        )
        measured += -(-m.steps // m.validate_every) * m.validation_episodes + max(m.validation_episodes, CONFIRMING)
    protocol = Protocol(e.way, e.shot, e.query, EPISODES, config.seed)
    each = _timed(lambda: paired_gain(metadiff, bank, protocol, device)) / EPISODES
    return [*stages, Stage("validate and evaluate", measured, "episodes", measured * each)], parameters


def _trained(config: Config, bank: Any, space: Any, device: "torch.device") -> tuple[Any, float]:
    """A trainer after a few steps, and the seconds of one of them."""
    from metadiff_cli.core.training.metatrain import MetaTrainer, MetaValidation

    few = config.metatrain.model_copy(update={"steps": 2 * META_STEPS, "validate_every": META_STEPS})
    trainer = MetaTrainer(bank, space, config.denoiser, few, seed=config.seed, device=device)
    ends = [time.perf_counter() for record in trainer.run(lambda denoiser: None) if isinstance(record, MetaValidation)]
    return trainer, (ends[1] - ends[0]) / META_STEPS


def _stand_in(config: Config, size: int) -> tuple[Any, Any]:
    """Random unit features of just enough classes and images for the configured episodes, and their task space."""
    import numpy as np
    import torch

    from metadiff_cli.core.encoders.bank import FeatureBank
    from metadiff_cli.core.method.task_space import identity_space

    m, e = config.metatrain, config.evaluation
    classes, images = max(m.ways[1], e.way), max(m.shots[1] + m.query, e.shot + e.query) + 1
    features = np.random.default_rng(config.seed).normal(size=(classes * images, size)).astype(np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    bank = FeatureBank(features, np.repeat(np.arange(classes), images), tuple(map(str, range(classes))))
    return bank, identity_space(torch.from_numpy(features[rows]) for rows in bank.class_indices())


def _timed(work: Callable[[], object]) -> float:
    """Seconds of the second call."""
    work()
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _parameters(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _encoder_line(encoder: dict[str, Any]) -> str:
    kept = f"; taken from {encoder['kept']}" if encoder["kept"] else ""
    return f"{encoder['name']}, {encoder['parameters']:,} parameters, D = {encoder['feature_size']}{kept}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
