"""`adapt --suggest`: the query images that are worth labelling next."""

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from metadiff_cli.classify.classifier import Classifier
from metadiff_cli.commands.adapt.output import Outcome, percentages
from metadiff_cli.console import Screen, counted
from metadiff_cli.core.evaluation.suggest import entropy_of, suggested

MOST = 2000  # images that are compared; of more, the most uncertain ones
SHOWN = 2  # classes that are named per image


class Suggestions:
    """Collects query images, in bounded memory, and chooses at most `count` of them in the end."""

    def __init__(self, classifier: Classifier, count: int) -> None:
        self.classifier, self.count = classifier, count
        self.seen: list[tuple[float, Outcome, Tensor]] = []  # entropy, outcome and features (D,)

    def add(self, outcome: Outcome, features: Tensor, probabilities: list[float]) -> None:
        """Take in a query image; one that is also in the support has a label already."""
        if outcome.twin is not None:
            return
        self.seen.append((float(entropy_of(torch.tensor(probabilities))), outcome, features))
        if len(self.seen) > 2 * MOST:
            self._keep_uncertain()

    def _keep_uncertain(self) -> None:
        self.seen = sorted(self.seen, key=lambda image: -image[0])[:MOST]

    @cached_property
    def chosen(self) -> list[Outcome]:
        """The suggested images, the most useful one first; to be asked for when all images were taken in."""
        if not self.seen:
            return []
        self._keep_uncertain()
        classifier, weights = self.classifier, torch.tensor([entropy for entropy, _, _ in self.seen])
        phi = self._embedded(torch.stack([features for _, _, features in self.seen]))
        picks = suggested(phi, weights.to(phi), self._embedded(classifier.support.features), self.count)
        return [self.seen[i][1] for i in picks]

    def _embedded(self, features: Tensor) -> Tensor:
        """Joint features (n, J) of features (n, D)."""
        return self.classifier.task.embed(self.classifier.expanded(features))[0]

    def document(self) -> list[dict[str, Any]]:
        """The suggestions as JSON."""
        return [{key: outcome.document(SHOWN)[key] for key in ("path", "top")} for outcome in self.chosen]

    def show(self, screen: Screen, *, table: bool) -> None:
        """Name the suggestions: in a table on stdout, or where that holds rows for a program, on stderr."""
        rows = [(outcome.path, percentages(outcome.ranking[:SHOWN])) for outcome in self.chosen]
        if not rows:
            screen.note("no query image is worth labelling: all are certain, or in the support")
        elif table:
            screen.table(f"worth labelling next: {counted(len(rows), 'image')}", ("image", "looks like"), rows, left=2)
        else:
            for path, classes in rows:
                screen.result(f"worth labelling next: {path} ({classes})")
