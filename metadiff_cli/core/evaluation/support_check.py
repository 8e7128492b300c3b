"""Estimate how well a support set tells its own classes apart, by images that are held out of it in turn.

The classifiers are those of held_out.py, which also choose the metric of the task. The estimate is too low for two
images per class, where a classifier without one of them has half of what the real one has.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from metadiff_cli.core.evaluation.mistakes import Mistake
from metadiff_cli.core.method.adapt import TaskClassifier
from metadiff_cli.core.method.held_out import MOST, HeldOut
from metadiff_cli.core.method.support import TaskSupport

FEWEST_TO_SUSPECT = 3  # images per class: of two images that differ, nobody can tell which one is wrong
SUSPECT_ODDS = 20.0  # of another class against the image's own; 1 to 3 % of correctly labelled images exceed it


@dataclass(frozen=True)
class SupportCheck:
    """The estimated accuracy in percent: the mean over classes with two or more images, from `images` held-out images.

    `mistakes` are the images that were taken for another class, in the order of the support, and `suspects` those among
    them that look mislabelled, the clearest case first. `confused` lists pairs of classes with the number of images
    that were taken for the other class, most first. `lacking` is a class of few images, which gains most from one
    more; None where classes have as many, or no image was taken for another class.
    """

    images: int
    accuracy: float
    confused: tuple[tuple[str, str, int], ...]
    suspects: tuple[Mistake, ...]
    mistakes: tuple[Mistake, ...] = ()
    lacking: str | None = None


@torch.inference_mode()
def check_support(
    task: TaskClassifier, support: TaskSupport, classes: Sequence[str], paths: Sequence[str]
) -> SupportCheck | None:
    """Hold each support image out once. `classes` (N,) and `paths` (n,) are the names that the result shows.

    None when every class has one image.
    """
    if len(support.labels) > MOST:
        rows = support.thinned(MOST)
        support, paths = support.take(rows), [paths[row] for row in rows.tolist()]
    held = HeldOut(task.metric, support)
    held_out, labels, counts = held.folds.left_out.cpu(), support.labels.cpu(), support.counts.cpu()
    if not bool(held_out.any()):
        return None
    logits = task.settings.temperature.view(-1, 1, 1) * held.logits(task.settings)
    probabilities = logits[0].softmax(dim=1).cpu()
    predicted = probabilities.argmax(dim=1)
    right = predicted == labels
    per_class = [float(right[labels == c].float().mean()) for c in range(len(counts)) if counts[c] >= 2]
    suspects = _suspects(labels, probabilities, counts[labels] >= FEWEST_TO_SUSPECT)
    mistaken = torch.nonzero(held_out & ~right).flatten().tolist()
    lacking = _lacking(labels, probabilities, counts)

    def mistake(image: int) -> Mistake:
        best = int(predicted[image])
        return Mistake(paths[image], classes[int(labels[image])], classes[best], float(probabilities[image, best]))

    return SupportCheck(
        int(held_out.sum()),
        100 * sum(per_class) / len(per_class),
        _confused(classes, labels[held_out], predicted[held_out]),
        tuple(mistake(image) for image in suspects),
        tuple(mistake(image) for image in mistaken),
        None if lacking is None or not mistaken else classes[lacking],
    )


def _lacking(labels: Tensor, probabilities: Tensor, counts: Tensor) -> int | None:
    """The class of the fewest images, if the largest has twice as many; of several, that of the largest error.

    Of classes with as many images none gains more than another, whatever their errors say (measured at 3 images each).
    Of several classes with one image there is no error to choose by.
    """
    fewest = counts == counts.min()
    several = int(counts.min()) == 1 and int(fewest.sum()) > 1
    if several or 2 * int(counts.min()) > int(counts.max()):
        return None
    error = 1 - probabilities.gather(1, labels.unsqueeze(1)).squeeze(1)
    each = torch.zeros(len(counts)).index_add(0, labels, error) / counts
    return int(torch.where(fewest, each, -1).argmax())


def _confused(classes: Sequence[str], labels: Tensor, predicted: Tensor) -> tuple[tuple[str, str, int], ...]:
    pairs: Counter[tuple[str, str]] = Counter()
    for label, other in zip(labels.tolist(), predicted.tolist(), strict=True):
        if label != other:
            first, second = sorted((label, other))
            pairs[classes[first], classes[second]] += 1
    ordered = sorted(pairs.items(), key=lambda item: (-item[1], item[0]))
    return tuple((first, second, number) for (first, second), number in ordered)


def _suspects(labels: Tensor, probabilities: Tensor, eligible: Tensor) -> list[int]:
    """The images that look like another class, the clearest case first."""
    found = []
    for image in torch.nonzero(eligible).flatten().tolist():
        own, other = float(probabilities[image, labels[image]]), float(probabilities[image].max())
        if other > SUSPECT_ODDS * own:
            found.append((own / other, image))
    return [image for _, image in sorted(found)]
