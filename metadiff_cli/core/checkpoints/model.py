"""From encoders and full models to checkpoint files, and back.

What a header holds is decided in three places. file.py gives the kind and the format. Here, `image_header` gives what
reading an encoder needs (`encoder`, `encoder_sha256`, `image`), and `model_header` adds that of a full model (`metric`,
`tuning`, `most_shots`). All else is the `header` that the caller of `save_model` or `save_encoder` gives: `denoiser`
(the settings that its network is built by), `classes`, `config`, `controls` (what was fitted for each control),
`metrics`, `card`. headers.py checks what is read; what a saved classifier adds is in classifier.py.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metadiff_cli.config.schema import ENCODERS, LITE, DenoiserConfig, is_pretrained
from metadiff_cli.core.checkpoints.file import (
    KINDS,
    Checkpoint,
    load_checkpoint,
    reason_of,
    save_checkpoint,
)
from metadiff_cli.core.checkpoints.headers import EncoderHeader, ImageHeader, MetricHeader, ModelHeader
from metadiff_cli.core.encoders.image_encoder import ImageEncoder
from metadiff_cli.core.encoders.library import build_pretrained, pretrained_encoder
from metadiff_cli.core.encoders.networks import Encoder, build_encoder
from metadiff_cli.core.method.adapt import MetaDiff, TaskClassifier
from metadiff_cli.core.method.denoisers import build_denoiser
from metadiff_cli.core.method.metric import Metric
from metadiff_cli.core.method.task_space import TaskSpace
from metadiff_cli.errors import CheckpointError, ConfigError, MetaDiffError

# in the messages of errors that are not the file's fault: of missing drivers and of memory that does not suffice
MACHINE = ("CUDA", "NVIDIA", "HIP", "MPS", "allocate memory", "out of memory")


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
        """Probabilities (Q, N) of features (Q, D)."""
        return self.task.probabilities(self.task.metric.expand(features).unsqueeze(0))[0]


def save_encoder(path: Path, images: ImageEncoder, header: dict[str, Any]) -> None:
    """Write an encoder that metadiff did not train; `header` says where its weights come from. Raises OSError."""
    tensors = {} if named_weights(images) else encoder_tensors(images)
    save_checkpoint(path, "encoder", tensors, {**header, **image_header(images, named_weights(images))})


def load_encoder(
    path: Path, device: torch.device, *, views: int, shift: int = 0, half: bool = False, size: int | None = None
) -> ImageEncoder:
    """The encoder of an encoder file or of a full model, with the given views.

    With `half`, its matrices are rounded to what fp16 can hold. `size` is the side of the images in pixels, if it is
    not that of the file. Raises CheckpointError for a file without an encoder, ConfigError if the size of the features
    depends on `size`.
    """
    checkpoint = load_checkpoint(path)
    if checkpoint.kind == "state":
        raise CheckpointError(
            f"{path} is the state of an unfinished training", hint="give encoder.safetensors beside it"
        )
    if not checkpoint.part("encoder") and not checkpoint.header.get("encoder_sha256"):
        raise CheckpointError(f"{path} holds no encoder of its own", hint=f"give {KINDS['encoder']}")
    images = replace(image_encoder(checkpoint, device), views=views, shift=shift)
    if half and checkpoint.part("encoder"):
        with torch.no_grad():
            for weights in images.encoder.parameters():
                weights.copy_(weights.half() if weights.dim() > 1 else weights)
    return images if size is None else resized(images, size)


def resized(images: ImageEncoder, size: int) -> ImageEncoder:
    """The same encoder for images of `size` pixels. Raises ConfigError if the size of its features depends on that."""
    if images.encoder.groups(size) != images.groups:
        raise ConfigError(
            f"{images.name} has other features at {size} pixels than at {images.size}",
            hint="leave features.size out, or use an encoder that averages its last maps, as resnet10",
        )
    return replace(images, size=size)


def save_model(path: Path, images: ImageEncoder, metadiff: MetaDiff, header: dict[str, Any]) -> None:
    """Write a full model; `header` has the settings of its denoiser, its base classes, configuration and metrics.

    Raises OSError.
    """
    named = named_weights(images)
    tensors = {} if named else encoder_tensors(images)
    tensors |= metadiff_tensors(metadiff)
    save_checkpoint(path, "model", tensors, {**header, **model_header(images, metadiff), **image_header(images, named)})


def load_model(path: Path, device: torch.device) -> Model:
    """Read a full model. Raises CheckpointError for any other file."""
    return model_of(load_checkpoint(path, "model"), device)


def model_of(checkpoint: Checkpoint, device: torch.device) -> Model:
    """The model in a checkpoint that was read. Raises CheckpointError if tensors and header do not fit each other."""
    with checkpoint_errors(checkpoint.path):
        header = ModelHeader.of(checkpoint.header)
        images = image_encoder(checkpoint, device)
        metric = metric_of(checkpoint, header.metric, images)
        denoiser = _denoiser(header.denoiser, checkpoint.part("denoiser"), images.feature_size, metric).to(device)
        learned = header.denoiser.kind != "analytic"
        targets = checkpoint.tensors.get("targets")
        if targets is not None:
            check_tensor("targets", targets, (len(targets), images.feature_size))
            targets = targets.float().to(device)
        metadiff = MetaDiff(metric, denoiser, learned, header.tuning.tuning(), targets, most_shots=header.most_shots)
        return Model(images, metadiff, checkpoint.header)


def model_tensors(images: ImageEncoder, metadiff: MetaDiff) -> dict[str, Tensor]:
    """The tensors of a model that adaptation, prediction and rejection need, by name, with those of its encoder."""
    return encoder_tensors(images) | metadiff_tensors(metadiff)


def metadiff_tensors(metadiff: MetaDiff) -> dict[str, Tensor]:
    """The tensors of a MetaDiff by name."""
    tensors: dict[str, Tensor] = {}
    space = metadiff.metric.space
    if metadiff.targets is not None:
        tensors["targets"] = metadiff.targets
    if space is not None:
        tensors |= {f"space.{n}": t for n, t in space.tensors().items()}
    return _compact(tensors) | {f"denoiser.{n}": t for n, t in metadiff.denoiser.state_dict().items()}


def model_header(images: ImageEncoder, metadiff: MetaDiff) -> dict[str, Any]:
    """The part of a model's header that this module decides: encoder, images, metric, tuning, most shots."""
    metric = metadiff.metric
    described = {"groups": list(metric.groups), "plain": metric.plain, "whitened": metric.space is not None}
    return {
        **image_header(images), "metric": described, "tuning": asdict(metadiff.tuning),
        "most_shots": metadiff.most_shots,
    }  # fmt: skip


