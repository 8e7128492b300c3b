"""`metadiff adapt`: a folder of labelled images per class in, predictions for other images out."""

from pathlib import Path
from typing import Annotated

import typer

from metadiff_cli.commands import options
from metadiff_cli.commands.adapt.output import WRITERS
from metadiff_cli.console import Screen
from metadiff_cli.errors import ConfigError, DataError
from metadiff_cli.files import checkpoint_path

INPUT, OUTPUT, SORTING, TOGETHER = "Input", "Output", "Sorting", "Unlabelled images"


def adapt(
    query: Annotated[
        list[str],
        typer.Option(
            "--query",
            "-Q",
            help="Folder, file, glob, CSV with a column path, or - for paths on stdin; repeatable.",
            metavar="PATH",
            rich_help_panel=INPUT,
        ),
    ],
    support: Annotated[
        Path | None,
        typer.Option(
            "--support",
            "-S",
            help="Folder with one folder of images per class, or a CSV of path,label.",
            metavar="DIR",
            rich_help_panel=INPUT,
        ),
    ] = None,
    classifier: Annotated[
        Path | None,
        typer.Option(
            "--classifier",
            help="A classifier that --save wrote; --support adds classes and images to it.",
            metavar="FILE",
            rich_help_panel=INPUT,
        ),
    ] = None,
    null: Annotated[
        bool,
        typer.Option("--null", "-0", help="Paths on stdin end with NUL, as of find -print0.", rich_help_panel=INPUT),
    ] = False,
    format: Annotated[
        str, typer.Option("--format", "-f", metavar="NAME", help="table, json, jsonl or csv.", rich_help_panel=OUTPUT)
    ] = "table",
    top_k: Annotated[
        int,
        typer.Option(
            "--top-k", min=1, metavar="N", help="Classes named per image; a CSV names one.", rich_help_panel=OUTPUT
        ),
    ] = 3,
    reject_below: Annotated[
        float | None,
        typer.Option(
            "--reject-below",
            min=0,
            max=1,
            metavar="P",
            rich_help_panel=OUTPUT,
            help=options.shown("Give no label below this confidence, 0 to 1.", "every image gets one"),
        ),
    ] = None,
    reject: Annotated[
        str | None,
        typer.Option(
            "--reject",
            metavar="auto",
            rich_help_panel=OUTPUT,
            help=options.shown("auto gives no label to what looks like none of the classes.", "every image gets one"),
        ),
    ] = None,
    labelled: Annotated[
        bool,
        typer.Option(
            "--labelled",
            help="The query has class folders or labels: show accuracy and confusions.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    strict: Annotated[
        bool,
        typer.Option("--strict", help="End with exit code 3 when any image has an error.", rich_help_panel=OUTPUT),
    ] = False,
    sort_into: Annotated[
        Path | None,
        typer.Option(
            "--sort-into",
            help="Copy each query image to DIR/<class>/, never over another.",
            metavar="DIR",
            rich_help_panel=SORTING,
        ),
    ] = None,
    move: Annotated[
        bool, typer.Option("--move", help="Move the images of --sort-into instead.", rich_help_panel=SORTING)
    ] = False,
    checkpoint: options.CheckpointFile = None,
    transductive: Annotated[
        bool,
        typer.Option(
            "--transductive", help="Let the query images guide the classifier together.", rich_help_panel=TOGETHER
        ),
    ] = False,
    unlabeled: Annotated[
        Path | None,
        typer.Option(
            "--unlabeled",
            help="Folder of further images that guide the classifier.",
            metavar="DIR",
            rich_help_panel=TOGETHER,
        ),
    ] = None,
    save: Annotated[
        Path | None,
        typer.Option(
            "--save", help="Write the classifier, for --classifier.", metavar="FILE", rich_help_panel=options.PLACES
        ),
    ] = None,
    report: options.Report = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the file of --save.", rich_help_panel=options.PLACES)
    ] = False,
    steps: options.Steps = None,
    samples: options.Samples = None,
    temperature: options.Temperature = None,
    guidance: options.Guidance = None,
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
    """Learn classes from a few images each, and label other images.

    The support has one folder of images per class: ./imgs/cat, ./imgs/dog.
    No training, no GPU: a trained checkpoint comes with the package.

    Examples:

      metadiff adapt --support ./imgs --query ./q

      metadiff adapt -S ./imgs -Q './q/*.jpg' --format csv --reject-below 0.5

      metadiff adapt -S ./imgs -Q ./q --sort-into ./sorted --report report.html

      metadiff adapt -S ./imgs -Q ./q --reject auto
    """
    from metadiff_cli.commands.settings import model_config

    screen = Screen(quiet=quiet, verbose=verbose)
    format = "json" if as_json else format
    if reject not in (None, "auto"):
        raise ConfigError(f"--reject {reject}", hint="give --reject auto, or a confidence: --reject-below 0.5")
    _check_arguments(format, support, classifier, save, overwrite, sort_into, move)
    if null and "-" not in query:
        raise ConfigError(
            "-0 is about paths on stdin", hint="add --query -, as in: find . -print0 | metadiff adapt -Q - -0"
        )
    resolved = model_config(
        config, settings, options.runtime_flags(seed, device, threads, num_workers, batch_size),
        options.sampler_flags(steps, samples, temperature, guidance),
    )  # fmt: skip
    from metadiff_cli.commands.adapt.build import Given, prepare
    from metadiff_cli.commands.adapt.inputs import find_queries
    from metadiff_cli.commands.adapt.predict import Stream
    from metadiff_cli.core.checkpoints.classifier import save_classifier

    queries = find_queries(query, null=null, outside=sort_into)
    if labelled and not any(item.label for item in queries.items):
        if not any(path.exists() for path in queries.paths()):
            raise DataError(f"{queries.paths()[0]} does not exist", hint="give --query a folder of class folders")
        raise DataError("--labelled, and no query image has a class", hint="give class folders: DIR/cat/1.jpg")
    if classifier is not None and checkpoint is not None:
        screen.warn("a classifier has a model of its own: --checkpoint is not used")
    source = str(classifier or checkpoint_path(checkpoint))
    given = Given(support, classifier, checkpoint, transductive, unlabeled)
    ready = prepare(resolved, given, queries, screen)
    if reject is not None:
        ready = ready.rejecting()
    if save is not None:
        save_classifier(save, ready.classifier, ready.origin)
        screen.note(f"classifier written: {save}")
    # rows on a terminal are progress enough, and a bar would run into them
    bar = format in ("table", "json") or not screen.out.is_terminal
    stream = Stream(resolved, ready, queries, screen, top_k, reject_below, labelled, bar, keep=report is not None)
    outcomes = stream.outcomes()
    if sort_into is not None:
        outcomes = stream.sorted(outcomes, sort_into, move)
    head = {"schema": "metadiff.adapt/1", **ready.document(), "checkpoint": source, "seed": resolved.seed}
    labels = WRITERS[format](screen, head, outcomes, stream.tail)
    stream.finish(matrix=format == "table")
    if report is not None:
        stream.write_report(report, source)
    if not labels:
        raise DataError("nothing could be predicted", hint="see the reasons above; give images that can be read")
    if strict and stream.errors.found:
        raise DataError(f"{len(stream.errors.found)} images have errors", hint="mend them, or leave out --strict")


def _check_arguments(
    format: str, support: Path | None, classifier: Path | None, save: Path | None, overwrite: bool,
    sort_into: Path | None, move: bool,
) -> None:  # fmt: skip
    if format not in WRITERS:
        raise ConfigError(f"unknown format '{format}'", hint=f"choose one of {', '.join(WRITERS)}")
    if support is None and classifier is None:
        raise ConfigError("give --support or --classifier", hint="--support DIR has one folder per class")
    if save is not None:
        from metadiff_cli.commands.settings import check_new

        check_new(save, overwrite=overwrite)
    if move and sort_into is None:
        raise ConfigError("--move needs --sort-into", hint="add --sort-into DIR")
    if sort_into is not None and sort_into.exists() and not sort_into.is_dir():
        raise ConfigError(f"{sort_into} is a file", hint="give --sort-into a folder")
    if sort_into is not None and support is not None and support.resolve() in (
        sort_into.resolve(), *sort_into.resolve().parents
    ):  # fmt: skip
        raise ConfigError(
            f"--sort-into {sort_into} is inside the support folder",
            hint="give another folder: guesses would become labels of the next run",
        )
