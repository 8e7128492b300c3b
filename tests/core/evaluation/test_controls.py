"""Logistic and ridge regression against scikit-learn, and what must not matter to them."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from torch import Tensor

from metadiff_cli.core.evaluation.controls import logistic_regression, logreg_method, ridge_method, ridge_regression
from metadiff_cli.core.evaluation.episodes import Episodes

EMPTY = Episodes(*(np.empty(0) for _ in range(4)))


def tasks_of(tasks: int, ways: int, shots: int, size: int) -> Tensor:
    g = torch.Generator().manual_seed(ways + shots)
    means = torch.randn(tasks, ways, 1, size, generator=g)
    return torch.nn.functional.normalize(torch.relu(means + torch.randn(tasks, ways, shots, size, generator=g)), dim=-1)


SHAPES = [(3, 5, 1, 64), (2, 5, 5, 200), (2, 20, 2, 30), (2, 3, 30, 12)]  # the last has more images than features


@pytest.mark.parametrize("penalty", [1.0, 0.05])
@pytest.mark.parametrize("shape", SHAPES)
def test_logistic_regression_is_that_of_scikit_learn(shape: tuple[int, ...], penalty: float) -> None:
    z = tasks_of(*shape)
    weights, intercepts = logistic_regression(z, penalty)
    labels = np.repeat(np.arange(shape[1]), shape[2])
    for task in range(len(z)):
        oracle = LogisticRegression(C=1 / penalty, tol=1e-9, max_iter=5000)
        oracle.fit(z[task].flatten(0, 1).double().numpy(), labels)
        assert np.allclose(weights[task].numpy(), oracle.coef_, atol=1e-4)
        shift = oracle.intercept_.mean() - float(intercepts[task].mean())  # a common constant changes no prediction
        assert np.allclose(intercepts[task].numpy() + shift, oracle.intercept_, atol=1e-4)
        queries = tasks_of(1, 1, 50, shape[3])[0, 0]
        ours = queries @ weights[task].T + intercepts[task]
        assert np.array_equal(ours.argmax(dim=1).numpy(), oracle.predict(queries.double().numpy()))
        assert np.allclose(ours.softmax(dim=1).numpy(), oracle.predict_proba(queries.double().numpy()), atol=1e-5)


@pytest.mark.parametrize("penalty", [1.0, 0.05])
@pytest.mark.parametrize("shape", SHAPES)
def test_ridge_is_that_of_scikit_learn(shape: tuple[int, ...], penalty: float) -> None:
    z = tasks_of(*shape)
    weights, intercepts = ridge_regression(z, penalty)
    one_hot = np.eye(shape[1])[np.repeat(np.arange(shape[1]), shape[2])]
    for task in range(len(z)):
        oracle = Ridge(alpha=penalty).fit(z[task].flatten(0, 1).double().numpy(), one_hot)
        assert np.allclose(weights[task].numpy(), oracle.coef_, atol=1e-5)
        assert np.allclose(intercepts[task].numpy(), oracle.intercept_, atol=1e-5)


@pytest.mark.parametrize("make", [logreg_method, ridge_method])
def test_what_must_not_matter(make: object) -> None:
    run = make(1.0)  # type: ignore[operator]
    z, query = tasks_of(4, 5, 3, 40), tasks_of(4, 1, 7, 40)[:, 0]
    whole = run(z, query, EMPTY, 0)
    assert torch.allclose(whole.sum(dim=-1), torch.ones(4, 7), atol=1e-5)
    alone = torch.cat([run(z[i : i + 1], query[i : i + 1], EMPTY, i) for i in range(4)])
    assert torch.allclose(whole, alone, atol=1e-4)  # a batch is its tasks
    order = torch.tensor([3, 0, 4, 2, 1])
    assert torch.allclose(run(z[:, order], query, EMPTY, 0), whole[..., order], atol=1e-4)  # classes are alike
    assert torch.allclose(run(z[:, :, [2, 0, 1]], query, EMPTY, 0), whole, atol=1e-4)  # and so are images
    assert torch.allclose(run(z, query[:, :2], EMPTY, 0), whole[:, :2], atol=1e-6)  # queries stand alone
    assert torch.allclose(run(z + 0.3, query + 0.3, EMPTY, 0), whole, atol=1e-4)  # the intercept takes a shift


@pytest.mark.parametrize("fit", [logistic_regression, ridge_regression])
def test_identical_support_images_give_finite_weights(fit: object) -> None:
    z = tasks_of(2, 5, 1, 16).expand(-1, -1, 4, -1)
    weights, intercepts = fit(z, 1.0)  # type: ignore[operator]
    assert torch.isfinite(weights).all() and torch.isfinite(intercepts).all()
