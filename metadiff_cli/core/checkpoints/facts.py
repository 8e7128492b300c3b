"""What the ONNX file of an exported classifier says of itself. No torch here: programs without it read such files.

The metadata of the file has two entries. `classes` is a JSON list of the names of the classes. `metadiff` is a JSON
object, whose keys are the fields of `Facts`, and further ones for people.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

NONE = "_none"  # the label of images that show none of the classes; adaptation takes it for one more class
PROBABILITIES, MARGINS = "probabilities", "margins"  # the outputs of the graph
# how data/images.py makes pixels of an image, in one call of Pillow: the same steps give the same pixels
PREPARATION = (
    "upright as the EXIF data says, RGB, transparent parts on white; with W, H = image.size and s = min(W, H): "
    "image.resize((S, S), Image.Resampling.BICUBIC, "
    "box=((W - s) / 2, (H - s) / 2, (W + s) / 2, (H + s) / 2), reducing_gap=3.0)"
)


def known(classes: Sequence[str]) -> list[int]:
    """The positions of the classes whose images are known: all but NONE."""
    return [position for position, cls in enumerate(classes) if cls != NONE]


def pixels_rule(size: int) -> dict[str, Any]:
    """PREPARATION for programs: `fit` says that the central square is taken, and `size` (pixels) is its side after."""
    return {
        "size": size, "mode": "RGB", "orientation": "exif", "background": [255, 255, 255], "fit": "crop",
        "resampling": "bicubic", "reducing_gap": 3.0,
    }  # fmt: skip


class RejectionFacts(BaseModel):
    """The threshold of the known score in nats, and the rate (0..1) of false rejections that it was fitted for."""

    threshold: float
    false_rejection_rate: float


class Facts(BaseModel):
    """What is read of the metadata; `Facts.of` gives it.

    `pixels` is the rule of `pixels_rule`. `rejection` is there where the graph has margins. `support` counts the
    support images of each class, `unlabelled` the images that guided the adaptation as well. `pictures` has the name of
    each support image by the digest of its pixels (hexadecimal).
    """

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    package: str
    classes: tuple[str, ...]
    encoder: str
    pixels: dict[str, Any]
    rejection: RejectionFacts | None
    support: dict[str, int]
    unlabelled: int
    pictures: dict[str, str]

    @classmethod
    def of(cls, metadata: Mapping[str, str]) -> "Facts":
        """The facts in the metadata of a file. Raises KeyError for another file, and ValueError for other facts."""
        facts = cls.model_validate({**json.loads(metadata["metadiff"]), "classes": json.loads(metadata["classes"])})
        if facts.pixels != pixels_rule(facts.size):
            raise ValueError("its images are made in another way")
        return facts

    @property
    def size(self) -> int:
        """The side of the images in pixels."""
        return int(self.pixels["size"])
