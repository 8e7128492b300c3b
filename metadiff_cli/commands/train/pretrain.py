"""`metadiff pretrain`: train an encoder on the base classes."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from metadiff_cli.commands import options
from metadiff_cli.commands.train.pretrained import trains_no_library
from metadiff_cli.config.load import resolve
from metadiff_cli.config.schema import Config
from metadiff_cli.console import Screen
from metadiff_cli.core.training.world import world

if TYPE_CHECKING:
    from metadiff_cli.commands.train.run_folder import Run, Source
    from metadiff_cli.core.training.pretrain import PretrainEpoch, Pretrainer, PretrainStep


def pretrain(
    preset: options.Preset = None,
    data: options.Data = None,
    encoder: options.EncoderOption = None,
    epochs: Annotated[
        int | None,
        typer.Option(
            "--epochs",
            min=1,
            metavar="N",
            help=options.shown("Passes over the base classes.", "the preset's"),
            rich_help_panel=options.TRAINING,
        ),
    ] = None,
    out: options.Out = None,
    overwrite: options.Overwrite = False,
    resume: options.Resume = False,
    init_from: options.InitFrom = None,
    dry_run: options.DryRun = False,
    config: options.ConfigFile = None,
    settings: options.Settings = None,
    seed: options.Seed = None,
    device: options.Device = None,
    threads: options.Threads = None,
    num_workers: options.NumWorkers = None,
    batch_size: options.BatchSize = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Train an encoder on base classes.

    After each epoch it is measured on validation classes, and the best one
    is kept. `metatrain` does this by itself where there is no encoder yet.

    Examples:

      metadiff pretrain --preset mini-5w1s --data ./mini-imagenet -o runs/conv4

      metadiff pretrain --preset folder --data ./photos --encoder conv4
    """
    screen = Screen(quiet=quiet, verbose=verbose)
    flags = options.runtime_flags(seed, device, threads, num_workers, batch_size)
    resolved = resolve(preset, config, settings or (), {**flags, "encoder": encoder, "pretrain.epochs": epochs})
    trains_no_library(resolved, "pretrain")
    if dry_run:
        from metadiff_cli.commands.train.plan import show_plan

        return show_plan("pretrain", resolved, data, screen, as_json=as_json)
    from metadiff_cli.commands.train.run_folder import ENCODER, find_data, open_run, open_source
    from metadiff_cli.core.checkpoints.file import read_header

    find_data(resolved, data)  # before anything is written
    if init_from is not None:
        read_header(init_from)  # raises when it is no such file
    place = out or Path("runs") / f"{resolved.name}-encoder"
    with open_run(place, "pretrain", resolved, overwrite=overwrite, resume=resume) as run:
        source = open_source(resolved, data, screen)
        trainer, _ = pretrain_encoder(resolved, source, run, screen, init_from)
        run.save_manifest(data=source.dataset.root, classes=len(source.split("train").classes))
    result = {
        "schema": "metadiff.pretrain/1",
        "encoder": str(run.folder / ENCODER),
        "epochs": trainer.epoch,
        "validation": trainer.best_validation,
    }
    if as_json:
        screen.json(result)
    else:
        shown = "not measured" if trainer.best_validation is None else f"{trainer.best_validation:.1f} %"
        screen.text(f"encoder: {result['encoder']}  (prototype, 5-way 1-shot, validation classes: {shown})")


def pretrain_encoder(
    config: Config, source: "Source", run: "Run", screen: Screen, init: Path | None = None
) -> tuple["Pretrainer", Path]:
    """Train into the run directory, from its state file when there is one, else from the weights in the file `init`.

    The best encoder is also kept by its key, in the file that is returned.
    """
    from metadiff_cli.commands.train.resume import file_digest, follow
    from metadiff_cli.commands.train.run_folder import ENCODER_STATE, encoder_key, kept_encoder
    from metadiff_cli.commands.train.starting import Start
    from metadiff_cli.core.checkpoints.file import save_checkpoint
    from metadiff_cli.core.training.distributed import on_main
    from metadiff_cli.files import cache_dir

    train, val = source.split("train"), source.split("val") if source.has("val") else None
    trainer, header = _new_trainer(config, source, init)
    follow(
        trainer, _validation(config, source, header["image"]), partial(_show, run, trainer, header, screen),
        label="pretraining", state=run.folder / ENCODER_STATE, screen=screen,
        identity=Start(init=init).identity(config, "pretrain", source),
    )  # fmt: skip
    metrics = {"validation": trainer.best_validation}

    def keep() -> Path:
        _save_best(run, trainer, header)
        path = kept_encoder(encoder_key(config, train, val, file_digest(init)))
        save_checkpoint(path, "encoder", _best(trainer), {**header, "metrics": metrics})
        return path

    path = on_main(keep)
    if (cache := cache_dir()) not in path.parents:
        screen.note(f"{cache / 'encoders'} cannot be written to: the encoder is kept in {path.parent}")
    return trainer, path


