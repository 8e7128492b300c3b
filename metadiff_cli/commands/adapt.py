"""`metadiff adapt`: a folder of labelled images per class in, predictions for other images out."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from metadiff_cli.commands import options
from metadiff_cli.commands.output import WRITERS, Errors, Outcome, decide
from metadiff_cli.commands.scoring import Score
from metadiff_cli.config import Config
from metadiff_cli.console import Screen
from metadiff_cli.errors import ConfigError, DataError

if TYPE_CHECKING:
    from metadiff_cli.commands.queries import Queries
    from metadiff_cli.core.adaptation import Encoded, Prediction
    from metadiff_cli.core.model import Model, SavedClassifier
    from metadiff_cli.core.saved import Origin
    from metadiff_cli.core.support import Pool, SupportSet
    from metadiff_cli.core.support_check import SupportCheck

NAMED = 5  # cases of one kind that are told one by one
SORTING = "Sorting"


def adapt(
    query: Annotated[
        list[str],
        typer.Option(
            "--query", "-Q", help="Folder, file, glob, CSV with a column path, or - for paths on stdin; repeatable."
        ),
    ],
    support: Annotated[
        Path | None,
        typer.Option("--support", "-S", help="Folder with one folder of images per class, or a CSV of path,label."),
    ] = None,
    classifier: Annotated[
        Path | None,
        typer.Option("--classifier", help="A classifier that --save wrote; --support adds classes and images to it."),
    ] = None,
    checkpoint: options.CheckpointFile = None,
    null: Annotated[
        bool, typer.Option("--null", "-0", help="Paths on stdin end with NUL, as of find -print0.")
    ] = False,
    format: Annotated[str, typer.Option("--format", "-f", help="table, json, jsonl or csv.")] = "table",
    as_json: options.AsJson = False,
    top_k: Annotated[int, typer.Option("--top-k", min=1, help="Classes named per image.")] = 3,
    reject_below: Annotated[
        float | None, typer.Option("--reject-below", min=0, max=1, help="Give no label below this confidence (0..1).")
    ] = None,
    labelled: Annotated[
        bool, typer.Option("--labelled", help="The query has class folders or labels: show accuracy and confusions.")
    ] = False,
    strict: Annotated[bool, typer.Option("--strict", help="End with exit code 3 when any image has an error.")] = False,
    sort_into: Annotated[
        Path | None,
        typer.Option("--sort-into", help="Copy each query image to DIR/<class>/.", rich_help_panel=SORTING),
    ] = None,
    move: Annotated[
        bool, typer.Option("--move", help="Move the images of --sort-into instead.", rich_help_panel=SORTING)
    ] = False,
    steps: options.Steps = None,
    samples: options.Samples = None,
    temperature: options.Temperature = None,
    guidance: options.Guidance = None,
    transductive: Annotated[
        bool, typer.Option("--transductive", help="Let the query images guide the classifier together.")
    ] = False,
    unlabeled: Annotated[
        Path | None, typer.Option("--unlabeled", help="Folder of further images that guide the classifier.")
    ] = None,
    save: Annotated[
        Path | None,
        typer.Option("--save", help="Write the classifier, for --classifier.", rich_help_panel=options.PLACES),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the file of --save.", rich_help_panel=options.PLACES)
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
    """Learn the classes of a support folder and label the query images. No training, no GPU.

    Examples:

      metadiff adapt --support ./imgs --query ./q --checkpoint runs/mini/checkpoint.safetensors

      metadiff adapt --support ./imgs --query './q/*.jpg' --checkpoint runs/mini/checkpoint.safetensors --format csv
    """
    screen = Screen(quiet=quiet, verbose=verbose)
    format = "json" if as_json else format
    _check_arguments(format, support, classifier, save, overwrite, sort_into, move)
    resolved = options.model_config(
        config, settings, options.runtime_flags(seed, device, threads, num_workers, batch_size),
        options.sampler_flags(steps, samples, temperature, guidance),
    )  # fmt: skip
    from metadiff_cli.commands.queries import find_queries

    queries = find_queries(query, null=null)
    if labelled and not any(item.label for item in queries.items):
        raise DataError("--labelled, and no query image has a class", hint="give class folders: DIR/cat/1.jpg")
    if classifier is not None and checkpoint is not None:
        screen.warn("a classifier has a model of its own: --checkpoint is not used")
    source = str(classifier or options.checkpoint_path(checkpoint))
    ready = _prepare(resolved, support, classifier, checkpoint, queries, transductive, unlabeled, screen)
    if save is not None:
        from metadiff_cli.core.saved import save_classifier

        save_classifier(save, ready.classifier, ready.origin)
        screen.note(f"classifier written: {save}")
    run = _Run(resolved, ready, queries, screen, top_k, reject_below, labelled)
    outcomes = run.outcomes()
    if sort_into is not None:
        outcomes = run.sorted(outcomes, sort_into, move)
    head = _head(ready, source, resolved.seed)
    labels = WRITERS[format](screen, head, outcomes, run.tail)
    run.finish(matrix=format == "table")
    if not labels:
        raise DataError("nothing could be predicted", hint="see the reasons above; give images that can be read")
    if strict and run.errors.found:
        raise DataError(f"{len(run.errors.found)} images have errors", hint="mend them, or leave out --strict")


def _check_arguments(
    format: str, support: Path | None, classifier: Path | None, save: Path | None, overwrite: bool,
    sort_into: Path | None, move: bool,
) -> None:  # fmt: skip
    if format not in WRITERS:
        raise ConfigError(f"unknown format '{format}'", hint=f"choose one of {', '.join(WRITERS)}")
    if support is None and classifier is None:
        raise ConfigError("give --support or --classifier", hint="--support DIR has one folder per class")
    if save is not None and save.exists() and not overwrite:
        raise ConfigError(f"{save} exists already", hint="add --overwrite or give another name")
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


@dataclass(frozen=True)
class _Ready:
    """A classifier and what it was made of; the queries' features where they were needed to make it."""

    classifier: "SavedClassifier"
    origin: "Origin"
    check: "SupportCheck | None"
    encoded: "list[list[Encoded]] | None"


