"""Controls: other classifiers on the same frozen features, measured on the same episodes.

prototype          cosine to the class mean
soft-kmeans, label-propagation   the transductive methods of the field
logreg  multinomial logistic regression, the usual strong control (Tian et al. 2020)
ridge   linear regression on one-hot labels in closed form (Bertinetto et al. 2019, without their learned scale)

The last two take unit-length features z (B, N, K, D) of B tasks at once. They have an intercept, so centring changes
nothing. Their penalty is fixed beforehand and the same for every task; nothing is fitted on the measured classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from metadiff_cli.core.evaluation.episodes import Episodes
from metadiff_cli.core.evaluation.evaluate import Method
from metadiff_cli.core.method.adapt import MetaDiff
from metadiff_cli.core.method.metric import cosine_logits

ITERATIONS, GRADIENT = 500, 1e-6  # of L-BFGS: at most so many, and until no entry of the gradient is larger
LOGREG, RIDGE = 0.1, 0.3  # penalties for features of unit length, the best ones on validation classes
SHARPNESS = 10.0  # of the softmax that turns ridge's scores, about 0 to 1, into confidences


def logistic_regression(z: Tensor, penalty: float = 1.0) -> tuple[Tensor, Tensor]:
    """Weights (B, N, D) and intercepts (B, N) for support features z (B, N, K, D).

    They minimise summed cross-entropy + penalty / 2 ||W||^2: `penalty` is 1 / C of scikit-learn's LogisticRegression.
    The solution lies in the span of the support, so it is sought in that basis, and one L-BFGS serves all tasks: their
    sum is as convex as each, and the largest gradient of any task ends it.
    """
    x, mean, target = _support(z)
    basis, coordinates = torch.linalg.qr(x.mT)  # x' = Q R: (B, D, R), (B, R, M) with R = min(D, M)
    inputs = coordinates.mT  # (B, M, R)
    tasks, _, rank = inputs.shape
    solution = torch.zeros(tasks, rank + 1, target.shape[2], dtype=x.dtype, device=x.device)  # last row: intercepts
    optimiser = torch.optim.LBFGS(
        [solution], max_iter=ITERATIONS, max_eval=2 * ITERATIONS, history_size=10, tolerance_grad=GRADIENT,
        tolerance_change=0.0, line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> float:
        weights, intercepts = solution[:, :rank], solution[:, rank:]
        logits = inputs @ weights + intercepts
        error = logits.softmax(dim=-1) - target  # gradient of the cross-entropy with respect to the logits
        solution.grad = torch.cat([inputs.mT @ error + penalty * weights, error.sum(dim=1, keepdim=True)], dim=1)
        loss = -(target * logits.log_softmax(dim=-1)).sum() + penalty / 2 * weights.square().sum()
        return float(loss)

    optimiser.step(closure)  # type: ignore[no-untyped-call]
    weights = (basis @ solution[:, :rank]).mT  # (B, N, D)
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


def logreg_method(penalty: float = LOGREG) -> Method:
    """Logistic regression on the support of each episode."""

    def run(support: Tensor, query: Tensor, episodes: Episodes, first: int) -> Tensor:
        weights, intercepts = logistic_regression(support, penalty)
        return (query @ weights.mT + intercepts.unsqueeze(1)).softmax(dim=-1)

    return run


def ridge_method(penalty: float = RIDGE) -> Method:
    """Ridge regression on the support of each episode; its confidences are scores through a softmax, not fitted."""

    def run(support: Tensor, query: Tensor, episodes: Episodes, first: int) -> Tensor:
        weights, intercepts = ridge_regression(support, penalty)
        return (SHARPNESS * (query @ weights.mT + intercepts.unsqueeze(1))).softmax(dim=-1)

    return run


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


def prototype_method(metadiff: MetaDiff) -> Method:
    """The cosine to the class mean of the same features, raw or centred as validation classes preferred."""

    def run(support: Tensor, query: Tensor, episodes: Episodes, first: int) -> Tensor:
        return cosine_logits(query, support.mean(dim=2), *prototype_form(metadiff, support)).softmax(dim=-1)

    return run


def prototype_form(metadiff: MetaDiff, support: Tensor) -> tuple[float, Tensor | None]:
    """Logit scale and centre (D,) of the prototype control for support features (B, N, K, D)."""
    scale = metadiff.tuning.prototype_calibration.scale(support.shape[1], support.shape[2])
    return scale, metadiff.space.mean if metadiff.tuning.centred_prototype else None


def soft_kmeans_method(metadiff: MetaDiff) -> Method:
    """Soft k-means on the features as the prototype control sees them, with its calibrated scale."""

    def run(support: Tensor, query: Tensor, episodes: Episodes, first: int) -> Tensor:
        scale, centre = prototype_form(metadiff, support)
        return soft_kmeans(*_centred(support, query, centre), scale)

    return run


def label_propagation_method(metadiff: MetaDiff) -> Method:
    """Label propagation on the features as the prototype control sees them."""

    def run(support: Tensor, query: Tensor, episodes: Episodes, first: int) -> Tensor:
        _, centre = prototype_form(metadiff, support)
        return label_propagation(*_centred(support, query, centre))

    return run


def _centred(support: Tensor, query: Tensor, centre: Tensor | None) -> tuple[Tensor, Tensor]:
    return (support, query) if centre is None else (support - centre, query - centre)
