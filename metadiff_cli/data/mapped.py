"""Memory-mapped arrays: what was read of them counts as this process's memory until it is given back."""

import mmap

import numpy as np


def release(array: np.ndarray) -> None:
    """Give back the memory of the file behind a memory-mapped array; what is read again is fetched again.

    Nothing is lost: what was written stays with the file. Without effect on other arrays and where there is no madvise.
    """
    base: object = array
    while isinstance(base, np.ndarray | memoryview):
        base = base.base if isinstance(base, np.ndarray) else base.obj
    if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        base.madvise(mmap.MADV_DONTNEED)
