"""What an exported graph says of itself; `metadiff export` is tested in tests/commands/look."""

import json

import numpy as np
import pytest
from PIL import Image

from metadiff_cli.core.checkpoints.facts import PREPARATION, Facts, pixels_rule
from metadiff_cli.data.images import to_square

SIZES = ((501, 300), (31, 200), (24, 24), (25, 24))


def drawn(size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))


@pytest.mark.parametrize("size", SIZES)
def test_the_preparation_that_it_tells_gives_the_pixels_that_metadiff_sees(size: tuple[int, int]) -> None:
    image, call = drawn(size), PREPARATION[PREPARATION.index("image.resize") :]
    width, height = image.size
    names = {"Image": Image, "image": image, "S": 24, "W": width, "H": height, "s": min(width, height)}
    assert np.array_equal(np.asarray(eval(call, names)), to_square(image, 24))


@pytest.mark.parametrize("size", SIZES)
def test_a_program_that_follows_the_rule_sees_these_pixels(size: tuple[int, int]) -> None:
    rule = json.loads(json.dumps(pixels_rule(24)))
    image, method = drawn(size), Image.Resampling[rule["resampling"].upper()]
    assert rule["fit"] == "crop"
    side = min(image.size)
    left, top = ((length - side) / 2 for length in image.size)
    box = (left, top, left + side, top + side)
    resized = image.resize((rule["size"],) * 2, method, box=box, reducing_gap=rule["reducing_gap"])
    assert np.array_equal(np.asarray(resized), to_square(image, 24))


def test_other_facts_are_refused() -> None:
    known = {
        "package": "1", "encoder": "lite0", "rejection": None, "support": {"a": 1, "b": 2}, "unlabelled": 0,
        "pictures": {}, "pixels": pixels_rule(24), "of a later version": 1,
    }  # fmt: skip
    classes = json.dumps(["a", "b"])
    assert Facts.of({"metadiff": json.dumps(known), "classes": classes}).size == 24
    for change in ({"pixels": {**pixels_rule(24), "fit": "squash"}}, {"pixels": {}}, {"support": None}):
        with pytest.raises((ValueError, KeyError)):
            Facts.of({"metadiff": json.dumps({**known, **change}), "classes": classes})
    with pytest.raises(KeyError):
        Facts.of({"classes": classes})