def _prepare(
    config: Config, support: Path | None, classifier: Path | None, checkpoint: Path | None, queries: "Queries",
    transductive: bool, unlabeled: Path | None, screen: Screen,
) -> _Ready:  # fmt: skip
    """Load, or read and adapt; a saved classifier is adapted anew only when something is added to it."""
    from metadiff_cli.core.model import load_model
    from metadiff_cli.core.saved import load_classifier

    device = options.start(config)
    if classifier is None:
        model = load_model(options.checkpoint_path(checkpoint), device)
        return _adapted(config, model, None, support, queries, transductive, unlabeled, screen)
    saved, origin = load_classifier(classifier, device)
    if support is None and not transductive and unlabeled is None:
        return _Ready(saved, origin, None, None)
    return _adapted(config, origin.model, origin, support, queries, transductive, unlabeled, screen)


def _adapted(
    config: Config, model: "Model", origin: "Origin | None", support: Path | None, queries: "Queries",
    transductive: bool, unlabeled: Path | None, screen: Screen,
) -> _Ready:  # fmt: skip
    """A classifier from all that there is: what a saved one was made of, the support, and the pool."""
    from metadiff_cli.commands.learning import sampling_of
    from metadiff_cli.commands.queries import find_queries
    from metadiff_cli.core.adaptation import adapt_classifier, pool_from
    from metadiff_cli.core.saved import Origin
    from metadiff_cli.core.support_check import check_support

    examples = _examples(config, model, origin, support, screen)
    pool, encoded = origin.pool if origin else None, None
    if transductive:
        encoded = list(_encoded(config, model, queries, "reading query images", screen))
        pool = _joined(pool_from(encoded), pool)
    if unlabeled is not None:
        further = pool_from(
            _encoded(config, model, find_queries([str(unlabeled)]), "reading unlabelled images", screen)
        )
        if further is None:
            raise DataError(f"no image of {unlabeled} can be read", hint="give other images, or leave --unlabeled out")
        pool = _joined(further, pool)
    sampling = sampling_of(config)
    ready = adapt_classifier(model, examples, sampling, seed=config.seed, pool=pool)
    check = check_support(model.learner, examples, sampling.guidance)
    _tell(check, screen)
    return _Ready(ready, Origin(model, examples, pool), check, encoded)


def _joined(first: "Pool | None", second: "Pool | None") -> "Pool | None":
    return second if first is None else first.joined(second)


def _examples(
    config: Config, model: "Model", origin: "Origin | None", support: Path | None, screen: Screen
) -> "SupportSet":
    """The support of a saved classifier and of the folder together, with what is to be said about it."""
    from metadiff_cli.core.adaptation import read_support
    from metadiff_cli.core.support import require_classes

    if support is None:
        assert origin is not None
        return origin.support
    runtime = config.runtime
    with screen.progress("reading support images") as advance:
        examples = read_support(
            support, model.images, runtime.batch_size, workers=runtime.num_workers, progress=advance
        )
    if origin is not None:
        examples = origin.support.joined(examples)
    for path, reason in examples.broken:
        screen.warn(f"support image {path} is left out: {reason}")
    for path, twin in examples.repeated[:NAMED]:
        screen.warn(f"support image {path} is the same picture as {twin} and counts once")
    if len(examples.repeated) > NAMED:
        screen.warn(f"{len(examples.repeated)} support images are repeated, and each picture counts once")
    require_classes(examples)
    return examples


def _encoded(
    config: Config, model: "Model | SavedClassifier", queries: "Queries", label: str, screen: Screen
) -> Iterator[list["Encoded"]]:
    """Features of the queries as a stream, with progress."""
    from metadiff_cli.core.adaptation import encode_images

    paths, runtime = [item.path for item in queries.items], config.runtime
    with screen.progress(label) as advance:
        yield from encode_images(paths, model.images, runtime.batch_size, workers=runtime.num_workers, progress=advance)


