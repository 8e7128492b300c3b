"""The body of `metadiff adapt`: options in, predictions, files and an exit code out."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from metadiff_cli.classify.images import Encoded
from metadiff_cli.commands.adapt.build import Builder, Ready, check_sentences
from metadiff_cli.commands.adapt.inputs import Queries, find_queries
from metadiff_cli.commands.adapt.output import WRITERS, Writing
from metadiff_cli.commands.adapt.predict import Predictions
from metadiff_cli.commands.adapt.report import AdaptReport, write_report
from metadiff_cli.commands.settings import check_new, model_config, start
from metadiff_cli.config.schema import Config
from metadiff_cli.console import Screen
from metadiff_cli.data.sort import Sorter
from metadiff_cli.errors import ConfigError, DataError
from metadiff_cli.files import checkpoint_path


@dataclass(frozen=True)
class Options:
    """The options of `metadiff adapt` by name; `settings` are those that the configuration knows, by its keys."""

    query: list[str]
    null: bool
    support: Path | None
    classifier: Path | None
    checkpoint: Path | None
    format: str
    top_k: int
    reject_below: float | None
    reject: str | None
    labelled: bool
    strict: bool
    sort_into: Path | None
    move: bool
    transductive: bool
    unlabeled: Path | None
    save: Path | None
    report: Path | None
    overwrite: bool
    config_file: Path | None
    set: list[str] | None
    settings: Mapping[str, object]

    @property
    def source(self) -> str:
        """The file that the classifier comes from: a saved classifier, else a checkpoint."""
        return str(self.classifier or checkpoint_path(self.checkpoint))


def run(given: Options, screen: Screen) -> None:
    """Make the classifier and label the query images. Raises a MetaDiffError for what cannot be done."""
    _check(given)
    config = model_config(given.config_file, given.set, given.settings)
    if given.classifier is not None and given.checkpoint is not None:
        screen.warn("--checkpoint is not used: a saved classifier holds the model that it was adapted from")
    queries = _queries(given)
    builder = Builder(config, start(config), screen)
    ready = _ready(given, queries, builder)
    if given.save is not None:
        ready.classifier.save(given.save)
        screen.note(f"classifier written: {given.save}")
    predictions = Predictions(
        ready, queries, screen, top_k=given.top_k, reject_below=given.reject_below, labelled=given.labelled,
        sorter=None if given.sort_into is None else Sorter(given.sort_into, ready.classifier.classes, move=given.move),
        keep=given.report is not None,
    )  # fmt: skip
    head = {"schema": "metadiff.adapt/1", **ready.document(), "checkpoint": given.source, "seed": config.seed}
    writing = Writing(screen, given.top_k, head, predictions.tail)
    # rows on a terminal show the progress, and a bar would run into them
    bar = given.format in ("table", "json") or not screen.out.is_terminal
    predicted = WRITERS[given.format](writing, predictions.outcomes(_encoded(ready, queries, builder, bar)))
    predictions.finish(matrix=given.format == "table")
    if given.report is not None:
        _write_report(given, config, predictions, bar)
    _check_end(given, predictions, predicted)


def _check(given: Options) -> None:
    """Raise ConfigError for options that do not fit together."""
    if given.reject not in (None, "auto"):
        raise ConfigError(f"--reject {given.reject}", hint="give --reject auto, or a confidence: --reject-below 0.5")
    if given.format not in WRITERS:
        raise ConfigError(f"unknown format '{given.format}'", hint=f"choose one of {', '.join(WRITERS)}")
    if given.support is None and given.classifier is None:
        raise ConfigError("give --support or --classifier", hint="--support DIR has one folder per class")
    if given.save is not None:
        check_new(given.save, overwrite=given.overwrite)
    if given.null and "-" not in given.query:
        raise ConfigError(
            "-0 is about paths on stdin", hint="add --query -, as in: find . -print0 | metadiff adapt -Q - -0"
        )
    _check_sorting(given.sort_into, given.support, given.move)


def _check_sorting(root: Path | None, support: Path | None, move: bool) -> None:
    if root is None:
        if move:
            raise ConfigError("--move needs --sort-into", hint="add --sort-into DIR")
        return
    if root.exists() and not root.is_dir():
        raise ConfigError(f"{root} is a file", hint="give --sort-into a folder")
    if support is not None and support.resolve() in (root.resolve(), *root.resolve().parents):
        raise ConfigError(
            f"--sort-into {root} is inside the support folder",
            hint="give another folder: predictions would become labels of the next run",
        )


def _queries(given: Options) -> Queries:
    """The query images. Raises DataError where there are none, and where none has the label that is needed."""
    queries = find_queries(given.query, null=given.null, outside=given.sort_into)
    if given.labelled and not any(query.label for query in queries.items):
        if not any(path.exists() for path in queries.paths()):
            raise DataError(f"{queries.paths()[0]} does not exist", hint="give --query a folder of class folders")
        raise DataError("--labelled is given, and no query image has a class", hint="give class folders: DIR/cat/1.jpg")
    return queries


def _ready(given: Options, queries: Queries, builder: Builder) -> Ready:
    guiding = queries if given.transductive else None
    if given.classifier is not None:
        ready = builder.from_file(given.classifier, given.support, guiding, given.unlabeled)
    else:
        assert given.support is not None
        ready = builder.from_support(given.support, given.checkpoint, guiding, given.unlabeled)
    return replace(ready, rejector=ready.classifier.rejector()) if given.reject is not None else ready


def _encoded(ready: Ready, queries: Queries, builder: Builder, bar: bool) -> Iterator[list[Encoded]]:
    """The features of the query images, where they are known already, else as they are read."""
    if ready.queries is not None:
        return iter(ready.queries)
    return builder.encode(queries, ready.classifier.model.images, "predicting", bar=bar)


def _write_report(given: Options, config: Config, predictions: Predictions, bar: bool) -> None:
    """Write the page of everything that was predicted."""
    assert given.report is not None and predictions.kept is not None
    ready, score, screen = predictions.ready, predictions.score, predictions.screen
    support = ready.classifier.support
    images: dict[str, list[str]] = {name: [] for name in support.classes}
    for label, path in zip(support.labels, support.paths, strict=True):
        if Path(path).is_file():  # a saved classifier knows names only
            images[support.classes[label]].append(path)
    report = AdaptReport(
        classes=support.classes,
        support=images if any(images.values()) else {},
        outcomes=predictions.kept,
        facts={"checkpoint": Path(given.source).name, "seed": config.seed, **_rejection_facts(given, ready)},
        notes=[ready.dependence] if ready.dependence else [],
        support_check=check_sentences(ready.check),
        broken_support=support.broken,
        confusion=None if score is None else score.counts(),
    )
    with screen.progress("drawing the report", shown=bar) as advance:
        write_report(given.report, report, workers=config.runtime.num_workers, progress=advance)
    screen.note(f"report written: {given.report}")


def _rejection_facts(given: Options, ready: Ready) -> dict[str, object]:
    """How images were rejected, for the page."""
    facts: dict[str, object] = {}
    if given.reject_below is not None:
        facts["rejected below confidence"] = f"{given.reject_below:g}"
    rejection = ready.rejection()
    if rejection is not None:
        rate = 100 * rejection["false_rejection_rate"]
        facts["rejected as none of the classes"] = f"by a threshold that {rate:g} % of validation images fall below"
    return facts


def _check_end(given: Options, predictions: Predictions, predicted: int) -> None:
    """Raise DataError when nothing was predicted, and with `--strict` when an image has an error."""
    if not predicted:
        raise DataError("nothing could be predicted", hint="see the reasons above; give images that can be read")
    errors = len(predictions.errors.found)
    if given.strict and errors:
        raise DataError(f"{errors} images have errors", hint="repair or remove the images, or leave out --strict")
