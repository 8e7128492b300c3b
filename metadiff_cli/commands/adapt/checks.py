"""The options of `metadiff adapt`, and the checks before it reads anything: of them, and of the places it writes to.

An option that has no effect is an error, because whoever gives it expects one. No torch here.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from metadiff_cli.commands.adapt.corrections import Corrections
from metadiff_cli.commands.adapt.inputs import Queries
from metadiff_cli.commands.adapt.output import WRITERS
from metadiff_cli.commands.pages.page import check_page
from metadiff_cli.console import Screen
from metadiff_cli.data.sort import Sorter
from metadiff_cli.errors import ConfigError, DataError, suggest

NAMES = {
    "seed": "--seed", "sampler.steps": "--steps", "sampler.samples": "--samples",
    "sampler.temperature": "--temperature", "sampler.guidance": "--guidance",
}  # fmt: skip


@dataclass(frozen=True)
class Options:
    """What was given on the command line, by the names of the options; None where an option was not given.

    `more` are arguments without an option. `flags` are the options that set a key of the configuration, by that key.
    """

    query: list[str]
    more: list[str]
    null: bool
    support: Path | None
    none: Path | None
    classifier: Path | None
    corrections: Corrections
    checkpoint: Path | None
    encoder: str | None
    encoder_weights: Path | None
    views: int | None
    format: str | None
    as_json: bool
    top_k: int | None
    reject_below: float | None
    reject: str | None
    labelled: bool
    suggest: int | None
    strict: bool
    sort_into: Path | None
    move: bool
    transductive: bool
    unlabeled: Path | None
    save: Path | None
    report: Path | None
    overwrite: bool
    config: Path | None
    set: list[str]
    flags: Mapping[str, object]

    @property
    def output(self) -> str:
        """The format of the output."""
        return "json" if self.as_json else self.format or "table"

    @property
    def encoders(self) -> list[str]:
        """The encoders to choose from; none where a checkpoint or a saved classifier has one."""
        return [name.strip() for name in (self.encoder or "").split(",") if name.strip()]

    @property
    def exported(self) -> bool:
        """Whether the classifier is an exported graph, which its name says."""
        return self.classifier is not None and self.classifier.suffix.lower() == ".onnx"

    @property
    def adapts(self) -> bool:
        """Whether a classifier is adapted, rather than used as it was saved."""
        added = (self.support, self.none, self.unlabeled)
        changed = bool(self.corrections) or any(path is not None for path in added)
        return self.classifier is None or self.transductive or changed


def check_options(given: Options) -> None:
    """Raise ConfigError for options that do not fit together, or that have no effect."""
    if given.support is None and given.classifier is None:
        raise ConfigError("give --support or --classifier", hint="--support DIR has one folder per class")
    if given.reject not in (None, "auto"):
        raise ConfigError(
            f"--reject takes the word auto, not '{given.reject}'",
            hint="give --reject auto, or a confidence: --reject-below 0.5",
        )
    if given.output not in WRITERS:
        hint = f"{suggest(given.output, WRITERS)}choose one of {', '.join(WRITERS)}"
        raise ConfigError(f"unknown --format '{given.output}'", hint=hint)
    if given.null and "-" not in given.query:
        raise ConfigError(
            "-0 is about paths on stdin", hint="add --query -, as in: find . -print0 | metadiff adapt -Q - -0"
        )
    if given.move and given.sort_into is None:
        raise ConfigError("--move needs --sort-into", hint="add --sort-into DIR")
    if given.overwrite and given.save is None:
        raise ConfigError("--overwrite is about the file of --save", hint="leave it out, or add --save FILE")
    if given.as_json and given.format not in (None, "json"):
        raise ConfigError(f"--json contradicts --format {given.format}", hint="give one of them")
    if given.top_k is not None and given.output == "csv":
        raise ConfigError("--top-k has no effect: a CSV shows one class per image", hint="give --format jsonl")
    if given.classifier is not None and given.checkpoint is not None:
        raise ConfigError(
            "--checkpoint has no effect: a saved classifier holds the model that it was adapted from",
            hint="leave out --checkpoint, or --classifier",
        )
    given.corrections.check(given.classifier)
    _check_query(given)
    _check_encoder(given)
    _check_settings(given)


def _check_query(given: Options) -> None:
    """Raise ConfigError without a query, unless the classifier is saved and no option is about predictions."""
    if given.query:
        return
    if given.more:
        raise ConfigError("the images need --query before them", hint=f"give --query {given.more[0]} ...")
    if given.save is None:
        raise ConfigError("give --query, the images to label", hint="add --query DIR, or only --save FILE")
    about = {
        "--format": given.format, "--json": given.as_json, "--top-k": given.top_k, "--reject-below": given.reject_below,
        "--reject": given.reject, "--labelled": given.labelled, "--strict": given.strict,
        "--sort-into": given.sort_into, "--transductive": given.transductive, "--report": given.report,
    }  # fmt: skip
    for option, value in about.items():
        if value not in (None, False):
            raise ConfigError(
                f"{option} has no effect: there are no query images", hint=f"add --query, or leave out {option}"
            )


def _check_encoder(given: Options) -> None:
    """Raise ConfigError for options about the encoder that have no effect, or not together."""
    if given.encoder is not None:
        other = "--classifier" if given.classifier else "--checkpoint" if given.checkpoint else ""
        if other:
            raise ConfigError(
                f"--encoder has no effect: {other} has an encoder", hint=f"leave out --encoder or {other}"
            )
        if not given.encoders:
            raise ConfigError("--encoder names no encoder", hint="give lite0, say")
    if given.encoder_weights is not None and len(given.encoders) != 1:
        raise ConfigError("--encoder-weights needs one --encoder", hint="add --encoder timm:MODEL, say")
    if given.views is not None and given.classifier is not None:
        raise ConfigError(
            "--views has no effect: a saved classifier keeps the views that it was made with", hint="leave out --views"
        )
    if given.views not in (None, 1, 2, 5, 6):
        raise ConfigError(f"--views takes 1, 2, 5 or 6, not {given.views}", hint="--views 2 adds the mirror image")


def _check_settings(given: Options) -> None:
    """Raise ConfigError for a setting of the command line that has no effect."""
    for name in adapting_settings(given) if not given.adapts else ():
        raise ConfigError(
            f"{name} has no effect: the classifier of --classifier is used as it was saved",
            hint="leave it out, or adapt again with --support",
        )


def adapting_settings(given: Options) -> list[str]:
    """The settings of the command line that only an adaptation uses, as they were given."""
    flags = [NAMES[key] for key, value in given.flags.items() if value is not None and key in NAMES]
    keys = [text.partition("=")[0].strip() for text in given.set]
    return [*flags, *(f"--set {key}" for key in keys if key.partition(".")[0] in ("seed", "sampler"))]


def check_outputs(given: Options) -> None:
    """Raise ConfigError for a file or folder that cannot be written, or that must not be replaced."""
    if given.report is not None:
        check_page(given.report)
        if given.save is not None and given.save.resolve() == given.report.resolve():
            raise ConfigError(f"--save and --report are the same file, {given.save}", hint="give two names")
    if given.sort_into is not None:
        _check_sorting(given.sort_into, {"support": given.support, "--none": given.none})


def _check_sorting(root: Path, labelled: Mapping[str, Path | None]) -> None:
    _check_folder(root, root)
    for name, folder in labelled.items():
        if folder is not None and folder.resolve() in (root.resolve(), *root.resolve().parents):
            raise ConfigError(
                f"--sort-into {root} is inside the {name} folder",
                hint="give another folder: predictions would become labels of the next run",
            )


def check_folders(sorter: Sorter) -> None:
    """Raise ConfigError for the folder of a class that cannot be written to."""
    for folder in sorter.folders.values():
        _check_folder(sorter.root / folder, sorter.root)


def _check_folder(folder: Path, root: Path) -> None:
    """Raise ConfigError when no image can be written to a folder, which may not exist yet."""
    place = next(place for place in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(place))
    if not os.path.isdir(place) or not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(
            f"--sort-into {root}: {place} is not a folder that you may write to", hint="give another folder"
        )


def check_labels(given: Options, queries: Queries, classes: Sequence[str], screen: Screen) -> None:
    """Raise DataError where `--labelled` finds no label, and warn of names that differ by case only."""
    labels = {query.label for query in queries.items if query.label} if given.labelled else set()
    for _, group in groupby(sorted({*classes, *labels}, key=str.casefold), key=str.casefold):
        first, *others = sorted(group)
        for other in others:
            screen.warn(f"'{first}' and '{other}' are different classes: their names differ by case only")
    if given.labelled and not labels:
        raise _no_labels(given, classes)


def _no_labels(given: Options, classes: Sequence[str]) -> DataError:
    for folder in map(Path, given.query):
        if folder.resolve().name in classes:
            return DataError(
                f"--labelled: {folder} is the folder of one class, and its images have no label",
                hint=f"give the folder above it: --query {folder.parent}",
            )
    return DataError("--labelled: no query image has a label", hint="give a folder of class folders: DIR/cat/1.jpg")
