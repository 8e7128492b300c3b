"""A classifier with what it was made of: adapted, saved and loaded."""

from pathlib import Path

import numpy as np
import pytest
import torch

from metadiff_cli.classify.classifier import Classifier, adapt, default_steps, narrow_draws
from metadiff_cli.classify.images import Encoded
from metadiff_cli.classify.support_set import pool_of, support_of
from metadiff_cli.core.checkpoints.model import Model, load_model
from metadiff_cli.core.method.adapt import Sampling
from metadiff_cli.errors import DataError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Model:
    return load_model(checkpoint, CPU)


def images(model: Model, count: int, first: int = 0) -> list[Encoded]:
    """Random features of unit length, as the encoder gives them, of pictures first .. first + count - 1."""
    z = torch.randn(100, model.images.feature_size, generator=torch.Generator().manual_seed(0))
    z = torch.nn.functional.normalize(z, dim=1)
    return [Encoded(f"folder/{i}.png", z[i], bytes([i]) * 32) for i in range(first, first + count)]


def labelled(model: Model) -> list[tuple[str, Encoded]]:
    return list(zip("aaabbc", images(model, 6), strict=True))


@pytest.mark.parametrize("guidance", [None, 4.0, 1e9])
def test_a_classifier_is_read_back_as_it_was(model: Model, tmp_path: Path, guidance: float | None) -> None:
    """Also at a guidance scale at which nothing of the prior is left."""
    pool, z = pool_of(images(model, 5, first=4)), images(model, 3, first=20)
    features = torch.stack([image.features for image in z if image.features is not None])
    made = adapt(model, support_of(labelled(model)), Sampling(guidance=guidance), seed=0, pool=pool)
    made.save(tmp_path / "c.safetensors")
    found = Classifier.load(tmp_path / "c.safetensors", CPU)
    assert torch.equal(found.probabilities(features), made.probabilities(features))
    assert found.classes == ("a", "b", "c") and found.support.counts() == {"a": 3, "b": 2, "c": 1}
    assert found.support.digests == made.support.digests and np.array_equal(found.support.labels, made.support.labels)
    assert found.pool is not None and pool is not None and found.pool.digests == pool.digests
    assert set(found.support.paths) == {f"{cls}/{i}.png" for i, cls in enumerate("aaabbc")}  # no folders
    made.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "c.safetensors").read_bytes()


def test_labelled_images_do_not_guide_as_well(model: Model) -> None:
    """A pool of images of the support alone changes nothing."""
    support = support_of(labelled(model))
    alone = adapt(model, support, Sampling(), seed=0)
    pooled = adapt(model, support, Sampling(), seed=0, pool=pool_of(images(model, 4)))
    assert torch.equal(alone.task.weights, pooled.task.weights)


def test_one_class_is_refused(model: Model) -> None:
    with pytest.raises(DataError, match="one class only"):
        adapt(model, support_of(labelled(model)[:3]), Sampling(), seed=0)


def test_steps_of_draws() -> None:
    assert default_steps(0) == 10 and default_steps(0.5) == 100
    assert narrow_draws(Sampling(steps=10)) == narrow_draws(Sampling(steps=100, temperature=1)) == ""
    assert "at temperature 0.5, 99 steps" in narrow_draws(Sampling(steps=99, temperature=0.5))
