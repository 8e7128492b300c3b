"""Class statistics of a feature bank, kept beside its file.

They take a pass through the whole bank, which is most of what meta-training on a large one starts with.
"""

from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from metadiff_cli.core.checkpoints.file import write_tensors
from metadiff_cli.core.encoders.bank import FeatureBank
from metadiff_cli.core.method.task_space import ClassStatistics, class_statistics

VERSION = 1  # of the computation: part of the name, so that old files are not taken for new ones


def kept_statistics(bank: FeatureBank) -> ClassStatistics:
    """The statistics of a bank, from beside its file when they are there, else computed and kept.

    A bank in memory has no file. Raises DataError as `class_statistics` does.
    """
    path = _place(bank)
    found = None if path is None else _read(path, len(bank.classes), bank.features.shape[1])
    if found is None:
        found = class_statistics(bank.by_class())
        if path is not None:
            with suppress(OSError):  # a full disk or a read-only cache costs time alone
                write_tensors(path, {name: t.contiguous() for name, t in vars(found).items()})
    return found


def _place(bank: FeatureBank) -> Path | None:
    """Beside the file, whose name stands for images, labels and encoder."""
    file = bank.features.filename if isinstance(bank.features, np.memmap) else None
    return None if file is None else Path(file).with_suffix(f".statistics{VERSION}.safetensors")


def _read(path: Path, classes: int, size: int) -> ClassStatistics | None:
    """None when the file is missing, damaged or another's."""
    try:
        found = ClassStatistics(**load_file(path))
    except (OSError, SafetensorError, TypeError):
        return None
    shapes = {"means": (classes, size), "mean": (size,), "within": (size, size), "between": (size, size)}
    fits = all(t.shape == shapes[name] and t.dtype == torch.float64 for name, t in vars(found).items())
    return found if fits else None
