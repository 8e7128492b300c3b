"""A classifier that `metadiff export` wrote, run by onnxruntime: pixels in, probabilities and margins out. No torch."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from metadiff_cli.core.checkpoints.facts import MARGINS, PROBABILITIES, Facts
from metadiff_cli.core.encoders.session import open_session
from metadiff_cli.data.scan import suggestion
from metadiff_cli.errors import CheckpointError, ConfigError, DataError

BATCH, PIXELS = 32, 60_000  # images and pixels of a pass, without their views: of more, a CPU's cache holds nothing
EXPORT = "write it anew from the saved classifier: metadiff export FILE.safetensors --onnx FILE.onnx"


class ExportedClassifier:
    """The graph in a file, with the facts in its metadata; `batch` images at a time suit it."""

    def __init__(self, path: Path, *, threads: int | None = None, batch: int | None = None) -> None:
        """Without `threads`, as many as onnxruntime takes.

        Raises ConfigError if onnxruntime is not installed, and CheckpointError for a file of another kind.
        """
        if not os.path.lexists(path):
            raise CheckpointError(f"{path} does not exist", hint=f"{suggestion(path)}check the path")
        try:
            self.session = open_session(path, threads or 0, waits=True)
        except ImportError as error:
            raise ConfigError(
                f"{path} needs onnxruntime, which is not installed",
                hint="install the extra [fast]: pip install 'metadiff[fast]', or give the .safetensors classifier",
            ) from error
        except Exception as error:  # onnxruntime has a class of its own for each reason
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise CheckpointError(f"{path} is not an ONNX graph, or damaged ({reason:.200})", hint=EXPORT) from error
        self.facts = self._facts(path)
        self.size = self.facts.size
        self.batch = batch or max(1, min(BATCH, PIXELS // self.size**2))

    def _facts(self, path: Path) -> Facts:
        """What the file says of itself, once it is known to be true of its graph. Raises CheckpointError."""
        metadata = self.session.get_modelmeta().custom_metadata_map
        if not {"classes", "metadiff"} <= metadata.keys():
            raise CheckpointError(f"{path} is an ONNX graph of another program", hint=EXPORT)
        try:
            facts = Facts.of(metadata)
            self._check(facts)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} was exported by another version of metadiff", hint=EXPORT) from error
        return facts

    def _check(self, facts: Facts) -> None:
        """Raise ValueError if inputs and outputs of the graph are not those that the facts tell of."""
        found = {tensor.name: tensor.shape[1:] for tensor in (*self.session.get_inputs(), *self.session.get_outputs())}
        wanted: dict[str, list[int]] = {"pixels": [facts.size, facts.size, 3], PROBABILITIES: [len(facts.classes)]}
        if facts.rejection is not None:
            wanted[MARGINS] = []
        if found != wanted:
            raise ValueError(f"its graph has {found}, not {wanted}")

    def __call__(self, pixels: np.ndarray) -> list[tuple[list[float], float | None]]:
        """Probabilities (N,) and margin in nats of each image of pixels (n, S, S, 3) uint8.

        The margin is None where the checkpoint has no threshold. Raises DataError for numbers that are not finite.
        """
        outputs: list[Any] = self.session.run(None, {"pixels": pixels})
        if not all(np.isfinite(output).all() for output in outputs):
            raise DataError("the classifier gives numbers that are not finite", hint=EXPORT)
        probabilities, *margins = (output.tolist() for output in outputs)
        return list(zip(probabilities, margins[0] if margins else [None] * len(pixels), strict=True))
