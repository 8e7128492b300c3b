"""The quick measurement of an encoder between epochs."""

from functools import partial

import numpy as np

from metadiff_cli.core.evaluation.evaluate import quick_accuracy
from tests.worlds import small_encoder


def test_the_quick_measurement_of_an_encoder_takes_the_classes_that_it_can() -> None:
    images = np.random.default_rng(0).integers(0, 256, (31, 16, 16, 3), dtype=np.uint8)
    measure = partial(quick_accuracy, small_encoder(mirror=False), batch=8, seed=0, episodes=5)
    for classes in (2, 3, 6):
        assert 0 <= measure(images[: 4 * classes], np.repeat(np.arange(classes), 4)) <= 100
    with_single = measure(images[:9], np.array([0, 0, 0, 0, 1, 1, 1, 1, 2]))
    assert with_single == measure(images[:8], np.array([0, 0, 0, 0, 1, 1, 1, 1]))
    assert measure(images[:5], np.array([0, 0, 0, 0, 1])) is None
