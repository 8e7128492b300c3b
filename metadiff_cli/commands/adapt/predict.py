"""From query images to outcomes, one after the other: predicted, rejected, sorted into folders, and counted."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, Protocol

from metadiff_cli.classify.images import Encoded
from metadiff_cli.commands.adapt.inputs import Queries, Query
from metadiff_cli.commands.adapt.labelled import Score
from metadiff_cli.commands.adapt.output import DIGITS, NAMED, Errors, Outcome
from metadiff_cli.commands.adapt.sorting import Sorting
from metadiff_cli.console import Screen, counted
from metadiff_cli.core.checkpoints.facts import NONE
from metadiff_cli.core.evaluation.mistakes import Mistake
from metadiff_cli.data.scan import left_out

RANKED = 3  # classes per image that are kept even where --top-k is lower: the report shows two runners-up

Scores = tuple[list[float], float | None]  # probabilities (N,) and margin of one image


def guided_by(images: int) -> str:
    """What predictions depend on where unlabelled images guided the adaptation; an empty text where there were none."""
    return f"guided by {images} unlabelled images: each prediction also depends on them" if images else ""


class Chooser(Protocol):
    """Chooses query images that are worth labelling (suggestions.py)."""

    def add(self, outcome: Outcome, features: Any, probabilities: list[float]) -> None:
        """Take in a query image."""

    @property
    def chosen(self) -> list[Outcome]:
        """The images, the most useful one first; to be asked for when all were taken in."""

    def document(self) -> list[dict[str, Any]]:
        """The images as JSON."""

    def show(self, screen: Screen, *, table: bool) -> None:
        """Name the images on the screen."""


class Labeller(Protocol):
    """A classifier that is ready to label images: adapted with torch, or an exported graph."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the N classes, sorted."""

    @property
    def encoder(self) -> str:
        """The name of the encoder."""

    @property
    def twins(self) -> Mapping[bytes, str]:
        """The path or name of each support image, by the digest of its pixels."""

    @property
    def broken(self) -> Sequence[tuple[str, str]]:
        """Path and reason of support images that cannot be read."""

    @property
    def dependence(self) -> str:
        """What predictions depend on beside the support and their own image."""

    @property
    def unlike(self) -> str:
        """A sentence on a support that is unlike the base classes; empty for any other."""

    @property
    def suspects(self) -> Sequence[Mistake]:
        """Support images that look mislabelled."""

    @property
    def mistakes(self) -> Sequence[Mistake]:
        """Other support images that were taken for another class when they were held out."""

    def suggestions(self, count: int) -> Chooser:
        """What chooses so many query images that are worth labelling."""

    def scores(self, features: Sequence[Any]) -> list[Scores]:
        """The scores of images, from what `Encoded` holds of each."""

    def document(self) -> dict[str, Any]:
        """What the JSON document says of the classifier."""

    def rejection(self) -> dict[str, float] | None:
        """Of `--reject auto`: the threshold in nats, and the rate (0..1) that it was fitted for."""

    def files(self) -> dict[str, list[str]]:
        """The support images of each class, where there are files of them."""

    def sentences(self) -> list[str]:
        """What held-out support images say of the support."""


