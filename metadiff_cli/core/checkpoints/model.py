"""From parts to checkpoint files and back: encoders, full models, adapted classifiers."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metadiff_cli.config.schema import is_pretrained
from metadiff_cli.core.checkpoints.file import KINDS, Checkpoint, load_checkpoint, save_checkpoint
from metadiff_cli.core.checkpoints.headers import check_denoiser, check_image, check_tuning
from metadiff_cli.core.encoders.bank import ImageEncoder
from metadiff_cli.core.encoders.networks import ENCODERS, Encoder, build_encoder
from metadiff_cli.core.encoders.pretrained import build_pretrained
from metadiff_cli.core.method.adapt import MetaDiff, TaskClassifier, Tuning
from metadiff_cli.core.method.calibration import TaskTable
from metadiff_cli.core.method.denoisers import build_denoiser
from metadiff_cli.core.method.domain import Usual
from metadiff_cli.core.method.guidance import PoolGuidance
from metadiff_cli.core.method.metric import Calibration, Rejection
from metadiff_cli.core.method.task_space import TaskSpace
from metadiff_cli.errors import CheckpointError, ConfigError


@dataclass(frozen=True)
class Model:
    """What `adapt` and `evaluate` need, and the header of the file it came from."""

    images: ImageEncoder
    metadiff: MetaDiff
    header: dict[str, Any]


@dataclass(frozen=True)
class SavedClassifier:
    """A classifier of one task (B = 1) with its encoder and the names of its classes."""

    images: ImageEncoder
    task: TaskClassifier
    classes: tuple[str, ...]

    def probabilities(self, features: Tensor) -> Tensor:
        """(Q, N) of features (Q, D)."""
        return self.task.probabilities(features.unsqueeze(0))[0]


def load_encoder(
    path: Path, device: torch.device, *, mirror: bool, shift: int = 0, half: bool = False, size: int | None = None
) -> ImageEncoder:
    """The encoder of an encoder file or of a full model.

    With `half`, its matrices are rounded to what fp16 can hold. `size` is the side of the images in pixels where it is
    not that of training; raises ConfigError when the features' size depends on it.
    """
    checkpoint = load_checkpoint(path)
    if checkpoint.kind == "state":
        raise CheckpointError(
            f"{path} is the state of an unfinished training", hint="give encoder.safetensors beside it"
        )
    if not checkpoint.part("encoder"):
        raise CheckpointError(f"{path} holds no encoder of its own", hint=f"give {KINDS['encoder']}")
    images = image_encoder(checkpoint, device, mirror, shift)
    if half:
        with torch.no_grad():
            for weights in images.encoder.parameters():
                weights.copy_(weights.half() if weights.dim() > 1 else weights)
    return images if size is None else resized(images, size)


def resized(images: ImageEncoder, size: int) -> ImageEncoder:
    """The same encoder for images of `size` pixels. Raises ConfigError when its features depend on that."""
    if images.encoder.feature_size(size) != images.feature_size:
        raise ConfigError(
            f"{images.name} has other features at {size} pixels than at {images.size}",
            hint="leave features.size out, or use an encoder that averages its last maps, as resnet10",
        )
    return replace(images, size=size)


def save_model(path: Path, images: ImageEncoder, metadiff: MetaDiff, header: dict[str, Any]) -> None:
    """Write a full model; `header` says whose denoiser it is, the base classes, configuration and metrics."""
    save_checkpoint(path, "model", model_tensors(images, metadiff), {**header, **model_header(images, metadiff)})


def load_model(path: Path, device: torch.device) -> Model:
    """Read a full model. Raises CheckpointError for anything else."""
    return model_of(load_checkpoint(path, "model"), device)


def model_tensors(images: ImageEncoder, metadiff: MetaDiff) -> dict[str, Tensor]:
    """What adaptation, prediction and rejection need of a model, by name."""
    tensors = encoder_tensors(images)
    if metadiff.targets is not None:
        tensors["targets"] = metadiff.targets
    tensors |= {f"space.{n}": t for n, t in metadiff.space.tensors().items()}
    return tensors | {f"denoiser.{n}": t for n, t in metadiff.denoiser.state_dict().items()}


def model_header(images: ImageEncoder, metadiff: MetaDiff) -> dict[str, Any]:
    """What a header says of a model, besides which denoiser it has and where it comes from."""
    return {**image_header(images), "tuning": asdict(metadiff.tuning)}


def model_of(checkpoint: Checkpoint, device: torch.device) -> Model:
    """The model in a file that was read. Raises CheckpointError when tensors and header do not fit."""
    header = checkpoint.header
    with checkpoint_errors(Path(checkpoint.path)):
        images = image_encoder(checkpoint, device, *views_of(header["image"]))
        space = space_of(checkpoint, images)
        denoiser = _denoiser(checkpoint, images.feature_size).to(device)
        learned = header["denoiser"]["kind"] != "analytic"
        targets = checkpoint.tensors.get("targets")
        if targets is not None and targets.shape != (len(targets), images.feature_size):
            raise ValueError(f"training weights of shape {tuple(targets.shape)}")
        targets = None if targets is None else targets.to(device)
        metadiff = MetaDiff(space, denoiser, learned, Tuning(), targets).tuned(tuning_from(header["tuning"]))
        return Model(images, metadiff, header)


def tuning_from(values: dict[str, Any]) -> Tuning:
    """Tuning from a checkpoint's header; older files lack what was fitted later."""
    check_tuning(values)
    calibrations = {key: Calibration.from_dict(values[key]) for key in ("calibration", "prototype_calibration")}
    usual = values.get("usual")
    if usual is not None:
        usual = Usual(TaskTable.from_dict(usual["shift"]), float(usual["deviation"]))
    rejection = values.get("rejection")
    parts = {
        **calibrations,
        "rejection": None if rejection is None else Rejection.from_dict(rejection),
        "shared": values.get("shared", 0.0),
        "usual": usual,
        "pool": PoolGuidance(**values["pool"]),
    }
    return Tuning(**{**values, **parts})


