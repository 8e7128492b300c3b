"""Controls: other classifiers on the same frozen features, measured on the same episodes.

prototype  cosine to the class mean (Snell et al. 2017; centred: Wang et al. 2019)
nearest    cosine to the nearest support image
logreg     multinomial logistic regression, the usual strong control (Tian et al. 2020)
ridge      linear regression on one-hot labels in closed form (Bertinetto et al. 2019, without their learned scale)
lda        Gaussians with one covariance, pooled over support and base classes (Wang et al. 2024, for CLIP)
soft-kmeans, label-propagation   the transductive methods of the field

What a control leaves open is fitted on the validation data of MetaDiff, by ways and shots: where its features are
centred, how much the layers below the last one count, its penalty, and the temperature of its confidences.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import TypeAdapter
from torch import Tensor

from metadiff_cli.core.evaluation.episodes import Episodes
from metadiff_cli.core.evaluation.evaluate import Method
from metadiff_cli.core.method.calibration import best_temperature
from metadiff_cli.core.method.descent import log_softmax, softmax
from metadiff_cli.core.method.metric import Metric, cosine_logits

JITTER = 1e-10  # added to squared lengths of about 1
ITERATIONS, GRADIENT = 500, 1e-6  # of L-BFGS: at most so many, and until no entry of the gradient is larger


@dataclass(frozen=True)
class ControlSettings:
    """What was fitted for one control and tasks of `way` ways and `shot` shots.

    Features are relative to the origin, the mean of the base classes, or that of the task. `level` is the share of the
    groups of features after the first. `temperature` multiplies the scores before the softmax.
    """

    way: int
    shot: int
    centre: Literal["origin", "base", "task"] = "origin"
    level: float = 0.0
    penalty: float = 1.0
    temperature: float = 1.0


Fitted = Mapping[str, Sequence[ControlSettings]]  # by the name of the control
Tasks = tuple[Tensor, Tensor, Tensor]  # of one domain: support (B, N, K, D), query (B, M, D), labels (M,)
Scores = Callable[[Metric, Tensor, Tensor, ControlSettings], Tensor]  # support and query -> (B, M, N)


def read_fitted(header: Mapping[str, Any]) -> Fitted:
    """Return the settings of controls in the header of a checkpoint. Raises ValueError."""
    return TypeAdapter(dict[str, tuple[ControlSettings, ...]]).validate_python(header.get("controls", {}))


def fit_control(name: str, metric: Metric, domains: Sequence[Tasks], way: int, shot: int) -> ControlSettings:
    """Return the settings of the control with the best accuracy, the mean over domains."""
    scores, grid = CONTROLS[name]

    def accuracy(settings: ControlSettings) -> float:
        hits = [(scores(metric, s, q, settings).argmax(dim=-1) == labels).float().mean() for s, q, labels in domains]
        return float(torch.stack(hits).mean())

    best = max((ControlSettings(way, shot, **choice) for choice in _choices(grid, metric)), key=accuracy)
    logits = torch.cat([scores(metric, s, q, best).flatten(0, 1) for s, q, _ in domains])
    labels = torch.cat([labels.repeat(len(s)) for s, _, labels in domains])
    return replace(best, temperature=best_temperature(logits, labels))


def control_method(name: str, metric: Metric, fitted: Fitted) -> Method:
    """Return a control as a method of `evaluate`, with the settings of the nearest ways and shots."""
    scores, _ = CONTROLS[name]

    def run(support: Tensor, query: Tensor, episodes: Episodes, first: int) -> Tensor:
        settings = nearest_settings(fitted.get(name, ()), *support.shape[1:3])
        return (settings.temperature * scores(metric, support, query, settings)).softmax(dim=-1)

    return run


def nearest_settings(fitted: Sequence[ControlSettings], way: int, shot: int) -> ControlSettings:
    """Return those of the nearest ways and shots, by their ratios; the defaults where nothing was fitted."""
    return min(
        fitted,
        key=lambda s: abs(math.log(s.way / way)) + abs(math.log(s.shot / shot)),
        default=ControlSettings(way, shot),
    )


def placed(metric: Metric, support: Tensor, query: Tensor, settings: ControlSettings) -> tuple[Tensor, Tensor]:
    """Return support (B, N, K, D) and query (B, M, D) relative to the centre, their groups weighed by the shares."""
    if settings.centre == "task":
        centre = support.mean(dim=(1, 2)).unsqueeze(1)
    elif settings.centre == "base" and metric.space is not None:
        centre = metric.space.mean.view(1, 1, -1)
    else:
        centre = support.new_zeros(1, 1, 1)
    return _weighed(metric, support - centre.unsqueeze(1), settings), _weighed(metric, query - centre, settings)


def _weighed(metric: Metric, z: Tensor, settings: ControlSettings) -> Tensor:
    """Groups at unit length times the roots of their shares."""
    parts = [F.normalize(part, dim=-1) for part in torch.split(z, list(metric.groups), dim=-1)]
    return torch.cat([root * part for root, part in zip(_roots(metric, settings), parts, strict=True)], dim=-1)


def _roots(metric: Metric, settings: ControlSettings) -> list[float]:
    """Square roots of the shares of the groups."""
    further = len(metric.groups) - 1
    if not further:
        return [1.0]
    return [math.sqrt(1 - settings.level), *[math.sqrt(settings.level / further)] * further]


def prototype(metric: Metric, support: Tensor, query: Tensor, settings: ControlSettings) -> Tensor:
    """Cosines (B, M, N) to the class means."""
    z, q = placed(metric, support, query, settings)
    return cosine_logits(q, z.mean(dim=2))


def nearest(metric: Metric, support: Tensor, query: Tensor, settings: ControlSettings) -> Tensor:
    """Cosines (B, M, N) to the nearest image of each class."""
    z, q = placed(metric, support, query, settings)
    cosines = q @ z.flatten(1, 2).mT  # (B, M, N K)
    return cosines.view(*q.shape[:2], *z.shape[1:3]).amax(dim=-1)


def logreg(metric: Metric, support: Tensor, query: Tensor, settings: ControlSettings) -> Tensor:
    """Logits (B, M, N) of logistic regression."""
    z, q = placed(metric, support, query, settings)
    weights, intercepts = logistic_regression(z, settings.penalty)
    return q @ weights.mT + intercepts.unsqueeze(1)


def ridge(metric: Metric, support: Tensor, query: Tensor, settings: ControlSettings) -> Tensor:
    """Scores (B, M, N) of ridge regression, about 0 to 1."""
    z, q = placed(metric, support, query, settings)
    weights, intercepts = ridge_regression(z, settings.penalty)
    return q @ weights.mT + intercepts.unsqueeze(1)


def lda(metric: Metric, support: Tensor, query: Tensor, settings: ControlSettings) -> Tensor:
    """Log-likelihoods (B, M, N), up to a term that all classes share, of classes with one covariance.

    The covariance is that of base classes, or a multiple of the identity where there are none, pooled with that of the
    support; the penalty is the weight of the first, in images per number of a feature.
    """
    space = metric.space
    z, q = (support, query) if space is None else (space.whiten(support), space.whiten(query))
    roots = torch.tensor(_roots(metric, settings)).repeat_interleave(torch.tensor(metric.groups)).to(z)
    z, q = roots * z, roots * q
    means = z.mean(dim=2)  # (B, N, D)
    rest = (z - means.unsqueeze(2)).flatten(1, 2)  # (B, n, D)
    weight = settings.penalty * z.shape[-1]
    gram = rest @ rest.mT
    gram.diagonal(dim1=1, dim2=2).add_(weight)
    # Woodbury: (I + R'R / w)^-1 = I - R'(w I + R R')^-1 R
    directions: Tensor = means - torch.linalg.solve(gram, rest @ means.mT).mT @ rest  # (B, N, D): Sigma^-1 mu
    return q @ directions.mT - 0.5 * (directions * means).sum(dim=-1).unsqueeze(1)


ANALYTIC = "analytic"  # MetaDiff's own control, of which only a temperature is fitted
Grid = Mapping[str, Sequence[Any]]  # fields of the settings with the values to choose from
CENTRES: Grid = {"centre": ("origin", "base", "task"), "level": (0.0, 0.2, 0.5)}
LINEAR: Grid = {"penalty": (0.01, 0.1, 1.0), "level": (0.0, 0.2, 0.5)}
CONTROLS: dict[str, tuple[Scores, Grid]] = {
    "prototype": (prototype, CENTRES),
    "nearest": (nearest, CENTRES),
    "logreg": (logreg, LINEAR),
    "ridge": (ridge, LINEAR),
    "lda": (lda, {"penalty": (0.3, 3.0, 1000.0), "level": (0.0, 0.2, 0.5)}),
}


def _choices(grid: Grid, metric: Metric) -> list[dict[str, Any]]:
    """All combinations of a grid that differ for features of this kind."""
    kept = dict(grid)
    if len(metric.groups) == 1:
        kept["level"] = (0.0,)
    if metric.space is None and "centre" in kept:
        kept["centre"] = ("origin", "task")
    return [dict(zip(kept, values, strict=True)) for values in product(*kept.values())]


def logistic_regression(z: Tensor, penalty: float = 1.0) -> tuple[Tensor, Tensor]:
    """Weights (B, N, D) and intercepts (B, N) for support features z (B, N, K, D).

    They minimise summed cross-entropy + penalty / 2 ||W||^2: `penalty` is 1 / C of scikit-learn's LogisticRegression.
    The solution lies in the span of the support, so it is sought as W' = X' L^-T U with X X' = L L': the logits are L U
    and |W| is |U|. One L-BFGS serves all tasks: their sum is as convex as each, and the largest gradient of any task
    ends it.
    """
    x, mean, target = _support(z)
    gram = x @ x.mT  # (B, M, M), singular: the images are centred
    gram.diagonal(dim1=1, dim2=2).add_(JITTER)
    inputs = torch.linalg.cholesky(gram)  # L
    tasks, rank, ways = target.shape
    solution = torch.zeros(tasks, rank + 1, ways, dtype=x.dtype, device=x.device)  # U; last row: intercepts
    optimiser = torch.optim.LBFGS(
        [solution], max_iter=ITERATIONS, max_eval=2 * ITERATIONS, history_size=10, tolerance_grad=GRADIENT,
        tolerance_change=0.0, line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> float:
        weights, intercepts = solution[:, :rank], solution[:, rank:]
        logits = inputs @ weights + intercepts
        error = softmax(logits) - target  # gradient of the cross-entropy with respect to the logits
        solution.grad = torch.cat([inputs.mT @ error + penalty * weights, error.sum(dim=1, keepdim=True)], dim=1)
        loss = -(target * log_softmax(logits)).sum() + penalty / 2 * weights.square().sum()
        return float(loss)

    optimiser.step(closure)  # type: ignore[no-untyped-call]
    dual = torch.linalg.solve_triangular(inputs.mT, solution[:, :rank], upper=True)  # (B, M, N)
    weights = dual.mT @ x  # (B, N, D)
    return _moved(weights, solution[:, rank], mean, z)


def ridge_regression(z: Tensor, penalty: float = 1.0) -> tuple[Tensor, Tensor]:
    """Weights (B, N, D) and intercepts (B, N) that minimise ||X W' + b - Y||^2 + penalty ||W||^2, Y one-hot.

    Solved among the M support images (the dual form), as D is larger than M.
    """
    x, mean, target = _support(z)
    share = target.mean(dim=1)  # (B, N)
    gram = x @ x.mT
    gram.diagonal(dim1=1, dim2=2).add_(penalty)
    dual = torch.linalg.solve(gram, target - share.unsqueeze(1))  # (B, M, N)
    return _moved(dual.mT @ x, share, mean, z)


def _support(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Centred images (B, M, D), their mean (B, 1, D) and one-hot labels (B, M, N), in float64, M = N K."""
    tasks, ways, shots, size = z.shape
    home = z.cpu() if z.device.type == "mps" else z  # Apple's GPUs have no float64
    x = home.reshape(tasks, ways * shots, size).double()
    mean = x.mean(dim=1, keepdim=True)
    labels = torch.arange(ways, device=home.device).repeat_interleave(shots)
    return x - mean, mean, F.one_hot(labels, ways).to(x).expand(tasks, -1, -1)


