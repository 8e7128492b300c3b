"""A classifier with torch that is ready to label images: what `label` and the page ask of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from metadiff_cli.classify.classifier import Classifier
from metadiff_cli.classify.images import Encoded
from metadiff_cli.commands.adapt.advice import check_document, check_sentences, unlike_sentence
from metadiff_cli.commands.adapt.predict import Scores
from metadiff_cli.commands.adapt.suggestions import Suggestions
from metadiff_cli.core.evaluation.mistakes import Mistake
from metadiff_cli.core.evaluation.support_check import SupportCheck
from metadiff_cli.core.method.rejection import Rejector, require_rejection


@dataclass(frozen=True)
class Ready:
    """A classifier that is ready to predict.

    `queries` are the features of the query images where they guided the adaptation. `dependence` says what predictions
    depend on beside the support and their own image. `rejector` is there with `--reject auto`. `doubt` is that of
    `doubt_about`; None for a classifier that is used as it was saved.
    """

    classifier: Classifier
    check: SupportCheck | None = None
    queries: list[list[Encoded]] | None = None
    dependence: str = ""
    rejector: Rejector | None = None
    doubt: float | None = None

    @property
    def unlike(self) -> str:
        """A sentence on a support that is unlike the base classes; empty for any other."""
        return unlike_sentence(self.doubt)

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the N classes, sorted."""
        return self.classifier.classes

    @property
    def encoder(self) -> str:
        """The name of the encoder."""
        return self.classifier.model.images.name

    @property
    def twins(self) -> Mapping[bytes, str]:
        """The path of each support image, by the digest of its pixels."""
        return self.classifier.support.path_of()

    @property
    def broken(self) -> Sequence[tuple[str, str]]:
        """Path and reason of support images that cannot be read."""
        return self.classifier.support.broken

    def scores(self, features: Sequence[torch.Tensor]) -> list[Scores]:
        """Probabilities and margins of images, from the features (D,) of each."""
        z, classifier = torch.stack(list(features)), self.classifier
        probabilities = classifier.probabilities(z).tolist()
        if self.rejector is None:
            return [(p, None) for p in probabilities]
        margins = self.rejector.margins(classifier.expanded(z))[0].tolist()
        return list(zip(probabilities, margins, strict=True))

    def files(self) -> dict[str, list[str]]:
        """The support images of each class; none where they are names, as in a saved classifier."""
        support = self.classifier.support
        files: dict[str, list[str]] = {name: [] for name in support.classes}
        for label, image in zip(support.labels, support.paths, strict=True):
            if Path(image).is_file():
                files[support.classes[label]].append(image)
        return files if any(files.values()) else {}

    @property
    def suspects(self) -> Sequence[Mistake]:
        """Support images that look mislabelled."""
        return () if self.check is None else self.check.suspects

    @property
    def mistakes(self) -> Sequence[Mistake]:
        """Other support images that were taken for another class when they were held out."""
        return () if self.check is None else [m for m in self.check.mistakes if m not in self.check.suspects]

    def suggestions(self, count: int) -> Suggestions:
        """What chooses so many query images that are worth labelling."""
        return Suggestions(self.classifier, count)

    def sentences(self) -> list[str]:
        """What held-out support images say of the support."""
        return check_sentences(self.check, self.classifier.support)

    def document(self) -> dict[str, Any]:
        """What the JSON document says of the classifier."""
        classifier, pool = self.classifier, self.classifier.pool
        return {
            "classes": list(classifier.classes),
            "support": classifier.support.counts(),
            "support_check": None if self.check is None else check_document(self.check, classifier.support),
            "doubt": None if self.doubt is None else round(self.doubt, 6),
            "protocol": "inductive" if pool is None else "transductive",
            "unlabelled": 0 if pool is None else len(pool.digests),
            "rejection": self.rejection(),
        }

    def rejection(self) -> dict[str, float] | None:
        """Of `--reject auto`: the threshold of the known score in nats, and the rate (0..1) that it was fitted for."""
        if self.rejector is None:
            return None
        rate = require_rejection(self.classifier.model.metadiff).rate
        return {"threshold": round(float(self.rejector.threshold), 6), "false_rejection_rate": rate}
