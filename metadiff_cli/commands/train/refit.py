"""`metadiff refit`: the threshold of rejection for a checkpoint that stands; its weights stay as they are."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from metadiff_cli.commands import completions, options
from metadiff_cli.config.load import check
from metadiff_cli.console import Screen
from metadiff_cli.errors import ConfigError
from metadiff_cli.files import checkpoint_path


def refit(
    data: Annotated[
        Path,
        typer.Option(
            "--data",
            "-d",
            metavar="DIR",
            help="Classes that were not trained on.",
            rich_help_panel=options.PLACES,
        ),
    ],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="FILE", help="Checkpoint file to write.", rich_help_panel=options.PLACES),
    ],
    checkpoint: options.CheckpointFile = None,
    split: Annotated[
        str,
        typer.Option(
            "--split",
            metavar="NAME",
            help="Classes to fit on: val, test, train or all.",
            autocompletion=completions.splits,
            rich_help_panel=options.PLACES,
        ),
    ] = "val",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the file of --out.", rich_help_panel=options.PLACES)
    ] = False,
    config: options.ConfigFile = None,
    settings: options.Settings = None,
    seed: options.Seed = None,
    device: options.Device = None,
    threads: options.Threads = None,
    num_workers: options.NumWorkers = None,
    batch_size: options.BatchSize = None,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Fit the threshold of `--reject auto` anew.

    Writes the checkpoint with it; weights and all else stay as they are. For
    checkpoints of before there was one, and for classes of one's own.

    Examples:

      metadiff refit --data ./mini-imagenet --out mini.safetensors

      metadiff refit --data ./photos --split all --out mine.safetensors
    """
    from metadiff_cli.commands import settings as shared

    screen = Screen(quiet=quiet, verbose=verbose)
    shared.check_split(split)
    shared.check_new(out, overwrite=overwrite)
    runtime = shared.model_config(
        config, settings, options.runtime_flags(seed, device, threads, num_workers, batch_size)
    )
    from metadiff_cli.commands.evaluate.measure import feature_bank
    from metadiff_cli.commands.evaluate.run import find_source
    from metadiff_cli.core.checkpoints.file import load_checkpoint, save_checkpoint
    from metadiff_cli.core.checkpoints.model import model_of
    from metadiff_cli.core.training.fit import fit_rejection

    start = shared.start(runtime)
    stored = load_checkpoint(checkpoint_path(checkpoint), "model")
    model = model_of(stored, start)
    if model.metadiff.targets is None:
        raise ConfigError(f"{stored.path} does not hold its training weights", hint="make it again with `metatrain`")
    source = find_source(check(stored.header["config"]), runtime, data, screen)
    bank = feature_bank(model.images, source, split, runtime, screen)
    with screen.status("fitting the threshold of rejection"):
        rejection = fit_rejection(model.metadiff, bank, start, seed=runtime.seed)
    assert rejection is not None
    tuning = {**stored.header["tuning"], "rejection": asdict(rejection)}
    save_checkpoint(out, "model", stored.tensors, {**stored.header, "tuning": tuning})
    screen.text(
        f"rejects {100 * rejection.rate:g} % of the images of known classes, fitted on {len(bank.classes)} classes"
    )
    screen.text(f"checkpoint: {out}")