def space_of(checkpoint: Checkpoint, images: ImageEncoder) -> TaskSpace:
    """The task space in a file that was read."""
    space = TaskSpace.from_tensors(checkpoint.part("space")).to(images.device)
    if len(space.mean) != images.feature_size:
        raise ValueError("its task space is of another encoder")
    return space


def _denoiser(checkpoint: Checkpoint, size: int) -> nn.Module:
    settings = checkpoint.header["denoiser"]

    def build() -> nn.Module:
        return build_denoiser(settings["kind"], size, settings["width"])

    check_denoiser(settings, checkpoint.part("denoiser"), build)
    denoiser = build()
    denoiser.load_state_dict(checkpoint.part("denoiser"))
    return denoiser.eval()


def views_of(image: dict[str, Any]) -> tuple[bool, int]:
    """Whether mirror images are views, and the shift of moved ones, which older headers do not know."""
    return bool(image["mirror"]), image.get("shift", 0)


def image_encoder(checkpoint: Checkpoint, device: torch.device, mirror: bool, shift: int = 0) -> ImageEncoder:
    """The encoder in a file that was read."""
    with checkpoint_errors(Path(checkpoint.path)):
        encoder = _network(checkpoint)
        encoder.load_state_dict(checkpoint.part("encoder"))
        encoder.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        return described_encoder(checkpoint.header, encoder, device, mirror=mirror, shift=shift)


def _network(checkpoint: Checkpoint) -> Encoder:
    """The encoder that the header names, with random weights."""
    name, image = checkpoint.header["encoder"], checkpoint.header["image"]
    if name in ENCODERS:
        return build_encoder(name)
    if not is_pretrained(name):
        raise ValueError(f"an unknown encoder {name!r:.80}")
    check_image(image)
    return build_pretrained(name, image["size"], checkpoint.part("encoder"))


def save_encoder(path: Path, images: ImageEncoder, header: dict[str, Any]) -> None:
    """Write an encoder that is not ours; `header` says where its weights come from."""
    save_checkpoint(path, "encoder", encoder_tensors(images), {**header, **image_header(images)})


def described_encoder(
    header: dict[str, Any], encoder: Encoder, device: torch.device, *, mirror: bool, shift: int = 0
) -> ImageEncoder:
    """An encoder with what a header says about its images."""
    image = header["image"]
    check_image(image)
    mean, std = tuple(map(float, image["mean"])), tuple(map(float, image["std"]))
    return ImageEncoder(encoder, header["encoder"], int(image["size"]), mean, std, mirror, device, shift)


def encoder_tensors(images: ImageEncoder) -> dict[str, Tensor]:
    """The encoder's tensors by name; a matrix that fp16 holds exactly is stored so, in half the space."""
    tensors = {f"encoder.{n}": t for n, t in images.encoder.state_dict().items()}
    return {n: t.half() if t.dim() > 1 and torch.equal(t.half().float(), t) else t for n, t in tensors.items()}


def image_header(images: ImageEncoder) -> dict[str, Any]:
    """What a header says of an encoder and its images."""
    image = {"size": images.size, "mean": list(images.mean), "std": list(images.std), "mirror": images.mirror}
    image |= {"shift": images.shift} if images.shift else {}
    return {"encoder": images.name, "image": image}


class checkpoint_errors:
    """A header that lacks a field, or tensors that do not fit it, is a damaged checkpoint, not our crash."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, KeyError | TypeError | ValueError | RuntimeError | AttributeError):
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(
                f"{self.path} does not hold what its header says ({reason})", hint="copy it again, or make it again"
            ) from error
