"""Images and labels as Python code gives them, checked before anything is read."""

import math
import os
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from metadiff_cli.classify.images import ImageLike
from metadiff_cli.data.scan import class_name
from metadiff_cli.errors import DataError

Images: TypeAlias = np.ndarray | Sequence[ImageLike]
Labels: TypeAlias = np.ndarray | Sequence[Any]


def images_of(X: Images) -> list[ImageLike]:
    """The single images of a sequence, of an array (n, H, W, 3), or of a table of one column.

    Raises DataError for one image where a sequence is meant, and for what is not an image.
    """
    if isinstance(X, str | bytes | os.PathLike | Image.Image) or not hasattr(X, "__len__"):
        raise DataError(f"a single {type(X).__name__} instead of a sequence", hint="put it into a list: [image]")
    if isinstance(X, Mapping | set | frozenset):
        raise DataError(f"the images are a {type(X).__name__}, which has no order", hint="give a list")
    given = np.asarray(X) if hasattr(X, "__array__") else X  # such as a table or a tensor
    if isinstance(given, np.ndarray):
        if given.ndim == 2 and given.shape[1] == 1:
            given = given[:, 0]
        if given.ndim not in (1, 4):
            raise DataError(
                f"the images are an array of shape {given.shape}", hint="give uint8 of shape (n, height, width, 3)"
            )
    images = list(given)
    for i, image in enumerate(images):
        _check_image(image, i)
    return images


def _check_image(image: Any, number: int) -> None:
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise DataError(
                f"image {number} is an array {image.dtype} of shape {image.shape}",
                hint="give uint8 of shape (height, width, 3)",
            )
    elif not isinstance(image, str | os.PathLike | Image.Image):
        raise DataError(
            f"image {number} is of type {type(image).__name__}", hint="give a path, a Pillow image or an array"
        )


def labels_of(y: Labels) -> np.ndarray:
    """The labels (n,) as an array of text (in the spelling that class folders have), numbers or truth values.

    A column (n, 1) is taken as (n,). Raises DataError for labels that are missing, of another type, or of several
    types.
    """
    given = np.asarray(y) if hasattr(y, "__array__") else np.asarray(y, dtype=object)
    if given.ndim == 2 and given.shape[1] == 1:
        given = given[:, 0]
    if given.ndim != 1:
        raise DataError(f"labels of shape {given.shape}", hint="give one label per image, shape (n,)")
    kinds = {_kind(label, i) for i, label in enumerate(given)}
    if len(kinds) > 1:
        raise DataError(
            f"the labels are of several types: {' and '.join(sorted(kinds))}", hint="give labels of one type"
        )
    if kinds == {"text"}:
        return np.array([class_name(label) for label in given], dtype=np.str_)
    if given.dtype.kind != "O":
        return given
    return np.array(given.tolist())


def _kind(label: Any, number: int) -> str:
    """What kind of label it is. Raises DataError for none of them."""
    if isinstance(label, str) and label:
        return "text"
    if isinstance(label, bool | np.bool_):
        return "truth values"
    if isinstance(label, Integral) or (isinstance(label, Real) and float(label).is_integer()):
        return "whole numbers"
    if label is None or isinstance(label, str) or (isinstance(label, Real) and math.isnan(label)):
        raise DataError(f"label {number} is missing ({label!r})", hint="give one label per image")
    raise DataError(
        f"label {number} is {label!r}, of type {type(label).__name__}", hint="give text, whole numbers or booleans"
    )


def name_of(label: Any) -> str:
    """The class name of a label, as its folder would be called."""
    return str(int(label)) if isinstance(label, np.floating | float) else str(label)