class Predictions:
    """The stream of outcomes, and what is learned on the way: errors, twins, rejections, the score."""

    def __init__(
        self,
        ready: Labeller,
        queries: Queries,
        screen: Screen,
        *,
        top_k: int,
        reject_below: float | None,
        labelled: bool,
        sorting: Sorting | None,
        keep: bool,
        suggest: int | None = None,
    ) -> None:
        """`keep` holds on to all outcomes, for a report; otherwise memory does not grow with the number of images.

        `suggest` is the number of images to suggest for labelling; None suggests none.
        """
        self.ready, self.queries, self.screen = ready, queries, screen
        self.ranked, self.reject_below, self.sorting = max(top_k, RANKED), reject_below, sorting
        self.classes = ready.classes
        self.score = Score(self.classes) if labelled else None
        broken = ready.broken  # they were named when the support was read
        self.errors = Errors([*broken, *queries.unreadable], told=len(broken))
        self.twin_of = ready.twins
        self.twins = self.rejected = 0
        self.kept: list[Outcome] | None = [] if keep else None
        self.suggestions = None if suggest is None else ready.suggestions(suggest)

    def outcomes(self, encoded: Iterator[list[Encoded]]) -> Iterator[Outcome]:
        """The outcome of each query image, in the order of the queries, from their features a batch at a time."""
        images = chain.from_iterable(self._scored(batch) for batch in encoded)
        for query, (image, scores) in zip(self.queries.items, images, strict=True):
            outcome = self._decided(query, image, scores)
            if self.sorting is not None and outcome.readable:
                outcome = self._sorted(outcome, self.sorting)
            self._count(outcome)
            if self.suggestions is not None and image.features is not None and scores is not None:
                self.suggestions.add(self._in_place(outcome), image.features, scores[0])
            yield outcome

    def _scored(self, batch: list[Encoded]) -> Iterator[tuple[Encoded, Scores | None]]:
        """Each image of a batch with its scores, where it can be read."""
        readable = [image.features for image in batch if image.features is not None]
        scores = iter(self.ready.scores(readable) if readable else ())
        return ((image, None if image.features is None else next(scores)) for image in batch)

    def _decided(self, query: Query, image: Encoded, scores: Scores | None) -> Outcome:
        """The outcome of an image. Classes that are equally probable stand in their order."""
        truth = query.label if self.score is not None else None
        if scores is None:
            return Outcome(query.path, reason=image.reason, truth=truth)
        p, margin = scores
        order = sorted(range(len(p)), key=lambda c: (-p[c], c))[: self.ranked]
        margin = None if margin is None else round(margin, DIGITS)
        rejected = (self.reject_below is not None and p[order[0]] < self.reject_below) or (
            margin is not None and margin < 0 and self.classes[order[0]] != NONE  # an answer that is no class stays
        )
        ranking = tuple((self.classes[c], p[c]) for c in order)
        twin = self.twin_of.get(image.digest)
        return Outcome(query.path, ranking, rejected=rejected, twin=twin, truth=truth, margin=margin)

    def _sorted(self, outcome: Outcome, sorting: Sorting) -> Outcome:
        """The outcome of an image that was sorted into its folder; an image that cannot be sorted is an error."""
        try:
            return sorting.sort(outcome)
        except OSError as error:
            self.errors.add(outcome.path, f"cannot be sorted into {sorting.sorter.root} ({error.strerror})")
            return outcome

    def _count(self, outcome: Outcome) -> None:
        if not outcome.readable:
            self.errors.add(outcome.path, outcome.reason)
        elif self.score is not None:
            self.score.add(outcome)
        self.rejected += outcome.rejected
        self.twins += outcome.twin is not None
        if outcome.twin is not None and self.twins <= NAMED:
            self.screen.warn(f"query {outcome.path} is also in the support ({outcome.twin})")
        if self.kept is not None:
            self.kept.append(self._in_place(outcome))

    def _in_place(self, outcome: Outcome) -> Outcome:
        """The outcome with the path where the image lies now."""
        moved = self.sorting is not None and self.sorting.sorter.move and outcome.sorted_to is not None
        return replace(outcome, path=str(outcome.sorted_to)) if moved else outcome

    def tail(self) -> dict[str, Any]:
        """What the JSON document says after the predictions."""
        scored = {} if self.score is None else {"labelled": self.score.document()}
        suggested = {} if self.suggestions is None else {"suggested": self.suggestions.document()}
        return {**scored, **suggested, "skipped": dict(self.queries.skipped), "errors": self.errors.document()}

    def finish(self, output: str) -> None:
        """Say on stderr what happened. Show the score and the suggestions; tables go to stdout where it has one."""
        screen = self.screen
        if self.score is not None:
            self.score.show(screen, matrix=output == "table")
        if self.suggestions is not None and output != "json":
            self.suggestions.show(screen, table=output == "table")
        if self.rejected:
            screen.note(f"rejected: {counted(self.rejected, 'query image')}")
        if self.twins > NAMED:
            screen.warn(f"{self.twins} query images are also in the support")
        if self.queries.skipped:
            screen.note(f"query: {left_out(self.queries.skipped)}")
        if self.sorting is not None:
            self.sorting.tell(screen)
        if self.ready.dependence:
            screen.note(self.ready.dependence)
        self.errors.show(screen)
