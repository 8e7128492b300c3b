"""What a run starts from: files, data, settings. A run that goes on has to start from the same."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metadiff_cli.commands.train.resume import depends, file_digest
from metadiff_cli.config.schema import Config
from metadiff_cli.errors import ConfigError

if TYPE_CHECKING:
    from metadiff_cli.commands.train.run_folder import Source
    from metadiff_cli.core.encoders.image_encoder import ImageEncoder
    from metadiff_cli.core.training.metatrain import MetaTrainer


@dataclass(frozen=True)
class Start:
    """Files that `metatrain` starts from: an encoder that stays as it is, and weights that training goes on with.

    An encoder file as `init` starts the training of the encoder. A checkpoint gives its encoder, unless there is
    another, and starts the training of the denoiser.
    """

    encoder: Path | None = None
    init: Path | None = None
    checkpoint: bool = False  # whether `init` is one

    @classmethod
    def of(cls, encoder: Path | None, init: Path | None, method: str) -> "Start":
        """Raises ConfigError when nothing would start from `init`."""
        from metadiff_cli.core.checkpoints.file import read_header

        checkpoint = init is not None and read_header(init)["kind"] == "model"
        if checkpoint and method != "metadiff":
            raise ConfigError(f"--method {method} cannot start from {init}", hint="leave out --init-from")
        if init is not None and not checkpoint and encoder is not None:
            raise ConfigError(
                f"no encoder is trained that could start from {init}", hint="leave out --encoder or --init-from"
            )
        return cls(encoder or (init if checkpoint else None), init, checkpoint)

    def identity(
        self, config: Config, method: str, source: "Source", frozen: "ImageEncoder | None" = None
    ) -> dict[str, Any]:
        """All that the result of a training depends on; `frozen` is its encoder where it does not train that."""
        return depends(
            config,
            method=method,
            train=source.split("train").key,
            val=source.split("val").key if source.has("val") else None,
            frozen=frozen.key[:12] if frozen else None,
            init=file_digest(self.init),
        )

    def begin(self, trainer: "MetaTrainer", config: Config) -> None:
        """Let the training of a denoiser begin with that of the checkpoint `init`, if it is one.

        Raises ConfigError when it has none that this training could go on with.
        """
        import torch

        from metadiff_cli.core.checkpoints.model import load_model

        if self.init is None or not self.checkpoint:
            return
        model = load_model(self.init, torch.device("cpu"))
        kind = model.header["denoiser"]["kind"]
        if kind == "analytic":
            raise ConfigError(
                f"{self.init} holds no trained denoiser", hint=f"give --encoder {self.init} to start from its encoder"
            )
        try:
            if kind != config.denoiser.kind:
                raise ValueError(f"a denoiser of kind {kind}")
            trainer.start_from(model.metadiff.denoiser)
        except ValueError as error:
            raise ConfigError(
                f"{self.init} holds {error}", hint="give its --set denoiser.kind, denoiser.width and denoiser.depth"
            ) from error


def encoder_weights(init: Path, name: str) -> dict[str, Any]:
    """The weights of the encoder in a file. Raises ConfigError when it is another one than `name`."""
    import torch

    from metadiff_cli.core.checkpoints.model import load_encoder

    found = load_encoder(init, torch.device("cpu"), mirror=False)
    if found.name != name:
        raise ConfigError(f"{init} holds a {found.name}, not a {name}", hint=f"give --encoder {found.name}")
    weights: dict[str, Any] = found.encoder.state_dict()
    return weights
