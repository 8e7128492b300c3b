"""The classifier of an `adapt` run: loaded from a file, or adapted to the support, old and new, and to the pool."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from metadiff_cli.classify.classifier import Classifier, adapt
from metadiff_cli.classify.images import Encoded, encode_images
from metadiff_cli.classify.support_set import Pool, SupportSet, pool_of, read_support
from metadiff_cli.commands.adapt.inputs import Queries, find_queries
from metadiff_cli.commands.settings import sampling_of
from metadiff_cli.config.schema import Config
from metadiff_cli.console import Screen
from metadiff_cli.core.checkpoints.model import Model, load_model
from metadiff_cli.core.encoders.image_encoder import ImageEncoder
from metadiff_cli.core.evaluation.support_check import SupportCheck, check_support
from metadiff_cli.core.method.rejection import Rejector, require_rejection
from metadiff_cli.data.scan import check_folder
from metadiff_cli.errors import DataError
from metadiff_cli.files import checkpoint_path

NAMED = 5  # cases of one kind that stderr names one by one


@dataclass(frozen=True)
class Ready:
    """A classifier that is ready to predict.

    `queries` are the features of the query images where they guided the adaptation. `dependence` says what predictions
    depend on beside the support and their own image. `rejector` is there with `--reject auto`.
    """

    classifier: Classifier
    check: SupportCheck | None = None
    queries: list[list[Encoded]] | None = None
    dependence: str = ""
    rejector: Rejector | None = None

    def document(self) -> dict[str, Any]:
        """What the JSON document says of the classifier."""
        classifier, pool = self.classifier, self.classifier.pool
        return {
            "classes": list(classifier.classes),
            "support": classifier.support.counts(),
            "support_check": None if self.check is None else _check_document(self.check),
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


@dataclass(frozen=True)
class Builder:
    """Makes the classifier of one run, and tells the screen about it."""

    config: Config
    device: torch.device
    screen: Screen

    def from_support(
        self, source: Path, checkpoint: Path | None, queries: Queries | None, unlabeled: Path | None
    ) -> Ready:
        """Adapt a checkpoint, None for that of the package, to a support folder or listing.

        `queries` and the images of the folder `unlabeled` guide the adaptation, where they are given. Raises DataError
        and CheckpointError.
        """
        model = load_model(checkpoint_path(checkpoint), self.device)
        return self._adapted(model, self._support(source, model), None, queries, unlabeled)

    def from_file(self, file: Path, source: Path | None, queries: Queries | None, unlabeled: Path | None) -> Ready:
        """Load a saved classifier. It is adapted again where a support or unlabelled images are added to it."""
        saved = Classifier.load(file, self.device)
        if source is None and queries is None and unlabeled is None:
            return Ready(saved, dependence=_dependence(saved.pool, transductive=False))
        support = saved.support if source is None else self._support(source, saved.model, saved.support)
        return self._adapted(saved.model, support, saved.pool, queries, unlabeled)

    def _adapted(
        self, model: Model, support: SupportSet, pool: Pool | None, queries: Queries | None, unlabeled: Path | None
    ) -> Ready:
        encoded = None
        if queries is not None:
            encoded = list(self.encode(queries, model.images, "reading query images"))
            pool = _joined(pool_of(image for batch in encoded for image in batch), pool)
        if unlabeled is not None:
            pool = _joined(self._unlabelled(unlabeled, model), pool)
        classifier = adapt(model, support, sampling_of(self.config), seed=self.config.seed, pool=pool)
        check = check_support(classifier.task, support.task(), support.classes, support.paths)
        _tell(check, self.screen)
        return Ready(classifier, check, encoded, _dependence(pool, transductive=queries is not None))

    def _support(self, source: Path, model: Model, saved: SupportSet | None = None) -> SupportSet:
        """The support of a folder or listing, joined to that of a saved classifier, with warnings about its images."""
        runtime = self.config.runtime
        with self.screen.progress("reading support images") as advance:
            support = read_support(
                source, model.images, runtime.batch_size, workers=runtime.num_workers, progress=advance
            )
        support = support if saved is None else saved.joined(support)
        for path, reason in support.broken:
            self.screen.warn(f"support image {path} is left out: {reason}")
        for path, twin in support.repeated[:NAMED]:
            self.screen.warn(f"support image {path} is the same picture as {twin} and counts once")
        if len(support.repeated) > NAMED:
            self.screen.warn(f"{len(support.repeated)} support images are repeated, and each picture counts once")
        return support

    def _unlabelled(self, folder: Path, model: Model) -> Pool:
        """The pool of `--unlabeled`."""
        check_folder(folder)
        images = self.encode(find_queries([str(folder)]), model.images, "reading unlabelled images")
        pool = pool_of(image for batch in images for image in batch)
        if pool is None:
            raise DataError(f"no image in {folder} can be read", hint="give other images, or leave out --unlabeled")
        return pool

    def encode(
        self, queries: Queries, encoder: ImageEncoder, label: str, *, bar: bool = True
    ) -> Iterator[list[Encoded]]:
        """Features of images, a batch at a time, with a progress bar where `bar` is set."""
        paths, runtime = [query.path for query in queries.items], self.config.runtime
        with self.screen.progress(label, shown=bar) as advance:
            yield from encode_images(paths, encoder, runtime.batch_size, workers=runtime.num_workers, progress=advance)


def _joined(first: Pool | None, second: Pool | None) -> Pool | None:
    return second if first is None else first.joined(second)


def _dependence(pool: Pool | None, *, transductive: bool) -> str:
    if pool is None:
        return ""
    if transductive:
        return "transductive: each prediction also depends on the other query images"
    return f"guided by {len(pool.digests)} unlabelled images: each prediction also depends on them"


def check_sentences(check: SupportCheck | None) -> list[str]:
    """What leave-one-out says of the support: first the estimate, then each image that looks mislabelled."""
    if check is None:
        return []
    estimate = f"support: estimated accuracy {check.accuracy:.0f} % (leave-one-out, {check.images} images)"
    if check.confused:
        first, second, _ = check.confused[0]
        estimate += f", most confused: {first} / {second}; one more image each would help most"
    return [estimate] + [
        f"{suspect.path} looks mislabelled: it is in '{suspect.label}' and looks like '{suspect.looks_like}' "
        f"({suspect.confidence:.0%})"
        for suspect in check.suspects
    ]


def _tell(check: SupportCheck | None, screen: Screen) -> None:
    """Say the same on stderr, and name the first suspects only."""
    sentences = check_sentences(check)
    for text in sentences[:1]:
        screen.note(text)
    for text in sentences[1 : NAMED + 1]:
        screen.warn(text)
    if len(sentences) > NAMED + 1:
        screen.warn(f"{len(sentences) - 1} support images look mislabelled; --json names all of them")


def _check_document(check: SupportCheck) -> dict[str, Any]:
    return {
        "images": check.images,
        "accuracy": round(check.accuracy, 4),
        "confused": [{"classes": [first, second], "images": n} for first, second, n in check.confused],
        "suspects": [{**asdict(s), "confidence": round(s.confidence, 6)} for s in check.suspects],
    }
