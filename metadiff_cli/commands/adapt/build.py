"""The classifier of an `adapt` run: loaded, or made of a support set, a saved classifier and unlabelled images."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from metadiff_cli.classify.images import (
    Encoded,
    adapt_classifier,
    classifier_rejector,
    encode_images,
    pool_from,
    read_support,
)
from metadiff_cli.commands import options
from metadiff_cli.commands.adapt.inputs import Queries, find_queries
from metadiff_cli.commands.evaluate.measure import sampling_of
from metadiff_cli.config.schema import Config
from metadiff_cli.console import Screen
from metadiff_cli.core.checkpoints.classifier import Origin, load_classifier
from metadiff_cli.core.checkpoints.model import Model, SavedClassifier, load_model
from metadiff_cli.core.encoders.image_encoder import ImageEncoder
from metadiff_cli.core.evaluation.support_check import SupportCheck, check_support
from metadiff_cli.core.method.rejection import Rejector, require_rejection
from metadiff_cli.core.method.support import Pool, SupportSet, require_classes
from metadiff_cli.data.scan import check_folder
from metadiff_cli.errors import DataError

NAMED = 5  # cases of one kind that are told one by one


@dataclass(frozen=True)
class Given:
    """Where a classifier comes from: `support` and `classifier`, or one of them; `checkpoint` goes with `support`."""

    support: Path | None
    classifier: Path | None
    checkpoint: Path | None
    transductive: bool
    unlabeled: Path | None


@dataclass(frozen=True)
class Ready:
    """A classifier and what it was made of; the queries' features where they were needed to make it.

    `dependence` says on what predictions depend beside the support and their own image; `rejector` is there where
    images of no class are to be found.
    """

    classifier: SavedClassifier
    origin: Origin
    check: SupportCheck | None = None
    encoded: list[list[Encoded]] | None = None
    dependence: str = ""
    rejector: Rejector | None = None

    def document(self) -> dict[str, Any]:
        """Its part of the JSON document."""
        pool, check = self.origin.pool, self.check
        return {
            "classes": list(self.classifier.classes),
            "support": self.origin.support.counts(),
            "support_check": None if check is None else _check_document(check),
            "protocol": "transductive" if pool is not None else "inductive",
            "unlabelled": 0 if pool is None else len(pool.digests),
            "rejection": rejection_document(self),
        }

    def rejecting(self) -> "Ready":
        """With its rejector. Raises CheckpointError where no threshold was fitted."""
        return replace(self, rejector=classifier_rejector(self.origin.model, self.origin.support, self.classifier))


def prepare(config: Config, given: Given, queries: Queries, screen: Screen) -> Ready:
    """Load, or read and adapt; a saved classifier is adapted anew only when something is added to it."""
    device = options.start(config)
    if given.classifier is None:
        model = load_model(options.checkpoint_path(given.checkpoint), device)
        return _adapted(config, model, None, given, queries, screen)
    saved, origin = load_classifier(given.classifier, device)
    if given.support is None and not given.transductive and given.unlabeled is None:
        return Ready(saved, origin, dependence=_dependence(origin.pool, False))
    return _adapted(config, origin.model, origin, given, queries, screen)


def _adapted(
    config: Config, model: Model, origin: Origin | None, given: Given, queries: Queries, screen: Screen
) -> Ready:
    """A classifier from all that there is: what a saved one was made of, the support, and the pool."""
    support = _support(config, model, origin, given.support, screen)
    encoded: list[list[Encoded]] | None = None
    pool = origin.pool if origin is not None else None
    if given.transductive:
        encoded = list(encode_queries(config, model.images, queries, "reading query images", screen))
        pool = _joined(pool_from(encoded), pool)
    if given.unlabeled is not None:
        pool = _joined(_further(config, model, given.unlabeled, screen), pool)
    classifier = adapt_classifier(model, support, sampling_of(config), seed=config.seed, pool=pool)
    check = check_support(classifier.task, support)
    _tell(check, screen)
    return Ready(classifier, Origin(model, support, pool), check, encoded, _dependence(pool, given.transductive))


def rejection_document(ready: Ready) -> dict[str, float] | None:
    """Of --reject auto: the threshold of the known score in nats, and the rate (0..1) that it was fitted for."""
    if ready.rejector is None:
        return None
    rate = require_rejection(ready.origin.model.metadiff).rate
    return {"threshold": round(float(ready.rejector.threshold), 6), "false_rejection_rate": rate}


def _dependence(pool: Pool | None, transductive: bool) -> str:
    if pool is None:
        return ""
    if transductive:
        return "transductive: each prediction also depends on the other query images"
    return f"guided by {len(pool.digests)} unlabelled images: each prediction also depends on them"


def _joined(first: Pool | None, second: Pool | None) -> Pool | None:
    return second if first is None else first.joined(second)


def _further(config: Config, model: Model, folder: Path, screen: Screen) -> Pool:
    """The pool of --unlabeled."""
    check_folder(folder)
    queries = find_queries([str(folder)])
    pool = pool_from(encode_queries(config, model.images, queries, "reading unlabelled images", screen))
    if pool is None:
        raise DataError(f"no image of {folder} can be read", hint="give other images, or leave --unlabeled out")
    return pool


def _support(config: Config, model: Model, origin: Origin | None, source: Path | None, screen: Screen) -> SupportSet:
    """The support of a saved classifier and of the folder together, with what is to be said about it."""
    if source is None:
        assert origin is not None
        return origin.support
    runtime = config.runtime
    with screen.progress("reading support images") as advance:
        support = read_support(source, model.images, runtime.batch_size, workers=runtime.num_workers, progress=advance)
    if origin is not None:
        support = origin.support.joined(support)
    for path, reason in support.broken:
        screen.warn(f"support image {path} is left out: {reason}")
    for path, twin in support.repeated[:NAMED]:
        screen.warn(f"support image {path} is the same picture as {twin} and counts once")
    if len(support.repeated) > NAMED:
        screen.warn(f"{len(support.repeated)} support images are repeated, and each picture counts once")
    require_classes(support)
    return support


def encode_queries(
    config: Config, images: ImageEncoder, queries: Queries, label: str, screen: Screen, *, shown: bool = True
) -> Iterator[list[Encoded]]:
    """Features of images as a stream, with progress where it is `shown`."""
    paths, runtime = [item.path for item in queries.items], config.runtime
    with screen.progress(label, shown=shown) as advance:
        yield from encode_images(paths, images, runtime.batch_size, workers=runtime.num_workers, progress=advance)


def check_sentences(check: SupportCheck | None) -> list[str]:
    """What leave-one-out says of the support: the estimate first, then each image that looks mislabelled."""
    if check is None:
        return []
    text = f"support: estimated accuracy {check.accuracy:.0f} % (leave-one-out, {check.images} images)"
    if check.confused:
        first, second, _ = check.confused[0]
        text += f", most confused: {first} / {second}; one more image each would help most"
    return [text] + [
        f"{suspect.path} looks mislabelled: it is in '{suspect.label}' and looks like '{suspect.looks_like}' "
        f"({suspect.confidence:.0%})"
        for suspect in check.suspects
    ]


def _tell(check: SupportCheck | None, screen: Screen) -> None:
    """The same on stderr; of many suspects the first few."""
    sentences = check_sentences(check)
    for text in sentences[:1]:
        screen.note(text)
    for text in sentences[1 : NAMED + 1]:
        screen.warn(text)
    if len(sentences) > NAMED + 1:
        screen.warn(f"{len(sentences) - 1} support images look mislabelled; --json names all")


def _check_document(check: SupportCheck) -> dict[str, Any]:
    return {
        "images": check.images,
        "accuracy": round(check.accuracy, 4),
        "confused": [{"classes": [first, second], "images": n} for first, second, n in check.confused],
        "suspects": [{**asdict(s), "confidence": round(s.confidence, 6)} for s in check.suspects],
    }