def _new_trainer(config: Config, source: "Source", init: Path | None) -> tuple["Pretrainer", dict[str, Any]]:
    import torch

    from metadiff_cli.commands.train.starting import encoder_weights
    from metadiff_cli.core.device import keep_freed_memory, pick_device, set_threads
    from metadiff_cli.core.encoders.networks import build_encoder
    from metadiff_cli.core.training.pretrain import Pretrainer
    from metadiff_cli.data.cache import channel_statistics

    keep_freed_memory()
    set_threads(config.runtime.threads)
    train = source.split("train")
    mean, std = channel_statistics(train.images)
    torch.manual_seed(config.seed)
    encoder = build_encoder(config.encoder)
    if init is not None:
        encoder.load_state_dict(encoder_weights(init, config.encoder))
    trainer = Pretrainer(
        encoder, config.pretrain, train.images, train.labels, classes=len(train.classes),
        size=config.data.size, mean=mean, std=std, seed=config.seed, device=pick_device(config.runtime.device),
    )  # fmt: skip
    header = {
        "encoder": config.encoder,
        "classes": list(train.classes),
        "image": {"size": config.data.size, "mean": mean, "std": std},
        "config": config.model_dump(mode="json", exclude={"runtime"}),
    }
    return trainer, header


def _best(trainer: "Pretrainer") -> dict[str, Any]:
    return {f"encoder.{name}": tensor for name, tensor in trainer.best.items()}


def _position(record: "PretrainStep", epochs: int) -> tuple[int, int, str]:
    done = (record.epoch - 1) * record.steps + record.step
    return done, epochs * record.steps, f"epoch {record.epoch} loss {record.loss:.3f} train {record.accuracy:.1f} %"


def _show(
    run: "Run", trainer: "Pretrainer", header: dict[str, Any], screen: Screen,
    record: "PretrainStep | PretrainEpoch", update: Any,
) -> bool:  # fmt: skip
    """Draw a record; at the end of an epoch write metrics and the best encoder, and have the state saved."""
    from metadiff_cli.core.training.pretrain import PretrainEpoch

    if not isinstance(record, PretrainEpoch):
        update(*_position(record, trainer.config.epochs))
        return False
    shown = "" if record.validation is None else f"  5-way 1-shot on validation classes {record.validation:.1f} %"
    screen.note(
        f"epoch {record.epoch}/{record.epochs} ({record.size} px)  loss {record.loss:.3f}"
        f"  train {record.accuracy:.1f} %{shown}{'  best' if record.best and shown else ''}"
    )
    run.save_metrics(trainer.history, "pretrain")
    if record.best and world().main:
        _save_best(run, trainer, header)
    return True


def _save_best(run: "Run", trainer: "Pretrainer", header: dict[str, Any]) -> None:
    from metadiff_cli.commands.train.run_folder import ENCODER
    from metadiff_cli.core.checkpoints.file import save_checkpoint

    best = next(row for row in reversed(trainer.history) if row["best"])
    metrics = {key: best[key] for key in ("epoch", "validation")}
    save_checkpoint(run.folder / ENCODER, "encoder", _best(trainer), {**header, "metrics": metrics})


def _validation(config: Config, source: "Source", image: dict[str, Any]) -> Any:
    """The measurement after each epoch: prototype, 5-way 1-shot, on part of the validation images."""
    from metadiff_cli.core.encoders.image_encoder import ImageEncoder
    from metadiff_cli.core.evaluation.evaluate import quick_accuracy
    from metadiff_cli.core.training.distributed import on_main

    if not source.has("val"):
        return lambda encoder: None
    val = source.split("val")

    def validate(encoder: Any) -> float | None:
        device = next(encoder.parameters()).device
        frozen = ImageEncoder(
            encoder, config.encoder, image["size"], tuple(image["mean"]), tuple(image["std"]), False, device
        )
        batch = config.runtime.batch_size
        return on_main(lambda: quick_accuracy(frozen, val.images, val.labels, batch=batch, seed=config.seed))

    return validate
