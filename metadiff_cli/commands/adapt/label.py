"""From a classifier, of either kind, to what `adapt` writes: predictions, the page, an exit code. No torch here."""

from collections.abc import Iterator
from pathlib import Path

from metadiff_cli.classify.images import Encoded
from metadiff_cli.commands.adapt.checks import Options
from metadiff_cli.commands.adapt.inputs import Queries
from metadiff_cli.commands.adapt.offenders import query_mistakes
from metadiff_cli.commands.adapt.output import WRITERS, Writing
from metadiff_cli.commands.adapt.predict import Labeller, Predictions
from metadiff_cli.commands.adapt.report import AdaptReport, write_report
from metadiff_cli.commands.adapt.sorting import Sorting
from metadiff_cli.config.schema import Config
from metadiff_cli.console import Screen, counted
from metadiff_cli.data.hub import shown
from metadiff_cli.errors import DataError
from metadiff_cli.files import checkpoint_path

TOP = 3  # classes that are shown per image


def label(
    given: Options,
    ready: Labeller,
    queries: Queries,
    sorting: Sorting | None,
    encoded: Iterator[list[Encoded]],
    config: Config,
    screen: Screen,
) -> None:
    """Write the predictions for the query images as they come, then everything that follows from them."""
    top_k = given.top_k or TOP
    predictions = Predictions(
        ready, queries, screen, top_k=top_k, reject_below=given.reject_below, labelled=given.labelled, sorting=sorting,
        keep=given.report is not None, suggest=given.suggest,
    )  # fmt: skip
    source = str(given.classifier or _model_source(given, ready))
    head = {"schema": "metadiff.adapt/1", **ready.document(), "checkpoint": source, "seed": config.seed}
    writing = Writing(screen, top_k, head, predictions.tail)
    predicted = WRITERS[given.output](writing, predictions.outcomes(encoded))
    predictions.finish(given.output)
    if given.report is not None:
        _write_report(given.report, given, predictions, config, source)
    _check_end(given, predictions, predicted)


def shows_bar(given: Options, screen: Screen) -> bool:
    """Whether a bar shows the progress; rows on a terminal show it themselves, and a bar would run into them."""
    return given.output in ("table", "json") or not screen.out.is_terminal


def _model_source(given: Options, ready: Labeller) -> str:
    """Where the model comes from: the name of an encoder, or the path of a checkpoint."""
    return ready.encoder if given.encoders else shown(checkpoint_path(given.checkpoint))


def _write_report(path: Path, given: Options, predictions: Predictions, config: Config, source: str) -> None:
    """Write the page of everything that was predicted."""
    ready, score, screen = predictions.ready, predictions.score, predictions.screen
    report = AdaptReport(
        classes=ready.classes,
        support=ready.files(),
        outcomes=predictions.kept or [],
        facts={"checkpoint": Path(source).name, "seed": config.seed, **_rejection_facts(given, ready)},
        notes=[text for text in (ready.dependence, ready.unlike) if text],
        support_check=ready.sentences()[:1],
        suspects=ready.suspects,
        mistakes=ready.mistakes if score is None else query_mistakes(predictions.kept or [], predictions.classes),
        suggested=None if predictions.suggestions is None else predictions.suggestions.chosen,
        broken_support=ready.broken,
        confusion=None if score is None else score.counts(),
    )
    with screen.progress("drawing the report", shown=shows_bar(given, screen)) as advance:
        write_report(path, report, workers=config.runtime.num_workers, progress=advance)
    screen.note(f"report written: {path}")


def _rejection_facts(given: Options, ready: Labeller) -> dict[str, object]:
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
