"""The headers of encoders and models: what is read of them, with the limits of every value.

What a saved classifier and a baseline add is beside the functions that read them, in classifier.py and baseline.py.
"""

from typing import Annotated, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from metadiff_cli.config.schema import DenoiserConfig
from metadiff_cli.core.checkpoints.file import Part
from metadiff_cli.core.method.adapt import Tuning
from metadiff_cli.core.method.calibration import Rejection, TaskTable
from metadiff_cli.core.method.guidance import PoolGuidance, Usual

LARGEST = 1.001e6  # of a fitted number: the guidance scale of a prototype, rounded to fp32
# of the tables of the tuning: the lowest and the highest value
BOUNDS = {
    "guidance": (1e-3, LARGEST), "level": (0.0, 1.0), "domain": (0.0, 1.0), "scale": (1e-2, 1e3),
    "prior": (1e-6, LARGEST), "temperature": (1e-5, 1e4), "correction": (1e-3, 1e3),
}  # fmt: skip

Number = Annotated[float, Field(ge=0, le=LARGEST)]
Positive = Annotated[float, Field(gt=0, le=LARGEST)]


class ImageHeader(Part):
    """`image`: side in pixels, mean and standard deviation per channel of pixels in 0..1, and the views of a model."""

    size: Annotated[int, Field(ge=16, le=1024)]
    mean: tuple[Number, Number, Number]
    std: tuple[Positive, Positive, Positive]
    views: Literal[1, 2, 5, 6] = 1
    shift: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _shift_stays_inside(self) -> Self:
        if self.shift >= self.size:
            raise ValueError(f"images of {self.size} pixels are moved by {self.shift}")
        return self


class MetricHeader(Part):
    """`metric`: the sizes of the groups of features, and whether there are parts that are plain, and whitened ones."""

    groups: tuple[Annotated[int, Field(ge=1)], ...]
    plain: bool
    whitened: bool


class TuningHeader(Part):
    """`tuning`: the fields of a `Tuning`."""

    guidance: TaskTable
    level: TaskTable
    domain: TaskTable
    scale: TaskTable
    prior: TaskTable
    temperature: TaskTable
    correction: TaskTable
    usual: Usual | None
    pool: dict[Literal["sharpness", "smoothing", "weight"], Number]
    rejection: Rejection | None

    @model_validator(mode="after")
    def _numbers_are_of_their_kind(self) -> Self:
        for name, (low, high) in BOUNDS.items():
            if not all(low <= value <= high for row in getattr(self, name).values for value in row):
                raise ValueError(f"the table of `{name}` has a value outside {low:g} to {high:g}")
        return self

    def tuning(self) -> Tuning:
        """The tuning itself."""
        return Tuning(**{**dict(self), "pool": PoolGuidance(**self.pool)})


class EncoderHeader(Part):
    """What is read from the header of any file with an encoder."""

    model_config = ConfigDict(extra="ignore")

    encoder: str
    image: ImageHeader
    encoder_sha256: str | None = None  # of the installed file with its weights, where the checkpoint holds none


class ModelHeader(EncoderHeader):
    """What is read from the header of a full model, and of the files that contain one."""

    classes: list[str]
    denoiser: DenoiserConfig
    metric: MetricHeader
    tuning: TuningHeader
    most_shots: int | None = None
