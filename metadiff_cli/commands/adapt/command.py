"""`metadiff adapt`: one folder of images per class in, predictions for other images out."""

from pathlib import Path
from typing import Annotated

import typer

from metadiff_cli.commands import options
from metadiff_cli.commands.adapt.options import Options
from metadiff_cli.commands.paths import path_option, path_text
from metadiff_cli.console import Screen

INPUT, OUTPUT, SORTING, TOGETHER = "Input", "Output", "Sorting", "Unlabelled images"


def adapt(
    query: Annotated[
        list[str],
        typer.Option(
            "--query",
            "-Q",
            parser=path_text,
            help="A folder, a file, a glob, a CSV with a column path, or - for paths on stdin; repeatable.",
            metavar="PATH",
            rich_help_panel=INPUT,
        ),
    ],
    more: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PATH]...", parser=path_text, help="More query images, as the shell expands a pattern."
        ),
    ] = None,
    support: Annotated[
        Path | None,
        typer.Option(
            "--support",
            "-S",
            parser=path_option,
            help="A folder with one folder of images per class, or a CSV of path,label.",
            metavar="DIR",
            rich_help_panel=INPUT,
        ),
    ] = None,
    classifier: Annotated[
        Path | None,
        typer.Option(
            "--classifier",
            parser=path_option,
            help="A classifier that --save wrote; --support adds classes and images to it.",
            metavar="FILE",
            rich_help_panel=INPUT,
        ),
    ] = None,
    null: Annotated[
        bool,
        typer.Option(
            "--null", "-0", help="Paths on stdin end with NUL, as find -print0 writes them.", rich_help_panel=INPUT
        ),
    ] = False,
    format: Annotated[
        str | None,
        typer.Option(
            "--format",
            "-f",
            metavar="NAME",
            help=options.shown("table, json, jsonl or csv.", "table"),
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(
            "--top-k",
            min=1,
            metavar="N",
            help=options.shown("Classes shown per image; a CSV shows one.", "3"),
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    reject_below: Annotated[
        float | None,
        typer.Option(
            "--reject-below",
            min=0,
            max=1,
            metavar="P",
            rich_help_panel=OUTPUT,
            help=options.shown("Give no label below this confidence, 0 to 1.", "every image gets a label"),
        ),
    ] = None,
    reject: Annotated[
        str | None,
        typer.Option(
            "--reject",
            metavar="auto",
            rich_help_panel=OUTPUT,
            help=options.shown("auto gives no label to images of no class.", "every image gets a label"),
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
        typer.Option("--strict", help="Exit with code 3 when any image has an error.", rich_help_panel=OUTPUT),
    ] = False,
    sort_into: Annotated[
        Path | None,
        typer.Option(
            "--sort-into",
            parser=path_option,
            help="Copy each query image to DIR/<class>/, never over another file.",
            metavar="DIR",
            rich_help_panel=SORTING,
        ),
    ] = None,
    move: Annotated[
        bool,
        typer.Option("--move", help="Move the images of --sort-into instead of copying them.", rich_help_panel=SORTING),
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
            parser=path_option,
            help="A folder of unlabelled images that guide the classifier.",
            metavar="DIR",
            rich_help_panel=TOGETHER,
        ),
    ] = None,
    save: Annotated[
        Path | None,
        typer.Option(
            "--save",
            help="Write the adapted classifier here, for --classifier.",
            metavar="FILE",
            rich_help_panel=options.PLACES,
        ),
    ] = None,
    report: options.Report = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing file of --save.", rich_help_panel=options.PLACES)
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
    It needs no training and no GPU: a checkpoint comes with the package.

    Examples:

      metadiff adapt --support ./imgs --query ./q

      metadiff adapt -S ./imgs -Q './q/*.jpg' --format csv --reject-below 0.5

      metadiff adapt -S ./imgs -Q ./q --sort-into ./sorted --report report.html

      metadiff adapt -S ./imgs -Q ./q --reject auto
    """
    from metadiff_cli.commands.adapt.run import run

    given = Options(
        query=query, more=more or [], null=null, support=support, classifier=classifier, checkpoint=checkpoint,
        format=format, as_json=as_json, top_k=top_k, reject_below=reject_below, reject=reject, labelled=labelled,
        strict=strict, sort_into=sort_into, move=move, transductive=transductive, unlabeled=unlabeled, save=save,
        report=report, overwrite=overwrite, config=config, set=settings or [],
        flags={
            **options.runtime_flags(seed, device, threads, num_workers, batch_size),
            **options.sampler_flags(steps, samples, temperature, guidance),
        },
    )  # fmt: skip
    run(given, Screen(quiet=quiet, verbose=verbose))
