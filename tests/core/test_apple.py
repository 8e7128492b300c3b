"""Adaptation, evaluation and the controls on a GPU without float64, by the stand-in of tests/apple.py."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

from metadiff_cli.core.evaluation.controls import (
    CONTROLS,
    ControlSettings,
    control_method,
    label_propagation_method,
    soft_kmeans_method,
)
from metadiff_cli.core.evaluation.evaluate import Method, Protocol, evaluate, method_of, run_through
from metadiff_cli.core.evaluation.support_check import check_support
from metadiff_cli.core.method.adapt import MetaDiff, Sampling
from metadiff_cli.core.method.calibration import Rejection, TaskTable
from metadiff_cli.core.method.metric import Metric
from metadiff_cli.core.method.rejection import rejector_of
from metadiff_cli.core.method.support import TaskSupport
from metadiff_cli.core.training.fit import fit_rejection
from metadiff_cli.core.training.validation import ValidationTasks
from tests.apple import MPS, AppleGpu
from tests.tasks import METRICS, adapted, bank_of, features, support_of, tuned
from tests.worlds import CPU


@pytest.fixture(autouse=True)
def gpu() -> Iterator[None]:
    for make in METRICS.values():
        make()  # statistics are made on the CPU, and kept
    with AppleGpu():
        yield


def there(metric: Metric) -> Metric:
    """The same metric on the GPU."""
    return metric if metric.space is None else replace(metric, space=metric.space.to(MPS))


def model(metric: Metric, device: torch.device) -> MetaDiff:
    targets = None if metric.space is None else features(9, 2, 5, metric.groups).mean(dim=1).to(device)
    found = tuned(there(metric) if device == MPS else metric)
    return replace(found, targets=targets).tuned(rejection=Rejection(TaskTable.constant(0.0), 0.05))


@pytest.mark.parametrize(("act", "error"), [
    (lambda: torch.ones(2, dtype=torch.float64).to(MPS), TypeError),
    (lambda: torch.ones(2, device=MPS).double(), TypeError),
    (lambda: torch.zeros(2, dtype=torch.float64, device="mps"), TypeError),
    (lambda: torch.ones(2, device=MPS).to("cpu", torch.float64).to(MPS), TypeError),
    (lambda: torch.ones(2, device=MPS) + torch.ones(2), RuntimeError),
    (lambda: torch.ones(2, device=MPS).new_zeros(2) @ torch.ones(2), RuntimeError),
    (lambda: torch.zeros(()).expand_as(torch.ones(2, device=MPS)) + torch.ones(2, device=MPS), RuntimeError),
    (lambda: torch.ones(2, device=MPS).numpy(), TypeError),
])  # fmt: skip
def test_the_stand_in_notices(act: Callable[[], object], error: type[Exception]) -> None:
    x = torch.tensor([1.0, 2.0], device=MPS)
    assert (x + 1).device == MPS and x.cpu().device == CPU and float((2 * x).sum()) == 6 and x[x > 1].tolist() == [2]
    assert x.cpu().double().dtype == torch.float64 and x.to(torch.float16).device == MPS
    with pytest.raises(error):
        act()


@pytest.mark.parametrize("counts", [(3, 1, 2), (1, 1), (30, 20)])
@pytest.mark.parametrize("name", METRICS)
def test_adaptation_and_rejection(name: str, counts: tuple[int, ...]) -> None:
    """The same numbers as on the CPU, from draws with a pool as well."""
    metric = METRICS[name]()
    here = support_of(metric, counts)
    pool = metric.expand(features(1, 7, 3, metric.groups))
    for sampling in (Sampling(), Sampling(3, 2, 1.0), Sampling(3, 1, 1.0, 2.0, "ddpm")):
        found = []
        for device in (CPU, MPS):
            support = TaskSupport(here.x.to(device), here.labels.to(device))
            classifier = adapted(model(metric, device), support, sampling, pool=pool.to(device))
            margins = rejector_of(model(metric, device), classifier, support).margins(support.x)
            check = check_support(classifier, support, list("abc"[: len(counts)]), list(map(str, range(sum(counts)))))
            assert classifier.weights.device == margins.device == device
            found.append((classifier.weights.cpu(), classifier.probabilities(support.x).cpu(), margins.cpu(), check))
        for a, b in zip(found[0][:3], found[1][:3], strict=True):
            torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)
        assert (found[0][3] is None) == (found[1][3] is None)


@pytest.mark.parametrize("name", METRICS)
def test_evaluation_with_every_method(name: str) -> None:
    metric = METRICS[name]()
    bank, protocol = bank_of(features(8, 8, 0, metric.groups)), Protocol(3, 2, 2, 5)
    fitted = {control: [ControlSettings(3, 2, "task", 0.2)] for control in CONTROLS}

    def methods(device: torch.device) -> dict[str, Method]:
        place = there(metric) if device == MPS else metric
        found = {"metadiff": method_of(model(metric, device), bank, Sampling(3), protocol, device)}
        found |= {control: control_method(control, place, fitted) for control in CONTROLS}
        found["soft-kmeans"] = soft_kmeans_method(place, fitted)
        found["label-propagation"] = label_propagation_method(place, fitted)
        return found

    on_cpu = run_through(evaluate(bank, methods(CPU), protocol, CPU))
    on_gpu = run_through(evaluate(bank, methods(MPS), protocol, MPS))
    for method, scores in on_gpu.items():
        confidence = torch.cat(scores.confidence)
        assert confidence.device == CPU and torch.cat(scores.accuracy).dtype == torch.float64
        torch.testing.assert_close(confidence, torch.cat(on_cpu[method].confidence), atol=1e-3, rtol=0)


def test_a_threshold_is_fitted_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metadiff_cli.core.training.validation.WAYS", (3,))
    monkeypatch.setattr("metadiff_cli.core.training.validation.SHOTS", (1, 2))
    metadiff = model(METRICS["two groups"](), MPS)
    pairs = ValidationTasks(metadiff.metric, [bank_of(features(6, 5, 0, metadiff.metric.groups))], MPS, 0)
    assert fit_rejection(metadiff, pairs).offsets.shots == (1, 2)
