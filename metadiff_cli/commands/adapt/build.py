"""The classifier of an `adapt` run: loaded from a file, or adapted to the support, old and new, and to the pool."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from metadiff_cli.classify.classifier import Classifier, adapt
from metadiff_cli.classify.images import Encoded, encode_images
from metadiff_cli.classify.models import installed_encoders, model_of_encoder, open_model
from metadiff_cli.classify.support_set import Pool, SupportSet, pool_of, read_support
from metadiff_cli.commands.adapt.advice import check_sentences
from metadiff_cli.commands.adapt.checks import Options
from metadiff_cli.commands.adapt.corrected import corrected
from metadiff_cli.commands.adapt.corrections import Corrections
from metadiff_cli.commands.adapt.inputs import Queries, find_queries
from metadiff_cli.commands.adapt.output import NAMED
from metadiff_cli.commands.adapt.predict import guided_by
from metadiff_cli.commands.adapt.ready import Ready
from metadiff_cli.commands.runtime import accelerated
from metadiff_cli.config.schema import Config
from metadiff_cli.console import Screen
from metadiff_cli.core.checkpoints.classifier import settings_header
from metadiff_cli.core.checkpoints.facts import NONE
from metadiff_cli.core.checkpoints.file import KINDS, read_header
from metadiff_cli.core.checkpoints.model import Model
from metadiff_cli.core.encoders.bank import Encoding
from metadiff_cli.core.encoders.image_encoder import ImageEncoder
from metadiff_cli.core.evaluation.support_check import SupportCheck, check_support
from metadiff_cli.core.method.adapt import Sampling, doubt_about
from metadiff_cli.data.folders import Split
from metadiff_cli.data.listing import open_labelled
from metadiff_cli.data.scan import Scan, class_name, left_out, suggestion
from metadiff_cli.errors import CheckpointError, DataError


@dataclass(frozen=True)
class Found:
    """The images of a support that are not read yet, what of its folder cannot be read, and `notes` for the user."""

    split: Split
    locked: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()

    @classmethod
    def at(cls, source: Path) -> "Found":
        """Look through a support folder or listing. Raises DataError, also for a class that cannot be read at all."""
        scan = Scan()
        split = open_labelled(source, scan)
        for path, reason in scan.unreadable:
            if path.parent == source and class_name(path.name) not in split.classes:
                raise DataError(
                    f"class '{path.name}' in {source} cannot be read ({reason})",
                    hint="check the permissions of its folder, or remove it",
                )
        notes = [f"support: {text}" for text in (*scan.notes, left_out(scan.skipped)) if text]
        return cls(split, tuple((str(path), reason) for path, reason in scan.unreadable), tuple(notes))

    @classmethod
    def of(cls, support: Path | None, none: Path | None) -> "Found | None":
        """The images of `--support` and `--none`; None where neither is given. Raises DataError."""
        found = None if support is None else cls.at(support)
        if none is None:
            return found
        images = find_queries([str(none)], option="--none")
        found = found or cls(Split("support", (), (), (), str(none)))
        classes = found.split.classes if NONE in found.split.classes else (*found.split.classes, NONE)
        labels = (*found.split.labels, *[classes.index(NONE)] * len(images.items))
        split = replace(found.split, classes=classes, paths=(*found.split.paths, *images.paths()), labels=labels)
        skipped = left_out(images.skipped)
        notes = (*found.notes, *([f"none: {skipped}"] if skipped else []))
        return cls(split, (*found.locked, *images.unreadable), notes)


@dataclass(frozen=True)
class Start:
    """What an adaptation starts from: the model of a checkpoint, or a saved classifier with its model.

    `current` is False where the support of the saved classifier was corrected since it was adapted.
    """

    model: Model
    saved: Classifier | None = None
    current: bool = True

    def corrected(self, corrections: Corrections, screen: Screen) -> "Start":
        """The same with corrections of the saved classifier's support. Raises DataError as they do."""
        if self.saved is None or not corrections:
            return self
        support = corrected(self.saved.support, corrections, self.model.images.size, screen)
        return replace(self, saved=replace(self.saved, support=support), current=False)


