"""Typed configuration: every setting, its default and its limits; settings.py lays values over them. No torch here."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from metadiff_cli.errors import suggest

MAX_GLYPHS = 8_000_000_000  # bytes of drawn images

ENCODERS = ("conv4", "conv4-padded", "resnet10", "resnet12")  # those of core/encoders.py, which loads torch
# library, model, weights; no more than that, as timm would take `hf-hub:` and paths of anybody's files as well
PRETRAINED = r"(torchvision|timm):([A-Za-z0-9_]{1,80})(?:\.([A-Za-z0-9_]{1,80}))?"

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Side = Annotated[int, Field(ge=16, le=1024)]  # pixels of an image
Count = Annotated[int, Field(ge=1, le=100_000_000)]
Few = Annotated[int, Field(ge=1, le=100_000)]  # what memory grows with: presets and checkpoints come from strangers too


def is_pretrained(encoder: str) -> bool:
    """Whether the name is that of a model of torchvision or timm."""
    return re.fullmatch(PRETRAINED, encoder) is not None


def _known_encoder(name: str) -> str:
    if name not in ENCODERS and not is_pretrained(name):
        close = suggest(name, [*ENCODERS, "torchvision:", "timm:"], before=", ", after="")
        raise ValueError(f"neither one of {', '.join(ENCODERS)}, nor torchvision:MODEL or timm:MODEL{close}")
    return name


def _ordered(bounds: tuple[int, int]) -> tuple[int, int]:
    if bounds[0] > bounds[1]:
        raise ValueError("the lowest comes first")
    return bounds


Range = Annotated[tuple[Few, Few], AfterValidator(_ordered), Field(description="lowest and highest, both included")]


class Section(BaseModel):
    """Base of all sections: unknown keys are refused and values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class GlyphsConfig(Section):
    """Size of the generated data set."""

    train: Few = 256
    val: Few = 64
    test: Few = 64
    images_per_class: Few = 20


class DataConfig(Section):
    """Which images, and at which size they are decoded (pixels, square)."""

    name: str = "folder"
    layout: str = "auto"
    size: Side = 84
    glyphs: GlyphsConfig = GlyphsConfig()

    @model_validator(mode="after")
    def _glyphs_fit_into_memory(self) -> "DataConfig":
        g = self.glyphs
        if (g.train + g.val + g.test) * g.images_per_class * self.size**2 * 3 > MAX_GLYPHS:
            raise ValueError(f"`glyphs` of this size take more than {MAX_GLYPHS / 1e9:.0f} GB")
        return self


class AugmentConfig(Section):
    """What a training image undergoes; see data/transforms.py."""

    crop: tuple[Share, Share] = (0.4, 1.0)
    aspect: tuple[Positive, Positive] = (0.75, 4 / 3)
    flip: bool = True
    jitter: Share = 0.4
    rotate: Annotated[float, Field(ge=0, le=180)] = 0.0


class PretrainConfig(Section):
    """Training of the encoder by cross-entropy: over the base classes, or over those of an episode.

    With `pairs` each batch has two images of each of batch / 2 classes, and each image has to be told by its cosine to
    the other ones (episodes of one support image, as Vinyals et al. 2016): for very many classes of few images.
    """

    objective: Literal["classes", "pairs"] = "classes"
    epochs: Count = 30
    batch: Annotated[int, Field(ge=2, le=100_000)] = 64
    lr: Positive = 0.05
    momentum: Share = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    schedule: Literal["one-cycle", "cosine"] = "one-cycle"
    label_smoothing: Share = 0.0
    rotation_weight: Annotated[float, Field(ge=0)] = 0.0  # of the 4-way rotation head's loss; 0 leaves the head out
    cosine_head: Positive | None = None  # logit scale of cosines, which `pairs` needs; None: a linear head
    rotated_classes: bool = False  # each base class turned by 90, 180, 270 degrees counts as a further class
    stages: tuple[
        tuple[Positive, Annotated[int, Field(ge=16, le=1024)]], ...
    ] = ()  # (share of the epochs, image size); empty: full size
    augment: AugmentConfig = AugmentConfig()
    fade: Share = 0.0  # of the training, its end: there the changes of `augment` become ever weaker, down to none
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    compile: bool = False  # the encoder by torch.compile: some minutes at each image size before it trains

    @model_validator(mode="after")
    def _stages_fill_the_epochs(self) -> "PretrainConfig":
        if self.stages and abs(sum(share for share, _ in self.stages) - 1) > 1e-6:
            raise ValueError("the shares of `stages` must add up to 1")
        return self

    @model_validator(mode="after")
    def _pairs_have_cosines_alone(self) -> "PretrainConfig":
        if self.objective == "pairs" and (self.cosine_head is None or self.rotation_weight > 0):
            raise ValueError("`objective: pairs` needs a `cosine_head` (15, say) and a `rotation_weight` of 0")
        return self


class FeaturesConfig(Section):
    """How an image becomes a feature vector."""

    mirror: bool = True  # average over the image and its mirror image
    shift: Annotated[int, Field(ge=0, le=64)] = 0  # pixels; average over images moved so far, too: nine times the work
    size: Annotated[int, Field(ge=16, le=1024)] | None = (
        None  # pixels; larger than in training may show more (Touvron et al. 2019)
    )
    half: bool = False  # round the encoder's matrices to fp16: a checkpoint of half the size
    store: Literal["fp32", "fp16", "bf16"] = "fp32"  # as which features are kept on disk; computed with in fp32


