"""A saved classifier as one ONNX graph, from pixels to class probabilities, for runtimes without Python or torch.

The input `pixels` (n, S, S, 3) uint8 are images as PREPARATION says. All that follows (normalisation, views, encoder,
classifier, calibrated softmax) is in the graph. The output `probabilities` (n, N) float32 has columns in the order of
the classes. The metadata of the file has two entries: `classes`, a JSON list, and `metadiff`, JSON with the preparation
of images, their size S, the hyper-parameters of the classifier and the version of the package.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metadiff_cli._version import __version__
from metadiff_cli.core.checkpoints.classifier import settings_header
from metadiff_cli.core.checkpoints.model import SavedClassifier, image_header
from metadiff_cli.core.encoders.graphs import EXPORTER, RUNTIME, graph_of, missing_packages, open_session
from metadiff_cli.errors import ConfigError, MetaDiffError
from metadiff_cli.files import atomic

TOLERANCE = 1e-4  # of the difference between our probabilities and those of the graph
MAX_BYTES = 2**31 - 2**24  # of weights in one protobuf file, which ends at 2 GiB
# how data/images.py makes pixels of an image, in one call of Pillow: the same steps give the same pixels
PREPARATION = (
    "upright as the EXIF data says, RGB, transparent parts on white; with W, H = image.size and s = min(W, H): "
    "image.resize((S, S), Image.Resampling.BICUBIC, "
    "box=((W - s) / 2, (H - s) / 2, (W + s) / 2, (H + s) / 2), reducing_gap=3.0)"
)
TRIED = 3  # random images that the graph is tried on; not as many as it is traced with


class PixelClassifier(nn.Module):
    """The classifier as the exporter sees it: from pixels (n, S, S, 3) uint8 to probabilities (n, N)."""

    def __init__(self, classifier: SavedClassifier) -> None:
        super().__init__()
        self.encoder = classifier.images.encoder.eval()  # its parameters become the graph's
        self.classifier = classifier

    def forward(self, pixels: Tensor) -> Tensor:
        z = self.classifier.images.traceable(pixels)  # (n, D)
        task = self.classifier.task
        return task.traceable(task.metric.expand(z).unsqueeze(0))[0]


def require_exporter() -> None:
    """Raise ConfigError if packages of the extra [onnx] are missing."""
    if missing := missing_packages(EXPORTER):
        raise ConfigError(
            f"export needs {' and '.join(missing)}, which are not installed",
            hint=f"install the extra [onnx]: pip install {' '.join(missing)}",
        )


def export_onnx(classifier: SavedClassifier, path: Path) -> float | None:
    """Write the graph to `path`; returns its largest difference to our probabilities, or None without onnxruntime.

    The classifier has to be on the CPU. Raises MetaDiffError, and writes nothing, for an encoder that ONNX cannot hold,
    and if the difference on random images is above TOLERANCE.
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
    """The metadata of the file, by key: its classes, and facts on how to use it."""
    facts = {
        "package": __version__,
        "input": "pixels (n, S, S, 3) uint8 RGB, S = image.size",
        "preparation": PREPARATION,
        "output": "probabilities (n, N), columns in the order of classes",
        **image_header(classifier.images),
        "settings": settings_header(classifier.task.settings),
    }
    classes = list(classifier.classes)
    return {"classes": json.dumps(classes, ensure_ascii=False), "metadiff": json.dumps(facts, sort_keys=True)}


def _traced(classifier: SavedClassifier) -> Any:
    """The ONNX program that torch makes of the classifier. Raises MetaDiffError."""
    hint = "try a newer torch and onnxscript, or a classifier with another encoder"
    network, name = PixelClassifier(classifier), classifier.images.name
    return graph_of(network, _pixels(classifier, 2), "pixels", "probabilities", what=name, hint=hint)


def _difference(classifier: SavedClassifier, path: Path) -> float | None:
    """The largest difference between our probabilities and the graph's, or None without onnxruntime.

    Raises MetaDiffError if it is above TOLERANCE.
    """
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
    """The graph in a file as a function from pixels to probabilities; None if onnxruntime is not installed."""
    if missing_packages([RUNTIME]):
        return None
    session = open_session(path)
    return lambda pixels: torch.from_numpy(session.run(["probabilities"], {"pixels": pixels.numpy()})[0])


def _pixels(classifier: SavedClassifier, count: int) -> Tensor:
    side, generator = classifier.images.size, torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8, generator=generator)