def encoder_tensors(images: ImageEncoder) -> dict[str, Tensor]:
    """The encoder's tensors by name; a matrix that fp16 holds exactly is stored so, in half the space."""
    return _compact({f"encoder.{n}": t for n, t in images.encoder.state_dict().items()})


def _compact(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.half() if t.dim() > 1 and torch.equal(t.half().float(), t) else t for n, t in tensors.items()}


def named_weights(images: ImageEncoder) -> str | None:
    """The sha256 of the installed file that an encoder's weights come from; None if a checkpoint has to hold them."""
    found: str | None = getattr(images.encoder, "sha256", None)
    return found


def image_header(images: ImageEncoder, sha256: str | None = None) -> dict[str, Any]:
    """The part of a header that this module decides for any file with an encoder: its name, and how it sees images.

    `sha256` is that of the file that the weights are read from, where the checkpoint does not hold them.
    """
    image = {"size": images.size, "mean": list(images.mean), "std": list(images.std)}
    image |= {"views": images.views, "shift": images.shift}
    return {"encoder": images.name, "image": image, "encoder_sha256": sha256}


def image_encoder(checkpoint: Checkpoint, device: torch.device) -> ImageEncoder:
    """The encoder in a checkpoint that was read, with the views of its header. Raises CheckpointError."""
    with checkpoint_errors(checkpoint.path):
        header = EncoderHeader.of(checkpoint.header)
        if header.encoder_sha256 is not None:
            encoder = _installed(header)
        else:
            encoder = _network(header, checkpoint.part("encoder"))
            encoder.load_state_dict(checkpoint.part("encoder"))
        encoder.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        return described_encoder(checkpoint.header, encoder, device)