class TaskSpaceConfig(Section):
    """Shrinkage of the class statistics; design, section 2."""

    # shares within and between; "auto" takes the pair of core/tuning.SHRINKAGE that is best on validation classes
    shrink: Literal["auto"] | tuple[Share, Share] = "auto"
    floor: Positive = 1e-3


class DenoiserConfig(Section):
    """Which denoiser is trained, and its size."""

    kind: Literal["analytic", "unet", "paper"] = "unet"
    width: Annotated[int, Field(ge=1, le=16_384)] = 256
    depth: Annotated[int, Field(ge=1, le=6)] = 2
    dropout: Share = 0.1


class MetatrainConfig(Section):
    """Training of the denoiser on episodes of base classes."""

    steps: Count = 1000
    batch: Few = 32  # tasks
    lr: Positive = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    ema: Share = 0.99
    kappa: Annotated[float, Field(ge=0)] = 1.0  # weight of the cross-entropy of held-out images
    ways: Range = (5, 10)
    shots: Range = (1, 5)
    query: Few = 5
    validate_every: Count = 200  # steps
    validation_episodes: Count = 600


class SamplerConfig(Section):
    """How weights are drawn: DDIM steps, samples, noise temperature."""

    steps: Few = 10
    samples: Few = 1
    temperature: Annotated[float, Field(ge=0)] = 0.0
    guidance: Literal["auto"] | Positive = "auto"
    method: Literal["ddim", "ddpm"] = "ddim"


class InnerLoop(Section):
    """Training of a gradient-based baseline: inner loop on a task's support, outer loop over tasks (Adam).

    Way and shot are those of `evaluation`, as these methods are trained for the episodes that they are measured on.
    """

    inner_steps: Few = 5
    test_steps: Few = 10  # inner steps once it is trained
    rate: Positive = 0.01  # of the inner loop; with `metasgd-frozen`, where the learned rates start
    steps: Count = 60000
    batch: Few = 4  # tasks
    lr: Positive = 1e-3
    schedule: Literal["constant", "cosine"] = "constant"  # of lr, over all steps
    query: Few = 15
    validate_every: Count = 1000  # steps
    validation_episodes: Count = 100


class FrozenBaseline(InnerLoop):
    """anil-frozen and metasgd-frozen: a head on features of unit length, so other rates and far cheaper steps."""

    rate: Positive = 10.0
    steps: Count = 2000
    batch: Few = 32
    validate_every: Count = 200
    validation_episodes: Count = 600


class ImageBaseline(InnerLoop):
    """maml, fomaml and anil; the defaults are those of Finn et al. 2017 for mini-ImageNet 5-way 1-shot."""

    statistics: Literal["queries", "support"] = "queries"  # of BatchNorm on a query: all queries of the task, or none
    rotated_classes: bool = False  # each base class turned by 90, 180, 270 degrees counts as a further class
    augment: bool = False  # in training each image undergoes what `pretrain.augment` says
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # of convolutions in training; trained learners take fp32


class BaselinesConfig(Section):
    """What MetaDiff is measured beside; the penalties, for features of unit length, were best on validation classes."""

    logreg: Positive = 0.1  # penalty, 1 / C of scikit-learn
    ridge: Positive = 0.3  # penalty
    frozen: FrozenBaseline = FrozenBaseline()
    images: ImageBaseline = ImageBaseline()


class EvaluationConfig(Section):
    """Episodes of selection and of the final table."""

    way: Annotated[int, Field(ge=2, le=100_000)] = 5
    shot: Few = 1
    query: Few = 15
    episodes: Count = 1000
    card_shots: tuple[Count, ...] = ()  # further shots whose results the model card shows


class CardConfig(Section):
    """What only a person can say in the model card of a checkpoint; the rest of it is measured."""

    data: str = ""
    licence: str = ""
    limits: str = ""


class RuntimeConfig(Section):
    """The machine: never part of what identifies a result."""

    device: str = "auto"
    threads: Annotated[int, Field(ge=1, le=4096)] | None = None
    num_workers: Annotated[int, Field(ge=1, le=1024)] | None = None
    batch_size: Few | None = None  # images per forward pass of the frozen encoder; None: as suits the device


class Config(Section):
    """Everything that a run depends on."""

    name: str = "custom"
    kind: Literal["demo", "benchmark", "own"] = "own"
    summary: str = ""
    expect: str = ""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    encoder: Annotated[str, AfterValidator(_known_encoder)] = "conv4"
    data: DataConfig = DataConfig()
    pretrain: PretrainConfig = PretrainConfig()
    features: FeaturesConfig = FeaturesConfig()
    space: TaskSpaceConfig = TaskSpaceConfig()
    denoiser: DenoiserConfig = DenoiserConfig()
    metatrain: MetatrainConfig = MetatrainConfig()
    sampler: SamplerConfig = SamplerConfig()
    baselines: BaselinesConfig = BaselinesConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    card: CardConfig = CardConfig()
    runtime: RuntimeConfig = RuntimeConfig()
