"""From query images to outcomes, one after the other, and what is learned on the way: errors, twins, the score."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metadiff_cli.classify.images import Prediction, predict_images
from metadiff_cli.commands.adapt.build import NAMED, Ready, check_sentences, encode_queries, rejection_document
from metadiff_cli.commands.adapt.inputs import Queries
from metadiff_cli.commands.adapt.labelled import Score
from metadiff_cli.commands.adapt.output import Errors, Outcome, decide
from metadiff_cli.config.schema import Config
from metadiff_cli.console import Screen, counted
from metadiff_cli.data.sort import Sorter

if TYPE_CHECKING:
    from metadiff_cli.commands.adapt.report import QueryImage


class Stream:
    """The stream from images to outcomes, and what is learned on the way: errors, twins, the score."""

    def __init__(
        self, config: Config, ready: Ready, queries: Queries, screen: Screen, top_k: int,
        reject_below: float | None, labelled: bool, bar: bool, keep: bool = False,
    ) -> None:  # fmt: skip
        """`keep` holds on to every prediction, as a report needs; otherwise memory does not grow with the queries."""
        self.kept: list[QueryImage] | None = [] if keep else None
        self.config, self.ready, self.queries, self.screen = config, ready, queries, screen
        self.top_k, self.reject_below, self.bar = top_k, reject_below, bar
        self.classes = ready.classifier.classes
        self.score = Score(self.classes) if labelled else None
        broken = ready.origin.support.broken  # they were named when the support was read
        self.errors = Errors([*broken, *queries.unreadable], told=len(broken))
        self.twins = self.rejected = 0
        self.sorted_new = self.sorted_old = 0
        self.sorting: str | None = None

    def outcomes(self) -> Iterator[Outcome]:
        """In the order of the queries."""
        for item, prediction in zip(self.queries.items, self._predictions(), strict=True):
            truth = item.label if self.score is not None else None
            outcome = decide(prediction, self.classes, self.top_k, self.reject_below, truth)
            self._note(outcome)
            if self.kept is not None:
                self.kept.append(_kept(prediction, outcome))
            yield outcome

    def _predictions(self) -> Iterator[Prediction]:
        classifier, encoded = self.ready.classifier, self.ready.encoded
        stream = encoded or encode_queries(
            self.config, classifier.images, self.queries, "predicting", self.screen, shown=self.bar
        )
        return predict_images(classifier, stream, self.ready.origin.support.known(), self.ready.rejector)

    def _note(self, outcome: Outcome) -> None:
        if not outcome.good:
            self.errors.add(outcome.path, outcome.reason)
        elif self.score is not None:
            self.score.add(outcome)
        self.twins += outcome.twin is not None
        self.rejected += outcome.rejected
        if outcome.twin is not None and self.twins <= NAMED:
            self.screen.warn(f"query {outcome.path} is also in the support ({outcome.twin})")

    def sorted(self, outcomes: Iterator[Outcome], root: Path, move: bool) -> Iterator[Outcome]:
        """The same outcomes, each image brought to its class's folder. What cannot be brought there is an error."""
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
                    if move and placed.new and self.kept is not None:  # the report draws the picture where it is now
                        self.kept[-1] = replace(self.kept[-1], path=str(placed.path))
            yield outcome

    def write_report(self, path: Path, checkpoint: str) -> None:
        """The page of everything that was predicted."""
        from metadiff_cli.commands.adapt.report import AdaptReport, Confusion, write_report

        assert self.kept is not None
        support = self.ready.origin.support
        by_class: dict[str, list[str]] = {cls: [] for cls in self.classes}
        for label, image in zip(support.labels, support.paths, strict=True):
            by_class[self.classes[label]].append(image)
        readable = {cls: [image for image in images if Path(image).is_file()] for cls, images in by_class.items()}
        score = self.score
        report = AdaptReport(
            classes=self.classes,
            support=readable if any(readable.values()) else {},
            queries=self.kept,
            facts={"checkpoint": Path(checkpoint).name, "seed": self.config.seed, **self._rejection_facts()},
            notes=[self.ready.dependence] if self.ready.dependence else [],
            support_check=check_sentences(self.ready.check),
            broken_support=support.broken,
            confusion=None if score is None else Confusion(score.counts(), "the labelled query images"),
        )
        with self.screen.progress("drawing the report", shown=self.bar) as advance:
            write_report(path, report, workers=self.config.runtime.num_workers, progress=advance)
        self.screen.note(f"report written: {path}")

    def _rejection_facts(self) -> dict[str, object]:
        """How images were rejected, for the page."""
        below, auto = self.reject_below, rejection_document(self.ready)
        facts: dict[str, object] = {} if below is None else {"rejected below confidence": f"{below:g}"}
        if auto is not None:
            rate = 100 * auto["false_rejection_rate"]
            facts["rejected as none of the classes"] = f"by a threshold that {rate:g} % of validation images fall below"
        return facts

    def tail(self) -> dict[str, Any]:
        """What the JSON document says after the predictions."""
        scored = {} if self.score is None else {"labelled": self.score.document()}
        return {**scored, "errors": self.errors.document()}

    def finish(self, *, matrix: bool) -> None:
        """Say on stderr what happened, and show the score."""
        screen = self.screen
        if self.score is not None:
            self.score.show(screen, matrix=matrix)
        if self.rejected:
            screen.note(f"rejected: {counted(self.rejected, 'query image')}")
        if self.twins > NAMED:
            screen.warn(f"{self.twins} query images are also in the support")
        if self.queries.skipped:
            screen.note(f"left out, as they are no images: {counted(self.queries.skipped, 'query file')}")
        if self.sorting is not None:
            screen.note(f"{counted(self.sorted_new, 'image')} {self.sorting}")
            if self.sorted_old:
                screen.note(f"there already, and left where they are: {counted(self.sorted_old, 'image')}")
        if self.ready.dependence:
            screen.note(self.ready.dependence)
        self.errors.show(screen)


def _kept(prediction: Prediction, outcome: Outcome) -> "QueryImage":
    """A prediction as the report shows it."""
    from metadiff_cli.commands.adapt.report import QueryImage

    return QueryImage(
        prediction.path, prediction.probabilities, prediction.reason, outcome.rejected, prediction.twin, outcome.truth
    )