def _moved(weights: Tensor, intercepts: Tensor, mean: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """The classifier of centred images as one of the images themselves, in their type."""
    intercepts = intercepts.reshape(weights.shape[:2]) - (weights @ mean.mT).squeeze(-1)
    return weights.to(like.dtype).to(like.device), intercepts.to(like.dtype).to(like.device)


def soft_kmeans(support: Tensor, query: Tensor, scale: float, steps: int = 1) -> Tensor:
    """Probabilities (B, Q, N) of soft k-means from the class means (Ren et al. 2018), with cosine similarity.

    `support` (B, N, K, D), `query` (B, Q, D); `scale` is that of the prototype's logits.
    """
    sums, shots = support.sum(dim=2), support.shape[2]
    means = sums / shots
    for _ in range(steps):
        share = cosine_logits(query, means, scale).softmax(dim=-1)  # (B, Q, N)
        means = (sums + share.transpose(1, 2) @ query) / (shots + share.sum(dim=1).unsqueeze(-1))
    return cosine_logits(query, means, scale).softmax(dim=-1)


def label_propagation(
    support: Tensor, query: Tensor, neighbours: int = 10, alpha: float = 0.8, sharpness: float = 10.0
) -> Tensor:
    """Probabilities (B, Q, N) of label propagation over a graph of nearest neighbours (Zhou et al. 2004, eq. 3).

    Edges weigh exp(sharpness * cosine) between images that are among each other's `neighbours`; labels spread from
    `support` (B, N, K, D) to `query` (B, Q, D) as F = (1 - alpha S)^-1 Y.
    """
    tasks, ways, shots, size = support.shape
    nodes = F.normalize(torch.cat([support.reshape(tasks, ways * shots, size), query], dim=1), dim=-1)
    similarity = nodes @ nodes.transpose(1, 2)
    similarity.diagonal(dim1=1, dim2=2).fill_(-1.0)
    near = similarity.topk(min(neighbours, nodes.shape[1] - 1), dim=-1).indices
    kept = torch.zeros_like(similarity).scatter_(2, near, 1.0)
    weights = (sharpness * similarity).exp() * torch.maximum(kept, kept.transpose(1, 2))
    root = weights.sum(dim=-1).clamp_min(1e-12).rsqrt()
    spread = root.unsqueeze(2) * weights * root.unsqueeze(1)
    labels = torch.zeros(tasks, nodes.shape[1], ways, device=support.device)
    labels[:, : ways * shots] = torch.eye(ways, device=support.device).repeat_interleave(shots, dim=0)
    eye = torch.eye(nodes.shape[1], device=support.device)
    found: Tensor = torch.linalg.solve(eye - alpha * spread, labels)[:, ways * shots :].clamp_min(1e-12)
    return found / found.sum(dim=-1, keepdim=True)


def soft_kmeans_method(metric: Metric, fitted: Fitted) -> Method:
    """Soft k-means on the features as the prototype sees them, at its temperature."""

    def run(support: Tensor, query: Tensor, episodes: Episodes, first: int) -> Tensor:
        settings = nearest_settings(fitted.get("prototype", ()), *support.shape[1:3])
        return soft_kmeans(*placed(metric, support, query, settings), settings.temperature)

    return run


def label_propagation_method(metric: Metric, fitted: Fitted) -> Method:
    """Label propagation on the features as the prototype sees them."""

    def run(support: Tensor, query: Tensor, episodes: Episodes, first: int) -> Tensor:
        settings = nearest_settings(fitted.get("prototype", ()), *support.shape[1:3])
        return label_propagation(*placed(metric, support, query, settings))

    return run
