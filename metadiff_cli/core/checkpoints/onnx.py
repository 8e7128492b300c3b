"""A saved classifier as one ONNX graph, from pixels to class probabilities, for runtimes without Python or torch.

Input `pixels` (n, S, S, 3) uint8: RGB images as decoders give them, the central square of each resized to S x S. What
follows (normalisation, both mirror views, encoder, classifier, calibrated softmax) is in the graph. Output
`probabilities` (n, N) float32, columns in the order of the classes. The file's metadata has two entries:
`classes`, a JSON list, and `metadiff`, JSON with image size, logit scale, guidance and the package's version.
"""

import json
import math
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metadiff_cli import __version__
from metadiff_cli.core.checkpoints.model import SavedClassifier, image_header
from metadiff_cli.errors import ConfigError, MetaDiffError
from metadiff_cli.files import atomic

OPSET = 18  # the oldest that torch's exporter writes: what is most widely read
TOLERANCE = 1e-4  # between our probabilities and those of the graph
MAX_BYTES = 2**31 - 2**24  # of weights in one protobuf file, which ends at 2 GiB
TRIED = 3  # random images that the graph is tried on; another number than the one it was traced with


class PixelClassifier(nn.Module):
    """Pixels (n, S, S, 3) uint8 -> probabilities (n, N): the classifier as the exporter sees it."""

    def __init__(self, classifier: SavedClassifier) -> None:
        super().__init__()
        self.encoder = classifier.images.encoder.eval()  # its parameters become the graph's
        self.classifier = classifier

    def forward(self, pixels: Tensor) -> Tensor:
        z = self.classifier.images.traceable(pixels)  # (n, D)
        return self.classifier.task.traceable(z.unsqueeze(0))[0]


def require_exporter() -> None:
    """Raise ConfigError when the packages of the extra [onnx] are missing."""
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"export needs {' and '.join(missing)}, which are not installed",
            hint=f"install the extra [onnx]: pip install {' '.join(missing)}",
        )


def export_onnx(classifier: SavedClassifier, path: Path) -> float | None:
    """Write the graph to `path`; the largest difference to our probabilities, or None without onnxruntime.

    The classifier is on the CPU. Raises MetaDiffError, and writes nothing, for an encoder that ONNX cannot hold and
    when the difference on random images is above TOLERANCE.
    """
    size = sum(t.numel() * t.element_size() for t in classifier.images.encoder.state_dict().values())
    if size > MAX_BYTES:
        raise MetaDiffError(
            f"{classifier.images.name} has {size / 1e9:.1f} GB of weights, and one ONNX file holds 2 GB",
            hint="export a classifier with a smaller encoder",
        )
    program = _traced(classifier)
    program.model.metadata_props.update(metadata(classifier))
    with atomic(path) as temporary:
        program.save(str(temporary), external_data=False)
        return _difference(classifier, temporary)


def metadata(classifier: SavedClassifier) -> dict[str, str]:
    """What the file says about itself."""
    task = classifier.task
    facts = {
        "package": __version__,
        "input": "pixels (n, S, S, 3) uint8 RGB, the central square of an upright image resized to S = image.size",
        "output": "probabilities (n, N), columns in the order of classes",
        **image_header(classifier.images),
        "calibration": {"scale": task.scale, "guidance": task.single_guidance()},
    }
    classes = list(classifier.classes)
    return {"classes": json.dumps(classes, ensure_ascii=False), "metadiff": json.dumps(facts, sort_keys=True)}


def _traced(classifier: SavedClassifier) -> Any:
    """torch's ONNX program of the classifier."""
    batch = torch.export.Dim("batch")
    try:
        return torch.onnx.export(
            PixelClassifier(classifier).eval(), (_pixels(classifier, 2),), dynamo=True, verbose=False,
            opset_version=OPSET, input_names=["pixels"], output_names=["probabilities"],
            dynamic_shapes={"pixels": {0: batch}}, external_data=False,
        )  # fmt: skip
    except Exception as error:  # the exporter raises whatever its passes raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise MetaDiffError(
            f"{classifier.images.name} cannot be exported to ONNX ({reason:.200})",
            hint="try a newer torch and onnxscript, or a classifier with another encoder",
        ) from error


def _difference(classifier: SavedClassifier, path: Path) -> float | None:
    """Largest difference between our probabilities and the graph's on random images; None without onnxruntime."""
    run = open_graph(path)
    if run is None:
        return None
    pixels = _pixels(classifier, TRIED)
    ours = classifier.probabilities(classifier.images.encode(pixels))
    found = float((ours - run(pixels)).abs().max())
    if math.isnan(found) or found > TOLERANCE:
        raise MetaDiffError(
            f"the ONNX graph of {classifier.images.name} differs from metadiff by {found:.1e}, more than {TOLERANCE}",
            hint="try a newer torch, onnxscript and onnxruntime",
        )
    return found


def open_graph(path: Path) -> Callable[[Tensor], Tensor] | None:
    """Pixels -> probabilities by onnxruntime on the CPU; None where it is not installed."""
    if find_spec("onnxruntime") is None:
        return None
    runtime = import_module("onnxruntime")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda pixels: torch.from_numpy(session.run(["probabilities"], {"pixels": pixels.numpy()})[0])


def _pixels(classifier: SavedClassifier, count: int) -> Tensor:
    side, generator = classifier.images.size, torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8, generator=generator)
