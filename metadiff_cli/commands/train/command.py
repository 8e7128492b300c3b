"""`metadiff pretrain` and `metadiff metatrain`: their options."""

from pathlib import Path
from typing import Annotated

import typer

from metadiff_cli.commands import completions, options


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

    After each epoch the encoder is measured on validation classes, and the
    best one is kept. `metatrain` trains an encoder by itself if it needs one.

    Examples:

      metadiff pretrain --preset mini-5w1s --data ./mini-imagenet -o runs/conv4

      metadiff pretrain --preset folder --data ./photos --encoder conv4
    """
    from metadiff_cli.commands.train.data import Data
    from metadiff_cli.commands.train.run import Request, run_pretrain

    flags = options.runtime_flags(seed, device, threads, num_workers, batch_size)
    flags |= {"encoder": encoder, "pretrain.epochs": epochs}
    run_pretrain(Request(
        preset, config, settings or (), flags, Data(() if data is None else (data,)), out, overwrite, resume, init_from,
        dry_run, as_json, quiet, verbose,
    ))  # fmt: skip


def metatrain(
    preset: options.Preset = None,
    data: Annotated[
        list[Path] | None,
        options.path(
            options.PLACES,
            "--data",
            metavar="DIR",
            default="$METADIFF_DATA_DIR/NAME",
            help="Folder of a data set with base classes; repeatable where the encoder comes trained.",
        ),
    ] = None,
    val_data: Annotated[
        list[Path] | None,
        options.path(
            options.PLACES,
            "--val-data",
            metavar="DIR",
            help="Folder of a further data set with validation classes; repeatable. Without splits, all its classes.",
        ),
    ] = None,
    encoder: options.EncoderOption = None,
    encoder_weights: options.EncoderWeights = None,
    method: Annotated[
        str,
        typer.Option(
            "--method",
            metavar="NAME",
            help=f"What is trained: {', '.join(completions.METHODS)}.",
            autocompletion=completions.methods,
            rich_help_panel=options.TRAINING,
        ),
    ] = "metadiff",
    out: options.Out = None,
    overwrite: options.Overwrite = False,
    resume: options.Resume = False,
    init_from: options.InitFrom = None,
    report: options.Report = None,
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
    """Train MetaDiff on base classes, and measure it.

    Without --encoder, it takes the encoder that the same preset and data gave
    before, or trains it first; those of torchvision and timm come trained.
    The checkpoint serves any number of classes and of images per class. With
    --method, it trains a gradient-based baseline instead.

    With several data sets, base classes are the training classes of each
    --data, and everything is fitted on the validation classes of all sets.
    With --val-data, all classes of a --data without splits are base classes.

    Examples:

      metadiff metatrain --preset glyphs-5w1s

      metadiff metatrain --preset mini-5w5s --data ./mini-imagenet -o runs/5w5s

      metadiff metatrain --preset glyphs-5w1s --method anil-frozen -o runs/anil

      metadiff metatrain --preset glyphs-5w1s --report glyphs.html

      metadiff metatrain --preset folder --data ./photos --val-data ./imgs
    """
    from metadiff_cli.commands.train.data import Data
    from metadiff_cli.commands.train.run import Request, run_metatrain

    flags = options.runtime_flags(seed, device, threads, num_workers, batch_size)
    run_metatrain(Request(
        preset, config, settings or (), flags, Data(data or (), val_data or ()), out, overwrite, resume, init_from,
        dry_run, as_json, quiet, verbose, encoder, encoder_weights, method, report,
    ))  # fmt: skip
