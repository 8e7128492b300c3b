"""Corrections of a support: images are forgotten or get another label, classes get another name.

Each function returns the support that the images would have made if they had been given that way from the start.
"""

import os
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path

from metadiff_cli.classify.images import digest_of
from metadiff_cli.classify.support_set import SupportSet, support_of
from metadiff_cli.data.images import load_square
from metadiff_cli.data.scan import class_name
from metadiff_cli.errors import DataError, suggest


def find_image(support: SupportSet, text: str, size: int) -> bytes | None:
    """The digest of a support image: a file, known by its pixels (size, size, 3), or else a name of `support.names()`.

    None for an image that is not in the support. Raises DataError for a file that cannot be read, and for a name that
    several images have.
    """
    if os.path.isfile(text):
        digest = digest_of(load_square(Path(text), size))
        return digest if digest in support.digests else None
    called = class_name(text)
    found = [digest for digest, name in zip(support.digests, support.names(), strict=True) if name == called]
    if len(found) > 1:
        raise DataError(f"{len(found)} images of the support are called {text}", hint="give the file of the image")
    return found[0] if found else None


def forget(support: SupportSet, digests: Collection[bytes]) -> SupportSet:
    """The support without these images. A class without images is gone. Raises DataError when no image is left."""
    kept = [(label, image) for label, image in support.labelled() if image.digest not in digests]
    if not kept:
        raise DataError("no image of the support is left", hint="keep one, or start anew with other images")
    return support_of(kept)


def relabel(support: SupportSet, labels: Mapping[bytes, str]) -> SupportSet:
    """The support with other labels, by digest, also of classes that are new. A class without images is gone."""
    return support_of((labels.get(image.digest, label), image) for label, image in support.labelled())


def rename(support: SupportSet, names: Mapping[str, str]) -> SupportSet:
    """The support with other names of classes, old to new, all at once, so that two classes may swap their names.

    Raises DataError for a class that is not there, and when two classes would have one name.
    """
    for old in names:
        if old not in support.classes:
            hint = f"{suggest(old, support.classes)}the classes are {', '.join(support.classes)}"
            raise DataError(f"there is no class '{old}'", hint=hint)
    for new, classes in Counter(names.get(cls, cls) for cls in support.classes).items():
        if classes > 1:
            raise DataError(
                f"{classes} classes would be called '{new}'",
                hint="to merge classes, list the images of one in --relabel",
            )
    return support_of((names.get(label, label), image) for label, image in support.labelled())
