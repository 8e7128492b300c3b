"""Which unlabelled images are worth labelling next: uncertain, typical, and different from one another.

Images are covered as well as the labelled image most similar to them. Labelling an image raises the coverage of all
images like it; that of an uncertain one counts more. The next suggestion is the image that raises the sum most (greedy
weighted facility location). An image beside a chosen one has little to raise, and an outlier covers itself alone.
"""

import math

import torch
from torch import Tensor

LEAST = 1e-5  # of an entropy times a cosine: an image that raises the sum by less is a copy of one that is labelled


def entropy_of(probabilities: Tensor) -> Tensor:
    """Return the entropy (...) of probabilities (..., N) as a share of the largest one, 0 to 1."""
    entropy: Tensor = torch.special.entr(probabilities).sum(dim=-1)
    return (entropy / math.log(probabilities.shape[-1])).clamp(0, 1)


@torch.inference_mode()
def suggested(phi: Tensor, weights: Tensor, support: Tensor, count: int) -> list[int]:
    """Return the positions of at most `count` images, the most useful one first.

    `phi` (M, J) are joint features of the images and `support` (n, J) of the labelled ones, whose inner products are
    similarities up to 1; `weights` (M,) say how uncertain each image is. Copies of a labelled or chosen image are left
    out. It takes O(M^2) memory.
    """
    similar = phi @ phi.mT  # (M, M)
    covered = (phi @ support.mT).amax(dim=1)  # (M,)
    chosen: list[int] = []
    while len(chosen) < min(count, len(phi)):
        gain = ((similar - covered).clamp_min(0) * weights).sum(dim=1)
        gain[chosen] = 0
        best = int(gain.argmax())
        if float(gain[best]) < LEAST:
            break
        chosen.append(best)
        covered = torch.maximum(covered, similar[best])
    return chosen
