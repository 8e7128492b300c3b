"""A saved classifier as one ONNX graph, from pixels to class probabilities, for runtimes without Python or torch.

The input `pixels` (n, S, S, 3) uint8 are images as PREPARATION says. All that follows (normalisation, views, encoder,
classifier, calibrated softmax) is in the graph. The output `probabilities` (n, N) float32 has columns in the order of
the classes. Where the checkpoint has a fitted threshold, the output `margins` (n,) float32 is the known score above
it, in nats: an image below 0 shows none of the classes. facts.py says what the metadata of the file holds.
"""

import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metadiff_cli._version import __version__
from metadiff_cli.core.checkpoints.classifier import StoredClassifier, settings_header
from metadiff_cli.core.checkpoints.facts import MARGINS, PREPARATION, PROBABILITIES, pixels_rule
from metadiff_cli.core.checkpoints.model import image_header
from metadiff_cli.core.encoders.graphs import EXPORTER, graph_of, missing_packages
from metadiff_cli.core.encoders.session import RUNTIME, open_session
from metadiff_cli.core.method.adapt import TaskClassifier
from metadiff_cli.core.method.rejection import Rejector, known_scores, require_rejection
from metadiff_cli.errors import ConfigError, MetaDiffError
from metadiff_cli.files import atomic

TOLERANCE = 1e-4  # of the difference between our probabilities and those of the graph
MARGIN_TOLERANCE = 1e-3  # the same of margins, in nats
MAX_BYTES = 2**31 - 2**24  # of weights in one protobuf file, which ends at 2 GiB
TRIED = 3  # random images that the graph is tried on; not as many as it is traced with

Outputs = tuple[Tensor, ...]  # probabilities (n, N), and margins (n,) where there is a threshold


class PixelClassifier(nn.Module):
    """The classifier as the exporter sees it: from pixels (n, S, S, 3) uint8 to its outputs."""

    def __init__(self, stored: StoredClassifier) -> None:
        super().__init__()
        self.images, self.task, rejector = stored.model.images, stored.task, stored.rejector()
        self.encoder = self.images.encoder.eval()  # its parameters become the graph's
        self.threshold = None if rejector is None else rejector.threshold.clone()  # (1,)
        self.base = None if rejector is None or rejector.base is None else rejector.base.clone()  # (1, C, J)
        # of the classes whose images are known
        self.own = self.task if rejector is None else _normal(rejector.classifier)

    def forward(self, pixels: Tensor) -> Outputs:
        x = self.task.metric.expand(self.images.traceable(pixels)).unsqueeze(0)  # (1, n, J)
        probabilities = self.task.traceable(x)[0]
        if self.threshold is None:
            return (probabilities,)
        return probabilities, known_scores(self.own, self.base, x)[0] - self.threshold


def _normal(classifier: TaskClassifier) -> TaskClassifier:
    """The same with weights that the exporter can trace: those of inference mode are none."""
    return replace(classifier, weights=classifier.weights.clone())


def require_exporter() -> None:
    """Raise ConfigError if packages of the extra [onnx] are missing."""
    if missing := missing_packages(EXPORTER):
        raise ConfigError(
            f"export needs {' and '.join(missing)}, which are not installed",
            hint=f"install the extra [onnx]: pip install {' '.join(missing)}",
        )


def export_onnx(stored: StoredClassifier, path: Path) -> float | None:
    """Write the graph to `path`; returns its largest difference to our probabilities, or None without onnxruntime.

    The classifier has to be on the CPU. Raises MetaDiffError, and writes nothing, for an encoder that ONNX cannot hold,
    and if an output for random images differs by more than its tolerance.
    """
    images = stored.model.images
    size = sum(t.numel() * t.element_size() for t in images.encoder.state_dict().values())
    if size > MAX_BYTES:
        raise MetaDiffError(
            f"{images.name} has {size / 1e9:.1f} GB of weights, and one ONNX file holds 2 GB",
            hint="export a classifier with a smaller encoder",
        )
    program = _traced(stored)
    program.model.metadata_props.update(metadata(stored))
    with atomic(path) as temporary:
        program.save(str(temporary), external_data=False)
        return _difference(stored, temporary)


