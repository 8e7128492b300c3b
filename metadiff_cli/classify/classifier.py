"""An adapted classifier with all that it was made of: adapted, saved, loaded, and asked for predictions."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from metadiff_cli.classify.support_set import Pool, SupportSet, require_classes
from metadiff_cli.core.checkpoints.classifier import StoredClassifier, StoredImages, load_classifier, save_classifier
from metadiff_cli.core.checkpoints.facts import known
from metadiff_cli.core.checkpoints.model import Model
from metadiff_cli.core.method.adapt import MetaDiff, Sampling, TaskClassifier, adapt_tasks, seeds_of
from metadiff_cli.core.method.guidance import PROTOTYPE
from metadiff_cli.core.method.rejection import Rejector, rejector_of
from metadiff_cli.errors import ConfigError

STEPS = 10  # denoising steps of a prediction
# and of draws from the posterior: in the Gaussian case their standard deviation is 0.70 to 0.80 of the true one after
# 10 steps, and 0.96 to 0.99 after 100
DRAWING_STEPS = 100


@dataclass(frozen=True)
class Classifier:
    """A classifier `task` that `model` was adapted to, with the support and the pool, where there was one."""

    model: Model
    support: SupportSet
    pool: Pool | None
    task: TaskClassifier

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the N classes, sorted."""
        return self.support.classes

    def probabilities(self, features: Tensor) -> Tensor:
        """Probabilities (n, N) of features (n, D)."""
        return self.task.probabilities(self.expanded(features))[0]

    def expanded(self, features: Tensor) -> Tensor:
        """Features (n, D) as queries (1, n, J) of the task."""
        return self.task.metric.expand(features).unsqueeze(0)

    def rejector(self) -> Rejector:
        """The rejector of images that show none of the classes, by the classes other than NONE.

        Raises CheckpointError when no threshold was fitted, and DataError for a single class of one image.
        """
        support = self.support.task(self.task.metric)
        return rejector_of(self.model.metadiff, self.task, support, known=known(self.classes))

    def save(self, path: Path) -> None:
        """Write the classifier to a file. Of the paths of the support only the file names are kept. Raises OSError."""
        support, pool = self.support, self.pool
        stored = StoredClassifier(
            self.model, self.task, self.classes, StoredImages(support.features, support.digests), support.labels,
            support.names(), None if pool is None else StoredImages(pool.features, pool.digests),
        )  # fmt: skip
        save_classifier(path, stored)

    @classmethod
    def load(cls, path: Path, device: torch.device) -> "Classifier":
        """Read a classifier from a file of `save`. Raises CheckpointError for any other file."""
        stored = load_classifier(path, device)
        images, pool = stored.support, stored.pool
        support = SupportSet(stored.classes, images.features, stored.labels, images.digests, stored.names)
        return cls(stored.model, support, None if pool is None else Pool(pool.features, pool.digests), stored.task)


def default_steps(temperature: float) -> int:
    """Denoising steps where nobody asks for a number."""
    return DRAWING_STEPS if temperature > 0 else STEPS


def narrow_draws(sampling: Sampling) -> str:
    """A warning about too few steps for draws, or an empty text."""
    if sampling.temperature <= 0 or sampling.steps >= DRAWING_STEPS:
        return ""
    return (
        f"at temperature {sampling.temperature:g}, {sampling.steps} steps draw classifiers that differ too little: "
        f"the posterior needs {DRAWING_STEPS} steps or more"
    )


def require_posterior(metadiff: MetaDiff, sampling: Sampling) -> None:
    """Raise ConfigError for draws from a model that has no statistics of classes to draw by."""
    if sampling.temperature > 0 and metadiff.metric.space is None:
        raise ConfigError(
            "a temperature above 0 draws from a posterior, for which this model has no statistics of classes",
            hint="leave the temperature at 0",
        )


def adapt(model: Model, support: SupportSet, sampling: Sampling, *, seed: int, pool: Pool | None = None) -> Classifier:
    """Adapt a model to a support set, guided by a pool where there is one.

    Raises DataError when the support has fewer than two classes, and ConfigError as `require_posterior` does.
    """
    require_classes(support)
    require_posterior(model.metadiff, sampling)
    if sampling.guidance is not None:  # beyond this scale nothing of the prior is left
        sampling = replace(sampling, guidance=min(sampling.guidance, PROTOTYPE))
    metric, unlabelled = model.metadiff.metric, None if pool is None else pool.without(support.digests)
    task = adapt_tasks(
        model.metadiff,
        support.task(metric),
        sampling,
        ranks=torch.arange(len(support.classes)).unsqueeze(0),  # the classes are sorted by name already
        seeds=seeds_of(seed, 0, 1),
        pool=None if unlabelled is None else metric.expand(unlabelled.features).unsqueeze(0),
    )
    return Classifier(model, support, pool, task)
