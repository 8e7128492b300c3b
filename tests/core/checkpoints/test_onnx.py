"""What an exported graph says of itself; `metadiff export` is tested in tests/commands/look."""

import json

import numpy as np
import torch
from PIL import Image

from metadiff_cli.core.checkpoints.model import SavedClassifier
from metadiff_cli.core.checkpoints.onnx import metadata
from metadiff_cli.core.method.adapt import TaskClassifier
from metadiff_cli.core.method.task_space import identity_space
from metadiff_cli.data.images import to_square
from tests.worlds import small_encoder


def test_the_preparation_that_it_tells_gives_the_pixels_that_metadiff_sees() -> None:
    encoder = small_encoder(24)
    space = identity_space(torch.randn(3, 2, encoder.feature_size))
    task = TaskClassifier(space, torch.randn(1, 1, 2, encoder.feature_size), 4.0, 10.0)
    entries = metadata(SavedClassifier(encoder, task, ("ß", "b")))
    facts = json.loads(entries["metadiff"])
    assert json.loads(entries["classes"]) == ["ß", "b"] and facts["image"]["size"] == 24
    call = facts["preparation"][facts["preparation"].index("image.resize") :]
    rng = np.random.default_rng(0)
    for size in ((501, 300), (31, 200), (24, 24), (25, 24)):
        image = Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
        width, height = image.size
        names = {"Image": Image, "image": image, "S": 24, "W": width, "H": height, "s": min(width, height)}
        assert np.array_equal(np.asarray(eval(call, names)), to_square(image, 24))
