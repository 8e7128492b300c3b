"""The decoded images of a training, by rows, on the device that trains."""

import numpy as np
import torch
from torch import Tensor

from metadiff_cli.core.device import sent
from metadiff_cli.files import release

SHARE = 0.5  # of a GPU's free memory that images may take; the rest is for the training itself
CHUNK = 4096  # images that are copied at a time, as the array may be a large file


class Pixels:
    """Images (n, S, S, 3) uint8. All stay in a GPU's memory where half of what is free suffices for them."""

    def __init__(self, images: np.ndarray, device: torch.device) -> None:
        self.images, self.device = images, device
        self.kept = _keep(images, device) if _fits(images, device) else None

    def take(self, rows: Tensor) -> Tensor:
        """Images (B, S, S, 3) of rows (B,), which are on the CPU."""
        if self.kept is not None:
            return self.kept[sent(rows, self.device)]
        return sent(torch.from_numpy(self.images[rows.numpy()]), self.device)


def _fits(images: np.ndarray, device: torch.device) -> bool:
    if device.type != "cuda":  # the CPU has them already
        return False
    free, _ = torch.cuda.mem_get_info(device)
    return images.nbytes <= SHARE * free


def _keep(images: np.ndarray, device: torch.device) -> Tensor:
    kept = torch.empty(images.shape, dtype=torch.uint8, device=device)
    for start in range(0, len(images), CHUNK):
        part = slice(start, start + CHUNK)
        kept[part] = sent(torch.from_numpy(np.array(images[part])), device)
        release(images)
    return kept
