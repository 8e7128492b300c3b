"""Encoding by onnxruntime, which is about three times as fast as torch on a CPU.

A graph takes normalised images (B, 3, S, S) of one side S to the groups of features (B, D). It is made once for each
encoder and side, and kept in a folder.
"""

import hashlib
import logging
import warnings
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from filelock import FileLock
from torch import Tensor, nn

from metadiff_cli.core.encoders.networks import Encoder
from metadiff_cli.errors import ConfigError, MetaDiffError
from metadiff_cli.files import atomic

OPSET = 18
AGREEMENT = 0.9999  # the lowest cosine between features of torch and of the graph
NEEDED = ("onnx", "onnxruntime", "onnxscript")


def can_make_graphs() -> bool:
    """Whether the packages of the extra [fast] are installed."""
    return all(find_spec(name) is not None for name in NEEDED)


class Graphs:
    """The graphs of one encoder on the CPU, as a function from normalised images (B, 3, S, S) to features (B, D)."""

    def __init__(self, encoder: Encoder, folder: Path) -> None:
        """`folder` keeps the graphs. Raises ConfigError if a package is missing."""
        missing = [name for name in NEEDED if find_spec(name) is None]
        if missing:
            raise ConfigError(
                f"encoding by onnxruntime needs {' and '.join(missing)}",
                hint="install the extra [fast]: pip install 'metadiff[fast]', or use --backend torch",
            )
        self.encoder, self.folder = encoder, folder
        self._sessions: dict[int, Any] = {}

    def __call__(self, images: Tensor) -> Tensor:
        """Features (B, D) of images (B, 3, S, S). Raises MetaDiffError if no graph can be made."""
        side = images.shape[-1]
        if side not in self._sessions:
            self._sessions[side] = self._open(side)
        (features,) = self._sessions[side].run(None, {"images": images.contiguous().numpy()})
        return torch.from_numpy(features)

    def made(self, side: int) -> bool:
        """Whether the graph for images of this side is in the folder."""
        return self._path(side).is_file()

    @cached_property
    def _digest(self) -> str:
        """A hash of the network and its weights."""
        digest = hashlib.sha256(f"{type(self.encoder).__qualname__} {OPSET}".encode())
        for name, tensor in sorted(self.encoder.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:32]

    def _path(self, side: int) -> Path:
        return self.folder / f"{self._digest}-{side}.onnx"

    def _open(self, side: int) -> Any:
        path = self._path(side)
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if not path.is_file():
                with atomic(path) as temporary:
                    _export(self.encoder, side, temporary)
                    _check(self.encoder, side, _session(temporary))
        return _session(path)


class _Describing(nn.Module):
    """`describe` as the `forward` that the exporter traces."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder.eval()

    def forward(self, images: Tensor) -> Tensor:
        return self.encoder.describe(images)


def _export(encoder: Encoder, side: int, path: Path) -> None:
    """Write the graph. Raises MetaDiffError."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program: Any = torch.onnx.export(
                _Describing(encoder), (torch.zeros(2, 3, side, side),), dynamo=True, verbose=False, opset_version=OPSET,
                input_names=["images"], output_names=["features"],
                dynamic_shapes={"images": {0: torch.export.Dim("batch")}}, external_data=False,
            )  # fmt: skip
        program.save(str(path), external_data=False)
    except Exception as error:  # the exporter raises whatever its passes raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise MetaDiffError(
            f"no graph can be made of this encoder ({reason:.200})", hint="use --backend torch"
        ) from error
    finally:
        log.setLevel(level)


def _check(encoder: Encoder, side: int, session: Any) -> None:
    """Raise MetaDiffError unless a graph gives the features that torch gives."""
    images = torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        ours = encoder.describe(images)
    theirs = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    if not bool((F.cosine_similarity(ours, theirs, dim=1) > AGREEMENT).all()):
        raise MetaDiffError(
            "the features of the graph differ from those of torch", hint="use --backend torch, or a newer onnxruntime"
        )


def _session(path: Path) -> Any:
    runtime = import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.enable_cpu_mem_arena = False  # memory is given back: batches differ in size
    return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
