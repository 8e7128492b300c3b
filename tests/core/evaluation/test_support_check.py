"""The leave-one-out check of a support set."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from metadiff_cli.core.evaluation.support_check import SupportCheck, check_support, left_out_cosines
from metadiff_cli.core.method.adapt import TaskClassifier
from metadiff_cli.core.method.guidance import PROTOTYPE
from metadiff_cli.core.method.metric import task_logits
from metadiff_cli.core.method.support import TaskSupport
from metadiff_cli.core.method.task_space import TaskSpace

SIZE = 16


def task(scale: float = 20.0) -> TaskClassifier:
    """At guidance 4, in a task space that is turned, shifted and has unequal precisions."""
    g = torch.Generator().manual_seed(1)
    basis = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=g))[0] * 2
    mean = 0.1 * torch.randn(SIZE, generator=g)
    space = TaskSpace(mean.view(1, 1, -1), basis, torch.linalg.inv(basis).T.contiguous(), torch.linspace(0.2, 3, SIZE))
    return TaskClassifier(space, torch.zeros(1, 1, 3, SIZE), 4.0, scale)


def support_from(counts: dict[str, int], *, noise: float = 0.1, swap: tuple[str, str] | None = None) -> TaskSupport:
    """Classes around random directions. `swap` puts one image of the second class into the first one."""
    g = torch.Generator().manual_seed(0)
    centres = {cls: torch.randn(SIZE, generator=g) for cls in counts}
    features, labels = [], []
    for c, (cls, count) in enumerate(counts.items()):
        for i in range(count):
            shows = swap[1] if swap and cls == swap[0] and i == 0 else cls
            features.append(F.normalize(centres[shows] + noise * torch.randn(SIZE, generator=g), dim=0))
            labels.append(c)
    return TaskSupport.of(torch.stack(features).unsqueeze(0), torch.tensor(labels))


def check_of(counts: dict[str, int], *, swap: tuple[str, str] | None = None) -> SupportCheck | None:
    """The check of such a support, whose images are called a/0, a/1, ..."""
    paths = [f"{cls}/{i}" for cls, count in counts.items() for i in range(count)]
    return check_support(task(), support_from(counts, swap=swap), list(counts), paths)


def slow_cosines(space: TaskSpace, support: TaskSupport, a: float) -> Tensor:
    """The definition, image by image."""
    z, labels = support.z[0], support.labels.tolist()
    rows = {c: [i for i, label in enumerate(labels) if label == c] for c in range(len(support.count))}

    def weight(images: list[int]) -> Tensor:
        v = space.to_task(z[images])
        evidence = len(images) * a * space.precision
        return space.to_feature(evidence / (1 + evidence) * v.mean(dim=0))

    def without(c: int, image: int) -> Tensor:
        return weight([i for i in rows[c] if i != image] or rows[c])

    def logit(image: int, w: Tensor) -> Tensor:
        return task_logits(z[image].view(1, 1, -1), w.view(1, 1, -1), space, a).squeeze()

    table = torch.zeros(len(labels), len(rows))
    for i, label in enumerate(labels):
        for c, images in rows.items():
            left_out = [i] if c == label else images
            table[i, c] = torch.stack([logit(i, without(c, j)) for j in left_out]).mean()
    return table


@pytest.mark.parametrize("a", [0.5, 4.0])
def test_the_closed_form_is_the_definition(a: float) -> None:
    support = support_from({"a": 4, "b": 2, "c": 1, "d": 3}, noise=1.0)
    space = task().space.of_task(0)
    assert torch.allclose(left_out_cosines(space, support, a), slow_cosines(space, support, a), atol=1e-5)


def test_a_large_guidance_is_the_prototype() -> None:
    support = support_from({"a": 4, "b": 3}, noise=1.0)
    space = task().space.of_task(0)
    assert torch.allclose(left_out_cosines(space, support, 1e5), left_out_cosines(space, support, PROTOTYPE), atol=1e-3)


def test_clear_classes_are_told_apart() -> None:
    check = check_of({"a": 3, "b": 5, "c": 1})
    assert check is not None
    assert check.images == 8 and check.accuracy == 100 and check.confused == () and check.suspects == ()


def test_one_image_per_class_says_nothing() -> None:
    assert check_of({"a": 1, "b": 1}) is None


def test_a_mislabelled_image_is_named_with_what_it_looks_like() -> None:
    check = check_of({"a": 5, "b": 5, "c": 5}, swap=("b", "c"))
    assert check is not None
    (suspect,) = check.suspects
    assert (suspect.path, suspect.label, suspect.looks_like) == ("b/0", "b", "c") and suspect.confidence > 0.5
    assert check.accuracy == pytest.approx(100 * (1 + 0.8 + 1) / 3) and check.confused == (("b", "c", 1),)


def test_of_two_images_nobody_is_called_wrong() -> None:
    check = check_of({"a": 2, "b": 4}, swap=("a", "b"))
    assert check is not None and check.accuracy < 100 and check.suspects == ()