def metadata(stored: StoredClassifier) -> dict[str, str]:
    """The metadata of the file, by key: its classes, and facts on how to use it."""
    images, classes, rejector = stored.model.images, stored.classes, stored.rejector()
    counts = Counter(stored.labels.tolist())
    facts = {
        "package": __version__,
        "input": "pixels (n, S, S, 3) uint8 RGB, S = pixels.size",
        "preparation": PREPARATION,
        "pixels": pixels_rule(images.size),
        "output": "probabilities (n, N), columns in the order of classes"
        + ("" if rejector is None else "; margins (n,), below 0 for an image of none of the classes"),
        "rejection": None if rejector is None else _rejection(stored, rejector),
        "support": {name: counts[c] for c, name in enumerate(classes)},
        "unlabelled": 0 if stored.pool is None else len(stored.pool.digests),
        "pictures": {d.hex(): name for d, name in zip(stored.support.digests, stored.names, strict=True)},
        **image_header(images),
        "settings": settings_header(stored.task.settings),
    }
    return {
        "classes": json.dumps(list(classes), ensure_ascii=False),
        "metadiff": json.dumps(facts, sort_keys=True, ensure_ascii=False),
    }


def _rejection(stored: StoredClassifier, rejector: Rejector) -> dict[str, float]:
    rate = require_rejection(stored.model.metadiff).rate
    return {"threshold": round(float(rejector.threshold), 6), "false_rejection_rate": rate}


def _traced(stored: StoredClassifier) -> Any:
    """The ONNX program that torch makes of the classifier. Raises MetaDiffError."""
    hint = "try a newer torch and onnxscript, or a classifier with another encoder"
    network, name = PixelClassifier(stored), stored.model.images.name
    outputs = [PROBABILITIES] if network.threshold is None else [PROBABILITIES, MARGINS]
    return graph_of(network, _pixels(stored, 2), "pixels", outputs, what=name, hint=hint)


def _difference(stored: StoredClassifier, path: Path) -> float | None:
    """The largest difference between our probabilities and the graph's, or None without onnxruntime.

    Raises MetaDiffError if an output differs by more than its tolerance.
    """
    run = open_graph(path)
    if run is None:
        return None
    pixels = _pixels(stored, TRIED)
    differences = [
        float((ours - theirs).abs().max()) for ours, theirs in zip(_ours(stored, pixels), run(pixels), strict=True)
    ]
    for name, found, most in zip((PROBABILITIES, MARGINS), differences, (TOLERANCE, MARGIN_TOLERANCE), strict=False):
        if math.isnan(found) or found > most:
            raise MetaDiffError(
                f"the {name} of the ONNX graph of {stored.model.images.name} differ from metadiff's by {found:.1e}, "
                f"more than {most}",
                hint="try a newer torch, onnxscript and onnxruntime",
            )
    return differences[0]


@torch.inference_mode()
def _ours(stored: StoredClassifier, pixels: Tensor) -> Outputs:
    """What metadiff itself computes of the pixels, without the graph."""
    x, rejector = stored.task.metric.expand(stored.model.images.encode(pixels)).unsqueeze(0), stored.rejector()
    probabilities = stored.task.probabilities(x)[0]
    return (probabilities,) if rejector is None else (probabilities, rejector.margins(x)[0])


def open_graph(path: Path) -> Callable[[Tensor], Outputs] | None:
    """The graph in a file as a function from pixels to its outputs; None if onnxruntime is not installed."""
    if missing_packages([RUNTIME]):
        return None
    session = open_session(path, torch.get_num_threads())
    return lambda pixels: tuple(map(torch.from_numpy, session.run(None, {"pixels": pixels.numpy()})))


def _pixels(stored: StoredClassifier, count: int) -> Tensor:
    side, generator = stored.model.images.size, torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8, generator=generator)
