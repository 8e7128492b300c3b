"""The check of a support set by images that are held out of it."""

import pytest
import torch
import torch.nn.functional as F

from metadiff_cli.core.evaluation.support_check import SUSPECT_ODDS, SupportCheck, check_support
from metadiff_cli.core.method.adapt import TaskClassifier
from metadiff_cli.core.method.held_out import HeldOut
from metadiff_cli.core.method.metric import Metric
from metadiff_cli.core.method.support import TaskSupport
from tests.tasks import METRICS, ONE, adapted, metric_of, support_of, tuned

SIZE = sum(ONE)


@pytest.fixture(params=["one group", "without base classes"])
def metric(request: pytest.FixtureRequest) -> Metric:
    return METRICS[request.param]()


def support_from(
    metric: Metric, counts: dict[str, int], noise: float = 0.1, swap: tuple[str, str] | None = None
) -> TaskSupport:
    """Classes around random directions. `swap` puts one image of the second class into the first one."""
    g = torch.Generator().manual_seed(0)
    centres = {cls: torch.randn(SIZE, generator=g) for cls in counts}
    features, labels = [], []
    for c, (cls, count) in enumerate(counts.items()):
        for i in range(count):
            shows = swap[1] if swap and cls == swap[0] and i == 0 else cls
            features.append(F.normalize(centres[shows] + noise * torch.randn(SIZE, generator=g), dim=0))
            labels.append(c)
    return TaskSupport(metric.expand(torch.stack(features).unsqueeze(0)), torch.tensor(labels))


def classifier_of(support: TaskSupport, metric: Metric) -> TaskClassifier:
    return adapted(tuned(metric, scale=5.0, prior=0.3), support)


def check_of(
    metric: Metric, counts: dict[str, int], noise: float = 0.1, swap: tuple[str, str] | None = None
) -> SupportCheck | None:
    """The check of such a support, whose images are called a/0, a/1, ..."""
    support = support_from(metric, counts, noise, swap)
    paths = [f"{cls}/{i}" for cls, count in counts.items() for i in range(count)]
    return check_support(classifier_of(support, metric), support, list(counts), paths)


def test_it_counts_what_held_out_images_are_taken_for(metric: Metric) -> None:
    """With noise that mixes the classes up; the accuracy is the mean over the classes that have two images or more."""
    support = support_from(metric, {"a": 4, "b": 2, "c": 1, "d": 9}, noise=1.5)
    task = classifier_of(support, metric)
    check = check_support(task, support, ["a", "b", "c", "d"], [f"{i}" for i in range(16)])
    predicted = HeldOut(metric, support).logits(task.settings)[0].argmax(dim=1).tolist()
    labels = support.labels.tolist()
    pairs: dict[tuple[str, str], int] = {}
    accuracy = {0: 0.0, 1: 0.0, 3: 0.0}
    for label, found in zip(labels, predicted, strict=True):
        if label != 2:
            accuracy[label] += (label == found) / labels.count(label)
            if label != found:
                pair = ("abcd"[min(label, found)], "abcd"[max(label, found)])
                pairs[pair] = pairs.get(pair, 0) + 1
    assert check is not None and check.images == 15
    assert check.accuracy == pytest.approx(100 * sum(accuracy.values()) / 3, abs=1e-3) and 0 < check.accuracy < 100
    assert {(first, second): number for first, second, number in check.confused} == pairs
    numbers = [number for *_, number in check.confused]
    assert numbers == sorted(numbers, reverse=True)
    found = [(m.path, m.label, m.looks_like) for m in check.mistakes]
    assert found == [
        (str(i), "abcd"[label], "abcd"[predicted[i]])
        for i, label in enumerate(labels)
        if label != 2 and predicted[i] != label
    ]


@pytest.mark.parametrize(
    ("counts", "lacking"),
    [((4, 4, 1, 4), "c"), ((9, 3, 9, 9), "b"), ((4, 9, 9, 5), "a"), ((4, 5, 5, 7), None), ((1, 1, 4, 4), None)],
)
def test_a_class_of_few_images_lacks_one(metric: Metric, counts: tuple[int, ...], lacking: str | None) -> None:
    check = check_of(metric, dict(zip("abcd", counts, strict=True)), noise=3.0)
    assert check is not None and check.mistakes and check.lacking == lacking
    clear = check_of(metric, dict(zip("abcd", counts, strict=True)))
    assert clear is not None and not clear.mistakes and clear.lacking is None


def test_of_several_classes_of_few_images_the_one_with_a_wrong_image_lacks_one(metric: Metric) -> None:
    check = check_of(metric, {"a": 3, "b": 3, "c": 9}, swap=("b", "c"))
    assert check is not None and check.lacking == "b"


def test_clear_classes_are_told_apart(metric: Metric) -> None:
    check = check_of(metric, {"a": 3, "b": 5, "c": 1})
    assert check is not None
    assert check.images == 8 and check.accuracy == 100 and check.confused == () and check.suspects == ()
    assert check.mistakes == () and check.lacking is None


def test_one_image_per_class_says_nothing(metric: Metric) -> None:
    assert check_of(metric, {"a": 1, "b": 1}) is None


def test_a_mislabelled_image_is_named_with_what_it_looks_like(metric: Metric) -> None:
    check = check_of(metric, {"a": 5, "b": 5, "c": 5}, swap=("b", "c"))
    assert check is not None
    (suspect,) = check.suspects
    assert (suspect.path, suspect.label, suspect.looks_like) == ("b/0", "b", "c") and suspect.confidence > 0.5
    assert check.accuracy == pytest.approx(100 * (1 + 0.8 + 1) / 3) and check.confused == (("b", "c", 1),)


def test_of_two_images_nobody_is_called_wrong(metric: Metric) -> None:
    check = check_of(metric, {"a": 2, "b": 4}, swap=("a", "b"))
    assert check is not None and check.accuracy < 100 and check.suspects == ()


def test_suspects_are_those_of_clear_odds_the_clearest_first() -> None:
    """With two images of other classes among many that are confused."""
    metric = metric_of()
    support = support_of(metric, (12, 12, 12), seed=4)
    first, second = (torch.nonzero(support.labels == c).flatten()[0] for c in (0, 1))
    labels = support.labels.clone()
    labels[first], labels[second] = 1, 2
    wrong = TaskSupport(support.x, labels)
    task = classifier_of(wrong, metric)
    check = check_support(task, wrong, ["a", "b", "c"], [str(i) for i in range(36)])
    logits = float(task.settings.temperature) * HeldOut(metric, wrong).logits(task.settings)[0]
    probabilities = logits.softmax(dim=1)
    odds = probabilities.amax(dim=1) / probabilities[torch.arange(36), labels]
    wanted = [str(i) for i in odds.argsort(descending=True).tolist() if odds[i] > SUSPECT_ODDS]
    assert check is not None and wanted and [s.path for s in check.suspects] == wanted
    confidences = [float(probabilities[int(path)].max()) for path in wanted]
    assert [s.confidence for s in check.suspects] == pytest.approx(confidences, abs=1e-4)
