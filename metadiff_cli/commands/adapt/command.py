"""`metadiff adapt`: one folder of images per class in, predictions for other images out. `metadiff demo` shows it."""

from pathlib import Path
from typing import Annotated

import typer

from metadiff_cli.commands import completions, options
from metadiff_cli.commands.options import PLACES, SAMPLER, option, path
from metadiff_cli.commands.parsing import path_text
from metadiff_cli.console import Screen

INPUT, OUTPUT, SORTING, TOGETHER = "Input", "Output", "Sorting", "Unlabelled images"
CORRECTIONS = "Corrections of a saved classifier"


def adapt(
    query: Annotated[
        list[str] | None,
        option(
            INPUT,
            "--query",
            "-Q",
            metavar="PATH",
            parser=path_text,
            help="A folder, a file, a glob, a CSV with a column path, or - for paths on stdin; repeatable. It may be "
            "left out with --save.",
        ),
    ] = None,
    more: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PATH",
            parser=path_text,
            help=options.shown("More query images, as a shell makes of a glob.", "none"),
        ),
    ] = None,
    support: Annotated[
        Path | None,
        path(
            INPUT,
            "--support",
            "-S",
            metavar="DIR",
            help="A folder with one folder of images per class, or a CSV of path,label.",
        ),
    ] = None,
    none: Annotated[
        Path | None,
        path(
            INPUT,
            "--none",
            metavar="DIR",
            default="the class folder _none, if there is one",
            help="A folder of images that show none of the classes; none becomes an answer.",
        ),
    ] = None,
    classifier: Annotated[
        Path | None,
        path(
            INPUT,
            "--classifier",
            metavar="FILE",
            help="A classifier that --save wrote, to which --support adds classes and images; or an exported one.",
        ),
    ] = None,
    forget: Annotated[
        list[str] | None,
        option(
            CORRECTIONS,
            "--forget",
            metavar="PATH",
            parser=path_text,
            help="Take this image out of --classifier: a file, or class/file as inspect shows; or a class. Repeatable.",
        ),
    ] = None,
    relabel: Annotated[
        Path | None,
        path(
            CORRECTIONS,
            "--relabel",
            metavar="CSV",
            default="none",
            help="Give images of --classifier other labels: a CSV of path,label.",
        ),
    ] = None,
    rename: Annotated[
        list[str] | None,
        option(
            CORRECTIONS, "--rename", metavar="OLD=NEW", help="Give a class of --classifier another name; repeatable."
        ),
    ] = None,
    null: Annotated[
        bool, option(INPUT, "--null", "-0", help="Paths on stdin end with NUL, as find -print0 writes them.")
    ] = False,
    format: Annotated[
        str | None,
        option(OUTPUT, "--format", "-f", metavar="NAME", default="table", help="table, json, jsonl or csv."),
    ] = None,
    top_k: Annotated[
        int | None,
        option(OUTPUT, "--top-k", metavar="N", min=1, default=3, help="Classes shown per image; a CSV shows one."),
    ] = None,
    reject_below: Annotated[
        float | None,
        option(
            OUTPUT,
            "--reject-below",
            metavar="P",
            min=0,
            max=1,
            default="every image gets a label",
            help="Give no label below this confidence, 0 to 1.",
        ),
    ] = None,
    reject: Annotated[
        str | None,
        option(
            OUTPUT,
            "--reject",
            metavar="auto",
            default="every image gets a label",
            help="auto gives no label to images of no class.",
        ),
    ] = None,
    labelled: Annotated[
        bool,
        option(OUTPUT, "--labelled", help="The query has class folders or labels: show accuracy and confusions."),
    ] = False,
    suggest: Annotated[
        int | None,
        option(
            OUTPUT,
            "--suggest",
            metavar="N",
            min=1,
            default="none",
            help="Name the N query images worth labelling next.",
        ),
    ] = None,
    strict: Annotated[bool, option(OUTPUT, "--strict", help="Exit with code 3 when any image has an error.")] = False,
    sort_into: Annotated[
        Path | None,
        path(
            SORTING,
            "--sort-into",
            metavar="DIR",
            help="Copy each query image to DIR/<class>/, never over another file.",
        ),
    ] = None,
    move: Annotated[
        bool, option(SORTING, "--move", help="Move the images of --sort-into instead of copying them.")
    ] = False,
    checkpoint: options.CheckpointFile = None,
    encoder: Annotated[
        str | None,
        option(
            INPUT,
            "--encoder",
            "-e",
            metavar="NAME",
            default="the checkpoint's",
            autocompletion=completions.trained_encoders,
            help="lite0, lite1, lite2, timm:MODEL, torchvision:MODEL or a file; of several, A,B or auto, the best.",
        ),
    ] = None,
    encoder_weights: Annotated[
        Path | None,
        path(
            INPUT,
            "--encoder-weights",
            metavar="FILE",
            default="downloaded by the library",
            help="Weights of --encoder, as .safetensors or .pth.",
        ),
    ] = None,
    views: Annotated[
        int | None,
        option(
            INPUT,
            "--views",
            metavar="N",
            min=1,
            max=6,
            default="the checkpoint's",
            help="Views of an image: 1 the whole, 2 with its mirror image, 5 with its corners, 6 with both.",
        ),
    ] = None,
    transductive: Annotated[
        bool, option(TOGETHER, "--transductive", help="Let the query images guide the classifier together.")
    ] = False,
    unlabeled: Annotated[
        Path | None,
        path(TOGETHER, "--unlabeled", metavar="DIR", help="A folder of unlabelled images that guide the classifier."),
    ] = None,
    save: Annotated[
        Path | None,
        path(PLACES, "--save", metavar="FILE", help="Write the adapted classifier here, for --classifier."),
    ] = None,
    report: options.Report = None,
    overwrite: Annotated[bool, option(PLACES, "--overwrite", help="Replace an existing file of --save.")] = False,
    steps: Annotated[
        int | None,
        option(
            SAMPLER,
            "--steps",
            metavar="N",
            min=1,
            max=1000,
            default=10,
            help="Number of denoising steps; 100 at a temperature above 0.",
        ),
    ] = None,
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
    backend: options.Backend = None,
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

      metadiff adapt -S ./imgs -Q ./q --none ./others

      metadiff adapt -S ./imgs -Q ./q --encoder lite0,lite2

      metadiff adapt --classifier pets.safetensors --rename fox=wolf -Q ./q
    """
    from metadiff_cli.commands.adapt.checks import Options
    from metadiff_cli.commands.adapt.corrections import Corrections

    given = Options(
        query=query or [], more=more or [], null=null, support=support, none=none, classifier=classifier,
        corrections=Corrections(forget or [], relabel, rename or []), checkpoint=checkpoint,
        encoder=encoder, encoder_weights=encoder_weights, views=views,
        format=format, as_json=as_json, top_k=top_k, reject_below=reject_below, reject=reject, labelled=labelled,
        suggest=suggest, strict=strict, sort_into=sort_into, move=move, transductive=transductive, unlabeled=unlabeled,
        save=save, report=report, overwrite=overwrite, config=config, set=settings or [],
        flags={
            **options.runtime_flags(seed, device, threads, num_workers, batch_size, backend),
            **options.sampler_flags(steps, samples, temperature, guidance),
        },
    )  # fmt: skip
    if given.exported:  # without torch
        from metadiff_cli.commands.adapt.exported import run
    else:
        from metadiff_cli.commands.adapt.run import run
    run(given, Screen(quiet=quiet, verbose=verbose))


def demo(
    out: Annotated[
        Path | None,
        path(
            PLACES,
            "--out",
            "-o",
            metavar="DIR",
            default="metadiff-demo",
            help="Folder for the pictures and the report.",
        ),
    ] = None,
    browser: Annotated[bool, option(OUTPUT, "--open", help="Open the report in a browser.")] = False,
    quiet: options.Quiet = False,
) -> None:
    """See it work on a few pictures that come with the package.

    It copies them to a folder, runs `metadiff adapt` on them, and shows that
    command: a table here, and a report to open in a browser. It needs no
    network and no files of yours, and replaces none.

    Examples:

      metadiff demo

      metadiff demo --out ./first
    """
    from metadiff_cli.commands.adapt.demo import run_demo

    run_demo(out or Path("metadiff-demo"), Screen(quiet=quiet), browser=browser)
