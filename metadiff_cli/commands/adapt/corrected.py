"""The support of a saved classifier after `--forget`, `--relabel` and `--rename`, which are made in this order."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from metadiff_cli.classify.edit import find_image, forget, relabel, rename
from metadiff_cli.classify.support_set import SupportSet
from metadiff_cli.commands.adapt.corrections import Corrections
from metadiff_cli.console import Screen, counted
from metadiff_cli.data.listing import read_listing
from metadiff_cli.data.scan import class_name
from metadiff_cli.errors import DataError, suggest

SHOWN = 5  # images that a message names


def corrected(support: SupportSet, corrections: Corrections, size: int, screen: Screen) -> SupportSet:
    """The corrected support of a classifier that sees images of `size` pixels. What was done is told.

    Raises DataError for an image or a class that the support does not have.
    """
    before = support
    if corrections.forget:
        support = forget(support, _forgotten(support, corrections.forget, size, screen))
    if corrections.relabel is not None:
        support = relabel(support, _labels(corrections.relabel, support, size, screen))
    for cls in sorted(set(before.classes) - set(support.classes)):
        screen.note(f"class '{cls}' has no image left, and is gone")
    if corrections.rename:
        names = corrections.names()
        support = rename(support, names)
        screen.note(f"renamed: {_listed([f'{old} to {new}' for old, new in names.items()])}")
    return replace(support, paths=support.names())  # as the corrected classifier keeps them


def _forgotten(support: SupportSet, texts: Sequence[str], size: int, screen: Screen) -> set[bytes]:
    """The digests of the images of --forget."""
    digests: set[bytes] = set()
    name_of = support.path_of()
    for text in texts:
        digest = find_image(support, text, size)
        if digest is not None:
            digests.add(digest)
        elif not os.path.isfile(text) and class_name(text) in support.classes:
            digests.update(image.digest for label, image in support.labelled() if label == class_name(text))
        else:
            known = (*support.names(), *support.classes)
            raise _unknown(
                f"--forget {text}",
                support,
                f"{suggest(text, known)}`metadiff inspect FILE` lists all; a file is known by its pixels",
            )
    screen.note(f"forgotten: {_listed(sorted(name_of[digest] for digest in digests))}")
    return digests


def _labels(file: Path, support: SupportSet, size: int, screen: Screen) -> dict[bytes, str]:
    """The new labels of the images that the CSV file lists, by digest."""
    labels: dict[bytes, str] = {}
    name_of = support.path_of()
    for row in read_listing(file):
        where = f"--relabel {file}, line {row.line}"
        if row.label is None:
            raise DataError(f"{where}: no label", hint="fill the column 'label' of every line")
        name = row.path.removeprefix(os.path.join(os.path.dirname(file), ""))  # a name is relative to no folder
        digest = find_image(support, row.path if os.path.isfile(row.path) else name, size)
        if digest is None:
            raise _unknown(f"{where}: {name}", support, "give a new image in its class folder, with --support")
        if labels.setdefault(digest, row.label) != row.label:
            raise DataError(f"{where}: {name} has two labels, '{labels[digest]}' and '{row.label}'", hint="keep one")
    screen.note(f"relabelled: {_listed([f'{name_of[digest]} to {label}' for digest, label in labels.items()])}")
    return labels


def _unknown(what: str, support: SupportSet, hint: str) -> DataError:
    """The error for an image that is not there, which names those that are."""
    held = f"{counted(len(support.paths), 'image')}: {_listed(sorted(support.names()))}"
    return DataError(f"{what} is not in the support of the classifier, which has {held}", hint=hint)


def _listed(texts: Sequence[str]) -> str:
    """The first of some texts, and how many more there are."""
    more = f" and {len(texts) - SHOWN} more" if len(texts) > SHOWN else ""
    return f"{', '.join(texts[:SHOWN])}{more}"
