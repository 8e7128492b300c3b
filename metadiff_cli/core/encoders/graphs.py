"""Networks as ONNX graphs: made by torch's exporter, and encoding by onnxruntime.

On a CPU onnxruntime encodes about three times as fast as torch. A graph takes normalised images (B, 3, S, S) of one
side S to the groups of features (B, D). It is made once for each encoder and side, and kept in a folder.
"""

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from filelock import FileLock
from torch import Tensor, nn

from metadiff_cli.core.encoders.networks import Encoder, weights_digest
from metadiff_cli.core.encoders.session import RUNTIME, open_session
from metadiff_cli.errors import ConfigError, MetaDiffError
from metadiff_cli.files import atomic

OPSET = 18  # the oldest that torch's exporter writes, and so the most widely read
VERSION = 1  # of `describe` of the encoders: a change of it makes the graphs anew
AGREEMENT = 0.9999  # the lowest cosine between features of torch and of the graph
EXPORTER = ("onnx", "onnxscript")


def missing_packages(names: Sequence[str] = (*EXPORTER, RUNTIME)) -> list[str]:
    """Those of the packages that are not installed."""
    return [name for name in names if find_spec(name) is None]


def graph_of(network: nn.Module, example: Tensor, inputs: str, outputs: Sequence[str], *, what: str, hint: str) -> Any:
    """The ONNX program of a network, for any number of inputs like `example` (B, ...), with names for all of them.

    Raises MetaDiffError, which names `what` the network is, and gives the `hint`.
    """
    try:
        with _silent_exporter():
            return torch.onnx.export(
                network.eval(), (example,), dynamo=True, verbose=False, opset_version=OPSET, external_data=False,
                input_names=[inputs], output_names=list(outputs), dynamic_shapes=({0: torch.export.Dim("batch")},),
            )  # fmt: skip
    except Exception as error:  # the exporter raises whatever its passes raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise MetaDiffError(f"{what} cannot be exported to ONNX ({reason:.200})", hint=hint) from error


@contextmanager
def _silent_exporter() -> Iterator[None]:
    """Hide what the exporter tells of itself."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


class Graphs:
    """The graphs of one encoder on the CPU, as a function from normalised images (B, 3, S, S) to features (B, D)."""

    def __init__(
        self, encoder: Encoder, folder: Path, note: Callable[[str], None] = lambda text: None, *, required: bool = True
    ) -> None:
        """`folder` keeps the graphs. Where they are not `required`, torch encodes if no graph can be made.

        `note` is told of both. Raises ConfigError if a package is missing.
        """
        if missing := missing_packages():
            raise ConfigError(
                f"encoding by onnxruntime needs {' and '.join(missing)}",
                hint="install the extra [fast]: pip install 'metadiff[fast]', or use --backend torch",
            )
        self.encoder, self.folder, self.note, self.required = encoder, folder, note, required
        self._sessions: dict[int, Any] = {}  # by the side of images; None: torch encodes these

    def __call__(self, images: Tensor) -> Tensor:
        """Features (B, D) of images (B, 3, S, S).

        Raises MetaDiffError if a graph is required and cannot be made, and OSError if it cannot be written.
        """
        side = images.shape[-1]
        if side not in self._sessions:
            self._sessions[side] = self._session(side)
        session = self._sessions[side]
        if session is None:
            return self.encoder.describe(images)
        (features,) = session.run(None, {"images": images.contiguous().numpy()})
        return torch.from_numpy(features)

    def made(self, sides: Sequence[int]) -> bool:
        """Whether the graphs for images of these sides are in the folder."""
        return all(self._path(side).is_file() for side in sides)

    @cached_property
    def _digest(self) -> str:
        return weights_digest(self.encoder, f"{VERSION} {type(self.encoder).__qualname__} {OPSET}")

    def _path(self, side: int) -> Path:
        return self.folder / f"{self._digest}-{side}.onnx"

    def _session(self, side: int) -> Any:
        """The session for images of a side; None where there is none and none is required."""
        try:
            return self._open(side)
        except (MetaDiffError, OSError) as error:
            if self.required:
                raise
            self.note(f"encoding by torch: {error}")
            return None

    def _open(self, side: int) -> Any:
        path = self._path(side)
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if path.is_file():
                try:
                    return open_session(path, torch.get_num_threads())
                except Exception:  # of a damaged file; it can be made again, whatever onnxruntime says of it
                    path.unlink()
            self.note(f"making a graph of the encoder for images of {side} pixels; it is kept")
            with atomic(path) as temporary:
                self._make(side, temporary)
            return open_session(path, torch.get_num_threads())

    def _make(self, side: int, path: Path) -> None:
        """Write the graph, which has to give the features that torch gives. Raises MetaDiffError."""
        hint = "use --backend torch"
        network, example = _Describing(self.encoder), torch.zeros(2, 3, side, side)
        program = graph_of(network, example, "images", ["features"], what="this encoder", hint=hint)
        program.save(str(path), external_data=False)
        images = torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            ours = self.encoder.describe(images)
        theirs = torch.from_numpy(open_session(path, torch.get_num_threads()).run(None, {"images": images.numpy()})[0])
        if not bool((F.cosine_similarity(ours, theirs, dim=1) > AGREEMENT).all()):
            raise MetaDiffError("the features of the graph differ from those of torch", hint=hint)


class _Describing(nn.Module):
    """`describe` as the `forward` that the exporter traces."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> Tensor:
        return self.encoder.describe(images)