@dataclass(frozen=True)
class Builder:
    """Makes the classifier of one run, and tells the screen about it."""

    config: Config
    sampling: Sampling
    device: torch.device
    screen: Screen

    def start(self, given: Options, support: Found | None, queries: int) -> Start:
        """Load a saved classifier, or an encoder, or else a checkpoint, for so many query images.

        Raises CheckpointError and ConfigError.
        """
        start = self._opened(given, support)
        count = queries + (0 if support is None else len(support.split.paths))
        model = replace(start.model, images=accelerated(start.model.images, self.config, count, self.screen))
        saved = None if start.saved is None else replace(start.saved, model=model)
        return Start(model, saved)

    def _opened(self, given: Options, support: Found | None) -> Start:
        if given.classifier is not None:
            _check_kind(given.classifier, "classifier", "--classifier")
            saved = Classifier.load(given.classifier, self.device)
            return Start(saved.model, saved)
        if given.encoders:
            return Start(self._of_encoder(given, support))
        if given.checkpoint is not None:
            _check_kind(given.checkpoint, "model", "--checkpoint")
        return Start(open_model(given.checkpoint, self.device, given.views))

    def _of_encoder(self, given: Options, support: Found | None) -> Model:
        """The model of the encoder that is asked for; of several, of the best on the support."""
        names = installed_encoders() if given.encoders == ["auto"] else given.encoders
        progress = self.screen.moves and not self.screen.quiet

        def model_of(name: str) -> Model:
            return model_of_encoder(
                name, self.device, views=given.views, weights=given.encoder_weights, progress=progress
            )

        if len(names) == 1:
            return model_of(names[0])
        assert support is not None  # else the encoder would be that of a saved classifier
        accuracy = {name: self._held_out_accuracy(name, model_of(name), support) for name in names}  # one in memory
        best = max(accuracy, key=lambda name: accuracy[name])
        self.screen.note(f"taking the encoder {best}")
        return model_of(best)

    def _held_out_accuracy(self, name: str, model: Model, support: Found) -> float:
        """The accuracy in percent on held-out images of the support, which the screen shows. Raises DataError."""
        images = self._read(support, model.images)
        check = self._check(adapt(model, images, self.sampling, seed=self.config.seed), images)
        if check is None:
            raise DataError(
                "encoders are compared by images that are held out, and each class has one image",
                hint="give one --encoder, or two images of a class",
            )
        self.screen.note(f"encoder {name}: {check.accuracy:.1f} % of {check.images} held-out support images")
        return check.accuracy

    def _check(self, classifier: Classifier, images: SupportSet) -> SupportCheck | None:
        """What images that are held out say of the support."""
        task = classifier.task
        return check_support(task, images.task(task.metric), images.classes, images.paths)

    def build(self, start: Start, support: Found | None, guiding: Queries | None, unlabeled: Queries | None) -> Ready:
        """Adapt to the images of the support, those of the saved classifier included.

        The query images `guiding` and the images `unlabeled` guide the adaptation, where they are given. A saved
        classifier to which nothing is added, and that was not corrected, is not adapted again. Raises DataError.
        """
        saved = start.saved
        if saved is not None and start.current and support is None and guiding is None and unlabeled is None:
            return Ready(saved, dependence=_dependence(saved.pool, transductive=False))
        images, pool, encoded = self._support(support, start), None if saved is None else saved.pool, None
        if guiding is not None:
            encoded = list(self.encode(guiding, start.model.images, "reading query images"))
            pool = _joined(pool_of(image for batch in encoded for image in batch), pool)
        if unlabeled is not None:
            pool = _joined(self._unlabelled(unlabeled, start.model), pool)
        classifier = adapt(start.model, images, self.sampling, seed=self.config.seed, pool=pool)
        check = self._check(classifier, images)
        doubt = float(doubt_about(start.model.metadiff, images.task(start.model.metadiff.metric)))
        dependence = _dependence(pool, transductive=guiding is not None)
        ready = Ready(classifier, check, encoded, dependence, doubt=doubt)
        self._tell(ready)
        return ready

    def _support(self, found: Found | None, start: Start) -> SupportSet:
        """The support of a folder or listing, joined to that of a saved classifier, with warnings about its images."""
        if found is None:
            assert start.saved is not None
            return start.saved.support
        support = self._read(found, start.model.images)
        support = replace(support, broken=(*found.locked, *support.broken))
        support = support if start.saved is None else start.saved.support.joined(support)
        for path, reason in support.broken:
            self.screen.warn(f"support image {path} is left out: {reason}")
        for path, twin in support.repeated[:NAMED]:
            self.screen.warn(f"support image {path} is the same picture as {twin} and counts once")
        if len(support.repeated) > NAMED:
            self.screen.warn(f"{len(support.repeated)} support images are repeated, and each picture counts once")
        return support

    def _read(self, found: Found, encoder: ImageEncoder) -> SupportSet:
        runtime = self.config.runtime
        with self.screen.progress("reading support images") as advance:
            return read_support(found.split, encoder, runtime.batch_size, workers=runtime.num_workers, progress=advance)

    def _unlabelled(self, queries: Queries, model: Model) -> Pool:
        """The pool of `--unlabeled`."""
        images = self.encode(queries, model.images, "reading unlabelled images")
        pool = pool_of(image for batch in images for image in batch)
        if pool is None:
            raise DataError("no image of --unlabeled can be read", hint="give other images, or leave out --unlabeled")
        return pool

    def _tell(self, ready: Ready) -> None:
        """Say on stderr what the support images tell, and with `--verbose` how the classifier was adapted."""
        classifier = ready.classifier
        if ready.unlike:
            self.screen.note(ready.unlike)
        estimate, *suspects = check_sentences(ready.check, classifier.support) or [""]
        if estimate:
            self.screen.note(estimate)
        for text in suspects[:NAMED]:
            self.screen.warn(text)
        if len(suspects) > NAMED:
            self.screen.warn(f"{len(suspects)} support images look mislabelled; --json names all of them")
        sampling, settings = self.sampling, settings_header(classifier.task.settings)
        self.screen.detail(
            f"adapted on {self.device} in {sampling.steps} steps at noise temperature {sampling.temperature:g}; "
            + ", ".join(f"{name} {value:.3g}" for name, value in settings.items())
        )

    def encode(
        self, queries: Queries, encoder: ImageEncoder, label: str, *, bar: bool = True
    ) -> Iterator[list[Encoded]]:
        """Features of images, a batch at a time, with a progress bar where `bar` is set."""
        runtime = self.config.runtime
        with self.screen.progress(label, shown=bar) as advance:
            yield from encode_images(
                queries.paths(), Encoding(encoder, runtime.batch_size), workers=runtime.num_workers, progress=advance
            )


def _check_kind(path: Path, kind: str, option: str) -> None:
    """Raise CheckpointError, which names the option, for a file that is missing or of another kind."""
    if not os.path.lexists(path):
        raise CheckpointError(f"{option} {path} does not exist", hint=f"{suggestion(path)}check the path")
    found = str(read_header(path)["kind"])
    if found != kind:
        instead = {"model": "give it as --checkpoint", "classifier": "give it as --classifier"}
        raise CheckpointError(
            f"{option} {path} is {KINDS[found]}, not {KINDS[kind]}", hint=instead.get(found, f"give {KINDS[kind]}")
        )


def _joined(first: Pool | None, second: Pool | None) -> Pool | None:
    return second if first is None else first.joined(second)


def _dependence(pool: Pool | None, *, transductive: bool) -> str:
    if pool is None:
        return ""
    if transductive:
        return "transductive: each prediction also depends on the other query images"
    return guided_by(len(pool.digests))
