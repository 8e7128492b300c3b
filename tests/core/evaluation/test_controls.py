"""The controls against scikit-learn and against their definitions, and how they are fitted."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression, Ridge
from torch import Tensor

from metadiff_cli.core.evaluation.controls import (
    CONTROLS,
    ControlSettings,
    control_method,
    fit_control,
    label_propagation,
    label_propagation_method,
    lda,
    logistic_regression,
    logreg,
    nearest,
    nearest_settings,
    placed,
    prototype,
    read_fitted,
    ridge,
    ridge_regression,
    soft_kmeans,
    soft_kmeans_method,
)
from metadiff_cli.core.evaluation.episodes import Episodes
from metadiff_cli.core.method.calibration import best_temperature
from metadiff_cli.core.method.metric import Metric
from tests.tasks import METRICS, ONE, TWO, features, metric_of

EMPTY = Episodes(*(np.empty(0) for _ in range(4)))
USUAL = ControlSettings(5, 3)


def tasks_of(tasks: int, ways: int, shots: int, groups: tuple[int, ...]) -> Tensor:
    """Support (B, N, K, D) of a world where every number has a mean, as features after a ReLU have."""
    z = torch.stack([features(ways, shots, 100 * ways + shots + b, groups) for b in range(tasks)])
    return z + 0.1


SHAPES = [(3, 5, 1, 64), (2, 5, 5, 200), (2, 20, 2, 30), (2, 3, 30, 12)]  # the last has more images than features


@pytest.mark.parametrize("penalty", [1.0, 0.05])
@pytest.mark.parametrize("shape", SHAPES)
def test_logistic_regression_is_that_of_scikit_learn(shape: tuple[int, ...], penalty: float) -> None:
    z = tasks_of(*shape[:3], shape[3:])
    weights, intercepts = logistic_regression(z, penalty)
    labels = np.repeat(np.arange(shape[1]), shape[2])
    for task in range(len(z)):
        oracle = LogisticRegression(C=1 / penalty, tol=1e-9, max_iter=5000)
        oracle.fit(z[task].flatten(0, 1).double().numpy(), labels)
        assert np.allclose(weights[task].numpy(), oracle.coef_, atol=1e-4)
        shift = oracle.intercept_.mean() - float(intercepts[task].mean())  # a common constant changes no prediction
        assert np.allclose(intercepts[task].numpy() + shift, oracle.intercept_, atol=1e-4)
        queries = tasks_of(1, 1, 50, shape[3:])[0, 0]
        ours = queries @ weights[task].T + intercepts[task]
        assert np.array_equal(ours.argmax(dim=1).numpy(), oracle.predict(queries.double().numpy()))
        assert np.allclose(ours.softmax(dim=1).numpy(), oracle.predict_proba(queries.double().numpy()), atol=1e-5)


@pytest.mark.parametrize("penalty", [1.0, 0.05])
@pytest.mark.parametrize("shape", SHAPES)
def test_ridge_is_that_of_scikit_learn(shape: tuple[int, ...], penalty: float) -> None:
    z = tasks_of(*shape[:3], shape[3:])
    weights, intercepts = ridge_regression(z, penalty)
    one_hot = np.eye(shape[1])[np.repeat(np.arange(shape[1]), shape[2])]
    for task in range(len(z)):
        oracle = Ridge(alpha=penalty).fit(z[task].flatten(0, 1).double().numpy(), one_hot)
        assert np.allclose(weights[task].numpy(), oracle.coef_, atol=1e-5)
        assert np.allclose(intercepts[task].numpy(), oracle.intercept_, atol=1e-5)


def grouped(metric: Metric, z: Tensor, centre: Tensor, level: float) -> Tensor:
    """Features as the settings have them: relative to a centre, each group at the length of the root of its share."""
    moved, shares = z - centre, [1.0] if len(metric.groups) == 1 else [1 - level, level]
    parts = moved.split(list(metric.groups), dim=-1)
    return torch.cat([s**0.5 * F.normalize(p, dim=-1) for s, p in zip(shares, parts, strict=True)], dim=-1)


@pytest.mark.parametrize("centre", ["origin", "base", "task"])
@pytest.mark.parametrize("name", METRICS)
def test_features_are_centred_and_their_groups_weighed(name: str, centre: Any) -> None:
    metric = METRICS[name]()
    z, query = tasks_of(2, 4, 3, metric.groups), tasks_of(2, 1, 6, metric.groups)[:, 0]
    found = placed(metric, z, query, replace(USUAL, centre=centre, level=0.3))
    for b in range(2):
        origin = torch.zeros(24)
        if centre == "task":
            origin = z[b].mean(dim=(0, 1))
        elif centre == "base" and metric.space is not None:
            origin = metric.space.mean
        torch.testing.assert_close(found[0][b], grouped(metric, z[b], origin, 0.3))
        torch.testing.assert_close(found[1][b], grouped(metric, query[b], origin, 0.3))


@pytest.mark.parametrize("scores", [logreg, ridge])
def test_the_linear_controls_see_the_groups_as_the_settings_have_them(scores: Callable[..., Tensor]) -> None:
    metric, settings = metric_of(TWO), replace(USUAL, penalty=0.1, level=0.3)
    z, query = tasks_of(1, 4, 3, TWO), tasks_of(1, 1, 6, TWO)[:, 0]
    x, q = (grouped(metric, part, torch.zeros(24), 0.3)[0].double().numpy() for part in (z, query))
    x, labels = x.reshape(12, 24), np.repeat(np.arange(4), 3)
    found = scores(metric, z, query, settings)[0]
    if scores is ridge:
        wanted = Ridge(alpha=0.1).fit(x, np.eye(4)[labels]).predict(q)
        assert np.allclose(found.numpy(), wanted, atol=1e-4)
    else:
        wanted = LogisticRegression(C=10.0, tol=1e-9, max_iter=5000).fit(x, labels).predict_proba(q)
        assert np.allclose(found.softmax(dim=1).numpy(), wanted, atol=1e-4)


@pytest.mark.parametrize("centre", ["origin", "base", "task"])
def test_the_class_mean_and_the_nearest_image_by_loops(centre: Any) -> None:
    metric, settings = metric_of(TWO), replace(USUAL, centre=centre, level=0.2)
    z, query = tasks_of(2, 4, 3, TWO), tasks_of(2, 1, 6, TWO)[:, 0]
    means, images = prototype(metric, z, query, settings), nearest(metric, z, query, settings)
    x, q = placed(metric, z, query, settings)
    for b in range(2):
        for m in range(6):
            for c in range(4):
                cosine = F.cosine_similarity(q[b, m], x[b, c].mean(dim=0), dim=0)
                assert float(means[b, m, c]) == pytest.approx(float(cosine), abs=1e-5)
                closest = max(float(F.cosine_similarity(q[b, m], image, dim=0)) for image in x[b, c])
                assert float(images[b, m, c]) == pytest.approx(closest, abs=1e-5)


@pytest.mark.parametrize("name", METRICS)
def test_lda_is_its_formula(name: str) -> None:
    """With the covariance of the base classes times its weight, plus the scatter of the support, inverted in full."""
    metric, settings = METRICS[name](), replace(USUAL, penalty=0.7, level=0.3)
    z, query = tasks_of(2, 4, 3, metric.groups), tasks_of(2, 1, 6, metric.groups)[:, 0]
    found = lda(metric, z, query, settings)
    shares = torch.tensor([1.0] if len(metric.groups) == 1 else [0.7, 0.3])
    roots = shares.sqrt().repeat_interleave(torch.tensor(metric.groups)).double()
    white = (lambda x: x) if metric.space is None else metric.space.whiten
    for b in range(2):
        x, q = (roots * white(part[b]).double() for part in (z, query))
        means = x.mean(dim=1)
        rest = (x - means.unsqueeze(1)).flatten(0, 1)
        covariance = torch.eye(24).double() + rest.T @ rest / (0.7 * 24)
        inverse = torch.linalg.inv(covariance)
        wanted = q @ inverse @ means.T - 0.5 * ((means @ inverse) * means).sum(dim=1)
        torch.testing.assert_close(found[b].double(), wanted, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("shrinkage", [0.1, 0.5, 0.9])
def test_lda_without_base_classes_is_that_of_scikit_learn(shrinkage: float) -> None:
    """Its covariance is (1 - a) S + a tr(S) / D I, S the scatter over the images: ours times a constant."""
    metric = metric_of(ONE, base=False)
    z, query = tasks_of(1, 4, 6, ONE), tasks_of(1, 1, 40, ONE)[:, 0]
    rest = (z - z.mean(dim=2, keepdim=True))[0].flatten(0, 1).double()
    variance = float(rest.square().sum()) / len(rest) / 24
    weight = shrinkage * variance * len(rest) / (1 - shrinkage)  # of the identity, beside R'R
    found = lda(metric, z, query, replace(USUAL, penalty=weight / 24))[0].double() / (shrinkage * variance)
    oracle = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage)
    oracle.fit(z[0].flatten(0, 1).double().numpy(), np.repeat(np.arange(4), 6))
    wanted = oracle.predict_proba(query[0].double().numpy())
    assert np.allclose(found.softmax(dim=1).numpy(), wanted, atol=1e-3)


def test_lda_of_a_huge_weight_is_the_nearest_mean_in_the_whitened_space() -> None:
    metric = metric_of(ONE)
    assert metric.space is not None
    z, query = tasks_of(2, 4, 3, ONE), tasks_of(2, 1, 6, ONE)[:, 0]
    x, q = metric.space.whiten(z), metric.space.whiten(query)
    distances = torch.cdist(q, x.mean(dim=2))
    found = lda(metric, z, query, replace(USUAL, penalty=1e6))
    torch.testing.assert_close(found.softmax(dim=-1), (-0.5 * distances**2).softmax(dim=-1), atol=1e-2, rtol=0)


@pytest.mark.parametrize("name", CONTROLS)
@pytest.mark.parametrize("metric", METRICS)
def test_what_must_not_matter(name: str, metric: str) -> None:
    space = METRICS[metric]()
    settings = ControlSettings(5, 3, "task", 0.3, 0.5, 2.0)
    run = control_method(name, space, {name: [settings]})
    z, query = tasks_of(4, 5, 3, space.groups), tasks_of(4, 1, 7, space.groups)[:, 0]
    whole = run(z, query, EMPTY, 0)
    assert torch.allclose(whole.sum(dim=-1), torch.ones(4, 7), atol=1e-5)
    alone = torch.cat([run(z[i : i + 1], query[i : i + 1], EMPTY, i) for i in range(4)])
    assert torch.allclose(whole, alone, atol=1e-4)  # a batch is its tasks
    order = torch.tensor([3, 0, 4, 2, 1])
    assert torch.allclose(run(z[:, order], query, EMPTY, 0), whole[..., order], atol=1e-3)  # classes are alike
    assert torch.allclose(run(z[:, :, [2, 0, 1]], query, EMPTY, 0), whole, atol=1e-3)  # and so are images
    assert torch.allclose(run(z, query[:, :2], EMPTY, 0), whole[:, :2], atol=1e-5)  # queries stand alone


@pytest.mark.parametrize("name", CONTROLS)
def test_identical_support_images_give_finite_probabilities(name: str) -> None:
    for metric in (metric_of(TWO), metric_of(TWO, base=False)):
        run = control_method(name, metric, {name: [ControlSettings(5, 4, "task", 0.2, 0.01)]})
        for z in (tasks_of(2, 5, 1, TWO).expand(-1, -1, 4, -1), tasks_of(2, 1, 1, TWO).expand(-1, 5, 4, -1)):
            assert torch.isfinite(run(z, tasks_of(2, 1, 7, TWO)[:, 0], EMPTY, 0)).all()


@pytest.mark.parametrize("fit", [logistic_regression, ridge_regression])
def test_an_intercept_takes_a_shift(fit: Callable[[Tensor, float], tuple[Tensor, Tensor]]) -> None:
    z = tasks_of(2, 5, 3, ONE)
    (first, one), (second, other) = fit(z, 0.5), fit(z + 0.3, 0.5)
    torch.testing.assert_close(first, second, atol=1e-4, rtol=0)
    torch.testing.assert_close(one - 0.3 * first.sum(dim=-1), other, atol=1e-3, rtol=0)


def world(informative: slice, offset: float, signal: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    """Support, query and labels of 5-way 3-shot tasks that differ in some numbers, all of them moved by `offset`."""
    g = torch.Generator().manual_seed(0)
    z = torch.randn(30, 5, 8, 24, generator=g)
    z[..., informative] = 0.5 * z[..., informative] + signal * torch.randn(30, 5, 1, 24, generator=g)[..., informative]
    z = z + offset
    return z[:, :, :3], z[:, :, 3:].flatten(1, 2), torch.arange(5).repeat_interleave(5)


def accuracy(name: str, metric: Metric, tasks: tuple[Tensor, Tensor, Tensor], settings: ControlSettings) -> float:
    z, query, labels = tasks
    return float((CONTROLS[name][0](metric, z, query, settings).argmax(dim=-1) == labels).float().mean())


@pytest.mark.parametrize("name", CONTROLS)
def test_a_fit_finds_the_features_that_tell_classes_apart(name: str) -> None:
    metric = metric_of(TWO, base=False)
    last, below = world(slice(0, 16), 0.0), world(slice(16, 24), 0.0)
    assert fit_control(name, metric, [last], 5, 3).level < 0.3
    found = fit_control(name, metric, [below], 5, 3)
    assert found.level == 0.5 and (found.way, found.shot) == (5, 3)
    with_both = fit_control(name, metric, [last, below, below], 5, 3)  # the mean over domains decides
    assert with_both.level > 0


@pytest.mark.parametrize("name", ["prototype", "nearest"])
def test_a_fit_centres_where_the_classes_share_a_direction(name: str) -> None:
    moved, metric = world(slice(0, 24), 3.0, signal=0.3), metric_of(ONE, base=False)
    assert fit_control(name, metric, [moved], 5, 3).centre == "task"
    assert fit_control(name, metric_of(ONE), [moved], 5, 3).centre == "task"
    origin = ControlSettings(5, 3)
    assert accuracy(name, metric, moved, replace(origin, centre="task")) > accuracy(name, metric, moved, origin)


@pytest.mark.parametrize("name", CONTROLS)
def test_no_choice_of_the_grid_is_better_than_the_fitted_one(name: str) -> None:
    metric, tasks = metric_of(TWO), world(slice(8, 20), 0.5)
    found = fit_control(name, metric, [tasks], 5, 3)
    best = accuracy(name, metric, tasks, found)
    for field, values in CONTROLS[name][1].items():
        for value in values:
            assert accuracy(name, metric, tasks, replace(found, **{field: value})) <= best


@pytest.mark.parametrize("name", CONTROLS)
def test_temperatures_are_fitted_to_the_labels(name: str) -> None:
    metric, domains = metric_of(ONE), [world(slice(0, 4), 0.0), world(slice(4, 6), 0.0)]
    found = fit_control(name, metric, domains, 5, 3)
    scores = [CONTROLS[name][0](metric, z, query, found).flatten(0, 1) for z, query, _ in domains]
    labels = torch.cat([labels.repeat(len(z)) for z, _, labels in domains])
    assert found.temperature == pytest.approx(best_temperature(torch.cat(scores), labels), rel=1e-4)
    run = control_method(name, metric, {name: [found]})
    probabilities = torch.cat([run(z, query, EMPTY, 0).flatten(0, 1) for z, query, _ in domains])
    confidence = float(probabilities.amax(dim=1).mean())
    right = float((probabilities.argmax(dim=1) == labels).float().mean())
    assert confidence == pytest.approx(right, abs=0.08)  # calibrated as a whole


def test_the_settings_of_the_nearest_task_serve() -> None:
    fitted = [ControlSettings(way, shot, penalty=way * 100 + shot) for way in (5, 20) for shot in (1, 10)]
    nearby = {(5, 1): 501, (2, 2): 501, (5, 4): 510, (9, 1): 501, (11, 30): 2010, (50, 3): 2001}
    assert {pair: nearest_settings(fitted, *pair).penalty for pair in nearby} == nearby
    assert nearest_settings([], 7, 2) == ControlSettings(7, 2)


def test_a_method_takes_the_settings_of_its_tasks_and_its_own_alone() -> None:
    metric = metric_of(TWO)
    z, query = tasks_of(2, 5, 3, TWO), tasks_of(2, 1, 7, TWO)[:, 0]
    own = [ControlSettings(5, 1, penalty=9.0), ControlSettings(5, 3, level=0.5, temperature=3.0)]
    found = control_method("logreg", metric, {"logreg": own, "ridge": [ControlSettings(5, 3)]})(z, query, EMPTY, 0)
    wanted = (3.0 * logreg(metric, z, query, own[1])).softmax(dim=-1)
    torch.testing.assert_close(found, wanted)
    unfitted = control_method("logreg", metric, {"ridge": own})(z, query, EMPTY, 0)
    torch.testing.assert_close(unfitted, logreg(metric, z, query, ControlSettings(5, 3)).softmax(dim=-1))


def test_settings_are_read_back_from_a_file() -> None:
    fitted = {"logreg": (ControlSettings(5, 1, "task", 0.2, 0.1, 3.5), ControlSettings(5, 5)), "lda": ()}
    header = {"controls": {name: [asdict(s) for s in settings] for name, settings in fitted.items()}}
    assert read_fitted(json.loads(json.dumps(header))) == fitted
    assert read_fitted({}) == {}


@pytest.mark.parametrize("controls", [
    {"logreg": [{"way": 5}]},
    {"logreg": [{"way": 5, "shot": 1, "centre": "elsewhere"}]},
    {"logreg": 3},
    [],
])  # fmt: skip
def test_settings_of_another_form_are_refused(controls: object) -> None:
    with pytest.raises(ValueError):
        read_fitted({"controls": controls})


def clusters(seed: int, noise: float) -> tuple[Tensor, Tensor, Tensor]:
    """Support (1, 3, 1, D), query (1, 60, D) and its labels: three directions with noise."""
    g = torch.Generator().manual_seed(seed)
    means = 4 * torch.randn(3, 1, 16, generator=g)
    points = means + noise * torch.randn(3, 21, 16, generator=g)
    return points[None, :, :1], points[:, 1:].reshape(1, 60, 16), torch.arange(3).repeat_interleave(20)


def test_clear_clusters_are_found_by_both_transductive_controls() -> None:
    support, query, labels = clusters(0, noise=0.5)
    for probabilities in (soft_kmeans(support, query, 20.0), label_propagation(support, query)):
        assert torch.allclose(probabilities.sum(dim=-1), torch.ones(1, 60), atol=1e-5)
        assert torch.equal(probabilities[0].argmax(dim=-1), labels)


def test_the_pool_corrects_a_support_image_far_off_its_class() -> None:
    right = {"none": 0, "kmeans": 0, "propagation": 0}
    for seed in range(30):
        support, query, labels = clusters(seed, noise=3.0)
        found = {
            "none": soft_kmeans(support, query, 20.0, steps=0),
            "kmeans": soft_kmeans(support, query, 20.0, steps=3),
            "propagation": label_propagation(support, query),
        }
        for name, p in found.items():
            right[name] += int((p[0].argmax(dim=-1) == labels).sum())
    assert right["kmeans"] > right["none"] + 18 and right["propagation"] > right["none"] + 18  # one point of 1,800


def test_permuting_the_queries_permutes_the_answers() -> None:
    support, query, _ = clusters(1, noise=2.0)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    for method in (lambda q: soft_kmeans(support, q, 10.0), lambda q: label_propagation(support, q)):
        assert torch.allclose(method(query[:, order]), method(query)[:, order], atol=1e-5)


def test_one_query_is_enough() -> None:
    support, query, _ = clusters(2, noise=1.0)
    assert torch.isfinite(label_propagation(support, query[:, :1])).all()
    assert torch.isfinite(soft_kmeans(support, query[:, :1], 10.0)).all()


def test_the_transductive_controls_see_features_as_the_prototype_does() -> None:
    metric = metric_of(TWO)
    z, query = tasks_of(2, 5, 3, TWO), tasks_of(2, 1, 30, TWO)[:, 0]
    settings = ControlSettings(5, 3, "task", 0.5, temperature=7.0)
    placed_tasks = placed(metric, z, query, settings)
    fitted = {"prototype": [settings], "logreg": [ControlSettings(5, 3)]}
    torch.testing.assert_close(soft_kmeans_method(metric, fitted)(z, query, EMPTY, 0), soft_kmeans(*placed_tasks, 7.0))
    found = label_propagation_method(metric, fitted)(z, query, EMPTY, 0)
    torch.testing.assert_close(found, label_propagation(*placed_tasks))