def _installed(header: EncoderHeader) -> Encoder:
    """The encoder whose weights are installed. Raises ValueError for other weights than the checkpoint names."""
    if header.encoder not in LITE:
        raise ValueError(f"{header.encoder!r:.80} has no installed weights")
    encoder = pretrained_encoder(header.encoder, header.image.size)
    if encoder.sha256 != header.encoder_sha256:
        raise ValueError(f"it needs weights of {header.encoder} whose sha256 begins with {header.encoder_sha256:.8}")
    return encoder


def described_encoder(header: Mapping[str, Any], encoder: Encoder, device: torch.device) -> ImageEncoder:
    """An encoder with what a header says about its images. Raises ValueError."""
    image = ImageHeader.of(header["image"])
    return ImageEncoder(encoder, header["encoder"], image.size, image.mean, image.std, image.views, device, image.shift)


def metric_of(checkpoint: Checkpoint, header: MetricHeader, images: ImageEncoder) -> Metric:
    """The metric in a checkpoint that was read. Raises ValueError if it is not one for the features of `images`."""
    if header.groups != images.groups:
        raise ValueError(f"groups of features of sizes {header.groups}, where the encoder has {images.groups}")
    if not header.plain and not header.whitened:
        raise ValueError("a metric without parts")
    if not header.whitened:
        return Metric(header.groups)
    parts = checkpoint.part("space")
    for name in ("mean", "precision"):
        check_tensor(f"space.{name}", parts[name], (images.feature_size,))
    for number, size in enumerate(header.groups):
        check_tensor(f"space.basis.{number}", parts[f"basis.{number}"], (size, size))
    return Metric(header.groups, TaskSpace.from_tensors(parts).to(images.device), header.plain)


def check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless a tensor has floating-point numbers and that shape."""
    if tuple(tensor.shape) != shape or not tensor.is_floating_point():
        raise ValueError(f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}, not of shape {shape}")


def _network(header: EncoderHeader, tensors: Mapping[str, Tensor]) -> Encoder:
    """The encoder that the header names, with random weights. Raises ValueError."""
    if header.encoder in ENCODERS:
        return build_encoder(header.encoder)
    if not is_pretrained(header.encoder):
        raise ValueError(f"an unknown encoder {header.encoder!r:.80}")
    return build_pretrained(header.encoder, header.image.size, tensors)


def _denoiser(settings: DenoiserConfig, tensors: dict[str, Tensor], size: int, metric: Metric) -> nn.Module:
    """The denoiser in a file, for feature size D and the task space of the metric.

    Its shapes are compared on the meta device first: settings may ask for terabytes. Raises ValueError.
    """

    with torch.device("meta"):
        shaped = build_denoiser(settings.kind, size, settings.width)
    wanted = {name: tensor.shape for name, tensor in shaped.state_dict().items()}
    found = {name: tensor.shape for name, tensor in tensors.items()}
    odd = sorted(name for name in {*wanted, *found} if wanted.get(name) != found.get(name))
    if odd:
        raise ValueError(f"its denoiser is another one, see {odd[0]}")
    denoiser = build_denoiser(settings.kind, size, settings.width, metric.space)
    denoiser.load_state_dict(tensors)
    return denoiser.eval()


class checkpoint_errors:
    """Within it, a header that lacks a field, or tensors that do not fit it, raise CheckpointError.

    What is no fault of the file stays what it is: memory that does not suffice, and a GPU that cannot be used, raise
    MetaDiffError.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, KeyError | TypeError | ValueError | RuntimeError | AttributeError | IndexError):
            return
        if isinstance(error, RuntimeError) and any(sign in str(error) for sign in MACHINE):
            raise MetaDiffError(reason_of(error), hint="try --device cpu, or a machine with more memory") from error
        raise CheckpointError(
            f"{self.path} does not hold what its header says ({reason_of(error)})",
            hint="copy it again, or make it again",
        ) from error