def _tell(check: "SupportCheck | None", screen: Screen) -> None:
    """What leave-one-out says of the support, on stderr."""
    if check is None:
        return
    text = f"support: estimated accuracy {check.accuracy:.0f} % (leave-one-out, {check.images} images)"
    if check.confused:
        first, second, _ = check.confused[0]
        text += f", most confused: {first} / {second}; one more image each would help most"
    screen.note(text)
    for suspect in check.suspects[:NAMED]:
        screen.warn(
            f"{suspect.path} looks mislabelled: it is in '{suspect.label}' and looks like '{suspect.looks_like}' "
            f"({suspect.confidence:.0%})"
        )
    if len(check.suspects) > NAMED:
        screen.warn(f"{len(check.suspects)} support images look mislabelled; --json names all")


def _head(ready: _Ready, source: str, seed: int) -> dict[str, Any]:
    """The JSON document without what is only known at the end."""
    pool, check = ready.origin.pool, ready.check
    return {
        "schema": "metadiff.adapt/1",
        "classes": list(ready.classifier.classes),
        "support": ready.origin.support.counts(),
        "support_check": None if check is None else _check_document(check),
        "protocol": "transductive" if pool is not None else "inductive",
        "unlabelled": 0 if pool is None else len(pool.digests),
        "checkpoint": source,
        "seed": seed,
    }


def _check_document(check: "SupportCheck") -> dict[str, Any]:
    return {
        "images": check.images,
        "accuracy": round(check.accuracy, 4),
        "confused": [{"classes": [first, second], "images": n} for first, second, n in check.confused],
        "suspects": [{**asdict(s), "confidence": round(s.confidence, 6)} for s in check.suspects],
    }


class _Run:
    """The stream from images to outcomes, and what is learned on the way: errors, twins, the score."""

    def __init__(
        self, config: Config, ready: _Ready, queries: "Queries", screen: Screen, top_k: int,
        reject_below: float | None, labelled: bool,
    ) -> None:  # fmt: skip
        self.config, self.ready, self.queries, self.screen = config, ready, queries, screen
        self.top_k, self.reject_below = top_k, reject_below
        self.classes = ready.classifier.classes
        self.score = Score(self.classes) if labelled else None
        self.errors = Errors([*ready.origin.support.broken, *queries.unreadable])
        self.twins = 0
        self.sorted_new = self.sorted_old = 0
        self.sorting: str | None = None

    def outcomes(self) -> Iterator[Outcome]:
        """In the order of the queries."""
        for item, prediction in zip(self.queries.items, self._predictions(), strict=True):
            truth = item.label if self.score is not None else None
            outcome = decide(prediction, self.classes, self.top_k, self.reject_below, truth)
            self._note(outcome)
            yield outcome

    def _predictions(self) -> Iterator["Prediction"]:
        from metadiff_cli.core.adaptation import predict_images

        classifier, encoded = self.ready.classifier, self.ready.encoded
        stream = encoded or _encoded(self.config, classifier, self.queries, "predicting", self.screen)
        return predict_images(classifier, stream, self.ready.origin.support.known())

    def _note(self, outcome: Outcome) -> None:
        if not outcome.good:
            self.errors.add(outcome.path, outcome.reason)
        elif self.score is not None:
            self.score.add(outcome)
        self.twins += outcome.twin is not None
        if outcome.twin is not None and self.twins <= NAMED:
            self.screen.warn(f"query {outcome.path} is also in the support ({outcome.twin})")

    def sorted(self, outcomes: Iterator[Outcome], root: Path, move: bool) -> Iterator[Outcome]:
        """The same outcomes, each image brought to its class's folder. What cannot be brought there is an error."""
        from metadiff_cli.data.sorting import Sorter

        sorter = Sorter(root, self.classes, move=move)
        self.sorting = f"{'moved' if move else 'copied'} into {root}"
        for outcome in outcomes:
            if outcome.good:
                try:
                    placed = sorter.place(Path(outcome.path), outcome.label)
                except OSError as error:
                    self.errors.add(outcome.path, f"cannot be sorted into {root} ({error.strerror})")
                else:
                    self.sorted_new += placed.new
                    self.sorted_old += not placed.new
                    outcome = replace(outcome, placed=str(placed.path))
            yield outcome

    def tail(self) -> dict[str, Any]:
        """What the JSON document says after the predictions."""
        scored = {} if self.score is None else {"labelled": self.score.document()}
        return {**scored, "errors": self.errors.document()}

    def finish(self, *, matrix: bool) -> None:
        """Say on stderr what happened, and show the score."""
        screen = self.screen
        if self.score is not None:
            self.score.show(screen, matrix=matrix)
        if self.twins > NAMED:
            screen.warn(f"{self.twins} query images are also in the support")
        if self.queries.skipped:
            screen.note(f"{self.queries.skipped} query files are no images and were left out")
        if self.sorting is not None:
            there = f", {self.sorted_old} were there already" if self.sorted_old else ""
            screen.note(f"{self.sorted_new} images {self.sorting}{there}")
        if self.ready.origin.pool is not None:
            screen.note("transductive: each prediction also depends on the other images")
        self.errors.show(screen)
