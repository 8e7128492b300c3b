"""The body of `metadiff adapt`: options in, predictions, files and an exit code out."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from metadiff_cli.commands.adapt.advice import check_sentences
from metadiff_cli.commands.adapt.build import Builder, Found, Ready, Start
from metadiff_cli.commands.adapt.checks import (
    Options,
    check_folders,
    check_labels,
    check_options,
    check_outputs,
    sampling_of,
)
from metadiff_cli.commands.adapt.inputs import Queries, find_queries
from metadiff_cli.commands.adapt.offenders import query_mistakes
from metadiff_cli.commands.adapt.output import WRITERS, Writing
from metadiff_cli.commands.adapt.predict import Predictions
from metadiff_cli.commands.adapt.report import AdaptReport, write_report
from metadiff_cli.commands.adapt.sorting import Sorting
from metadiff_cli.commands.settings import model_config
from metadiff_cli.commands.settings import start as start_device
from metadiff_cli.config.schema import Config
from metadiff_cli.console import Screen, counted
from metadiff_cli.core.evaluation.support_check import Mistake
from metadiff_cli.core.method.rejection import require_rejection
from metadiff_cli.data.hub import fetch, shown
from metadiff_cli.data.sort import Sorter
from metadiff_cli.errors import DataError
from metadiff_cli.files import checkpoint_path

TOP = 3  # classes that are shown per image


def run(given: Options, screen: Screen) -> None:
    """Make the classifier and label the query images. Raises a MetaDiffError for what cannot be done."""
    check_options(given)
    config = model_config(given.config, given.set, given.flags, note=screen.note)
    check_outputs(given)
    queries = find_queries(given.query, null=given.null, more=given.more)
    support = None if given.support is None else Found.at(given.support)
    for text in () if support is None else support.notes:
        screen.note(text)
    unlabeled = None if given.unlabeled is None else find_queries([str(given.unlabeled)], option="--unlabeled")
    builder = Builder(config, sampling_of(given, config, screen), start_device(config), screen)
    start = builder.start(replace(given, checkpoint=fetch(given.checkpoint, screen.note)), support, len(queries.items))
    if given.reject is not None:
        require_rejection(start.model.metadiff)
    classes = _classes(support, start)
    sorting = None
    if given.sort_into is not None:
        sorter = Sorter(given.sort_into, classes, move=given.move)
        check_folders(sorter)
        queries = queries.outside(sorter.root, [*sorter.folders.values()], given.query)
        sorting = Sorting(sorter, () if support is None else support.split.paths)
    check_labels(given, queries, classes, screen)
    ready = builder.build(start, support, queries if given.transductive else None, unlabeled)
    if given.reject is not None:
        ready = replace(ready, rejector=ready.classifier.rejector())
    if given.save is not None:
        ready.classifier.save(given.save)
        screen.note(f"classifier written: {given.save}")
    _predict(given, ready, queries, sorting, builder)


def _classes(support: Found | None, start: Start) -> list[str]:
    """The names of all classes, sorted."""
    new, saved = () if support is None else support.split.classes, () if start.saved is None else start.saved.classes
    return sorted({*new, *saved})


def _predict(given: Options, ready: Ready, queries: Queries, sorting: Sorting | None, builder: Builder) -> None:
    """Write the predictions as they come, then everything that follows from them."""
    screen, top_k = builder.screen, given.top_k or TOP
    predictions = Predictions(
        ready, queries, screen, top_k=top_k, reject_below=given.reject_below, labelled=given.labelled, sorting=sorting,
        keep=given.report is not None, suggest=given.suggest,
    )  # fmt: skip
    source = str(given.classifier or _model_source(given, ready))
    head = {"schema": "metadiff.adapt/1", **ready.document(), "checkpoint": source, "seed": builder.config.seed}
    # rows on a terminal show the progress, and a bar would run into them
    bar = given.output in ("table", "json") or not screen.out.is_terminal
    if ready.queries is not None:
        encoded = iter(ready.queries)
    else:
        encoded = builder.encode(queries, ready.classifier.model.images, "predicting", bar=bar)
    writing = Writing(screen, top_k, head, predictions.tail)
    predicted = WRITERS[given.output](writing, predictions.outcomes(encoded))
    predictions.finish(given.output)
    if given.report is not None:
        _write_report(given.report, given, predictions, builder.config, source, bar)
    _check_end(given, predictions, predicted)


def _model_source(given: Options, ready: Ready) -> str:
    """Where the model comes from: the name of an encoder, or the path of a checkpoint."""
    return ready.classifier.model.images.name if given.encoders else shown(checkpoint_path(given.checkpoint))


def _write_report(path: Path, given: Options, predictions: Predictions, config: Config, source: str, bar: bool) -> None:
    """Write the page of everything that was predicted."""
    ready, score, screen = predictions.ready, predictions.score, predictions.screen
    support = ready.classifier.support
    images: dict[str, list[str]] = {name: [] for name in support.classes}
    for label, image in zip(support.labels, support.paths, strict=True):
        if Path(image).is_file():  # a saved classifier knows names only
            images[support.classes[label]].append(image)
    report = AdaptReport(
        classes=support.classes,
        support=images if any(images.values()) else {},
        outcomes=predictions.kept or [],
        facts={"checkpoint": Path(source).name, "seed": config.seed, **_rejection_facts(given, ready)},
        notes=[text for text in (ready.dependence, ready.unlike) if text],
        support_check=check_sentences(ready.check, support)[:1],
        suspects=() if ready.check is None else ready.check.suspects,
        mistakes=_mistakes(predictions),
        suggested=None if predictions.suggestions is None else predictions.suggestions.chosen,
        broken_support=support.broken,
        confusion=None if score is None else score.counts(),
    )
    with screen.progress("drawing the report", shown=bar) as advance:
        write_report(path, report, workers=config.runtime.num_workers, progress=advance)
    screen.note(f"report written: {path}")


def _mistakes(predictions: Predictions) -> Sequence[Mistake]:
    """Images that were taken for another class: query images whose class is known, else held-out support images."""
    check = predictions.ready.check
    if predictions.score is not None:
        return query_mistakes(predictions.kept or [], predictions.classes)
    return () if check is None else [m for m in check.mistakes if m not in check.suspects]


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
    """Raise an error when nothing was predicted or sorted, and with `--strict` when an image has an error."""
    if not predicted:
        raise DataError("nothing could be predicted", hint="see the reasons above; give images that can be read")
    if predictions.sorting is not None:
        predictions.sorting.check()
    errors = len(predictions.errors.found)
    if given.strict and errors:
        raise DataError(
            f"--strict: {counted(errors, 'error')}", hint="remove or replace the images, or leave out --strict"
        )
