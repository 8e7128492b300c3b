"""What is fuzzed: each target takes bytes from anywhere and ends, or raises MetaDiffError. Anything else is a bug."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from metadiff_cli.config.load import check, resolve
from metadiff_cli.errors import MetaDiffError


def small_classifier(path: Path) -> Path:
    """A real saved classifier of three classes and four images, made from the small model."""
    import numpy as np
    import torch

    from metadiff_cli.core.checkpoints.classifier import StoredClassifier, StoredImages, save_classifier
    from metadiff_cli.core.checkpoints.model import load_model
    from metadiff_cli.core.method.adapt import TaskClassifier
    from metadiff_cli.core.method.metric import TaskSettings
    from tests.worlds import small_model

    model = load_model(small_model(path.with_name("base.safetensors")), torch.device("cpu"))
    classes, size = ("a", "ß", "日本"), model.images.feature_size
    metric = model.metadiff.metric
    one, wide = torch.ones(1), sum(metric.parts)
    settings = TaskSettings(4 * one, 0 * one, one, 2 * one, 3.0, 0.1)
    task = TaskClassifier(metric, settings, torch.randn(1, 1, wide), torch.randn(1, 1, 3, wide))
    support = StoredImages(torch.randn(4, size), tuple(bytes([i]) * 32 for i in range(4)))
    names = ("a/1", "a/2", "b/1", "c/1")
    save_classifier(path, StoredClassifier(model, task, classes, support, np.array([0, 0, 1, 2]), names))
    return path


def read_any(path: Path) -> None:
    """Read a checkpoint as the commands do: the file, then what its kind says it holds."""
    import torch

    from metadiff_cli.core.checkpoints.classifier import load_classifier
    from metadiff_cli.core.checkpoints.file import load_checkpoint
    from metadiff_cli.core.checkpoints.model import load_encoder, load_model

    checkpoint, device = load_checkpoint(path), torch.device("cpu")
    json.dumps(checkpoint.header)
    if checkpoint.kind == "model":
        load_model(path, device)
        check(checkpoint.header.get("config"))  # type: ignore[arg-type]
    elif checkpoint.kind == "encoder":
        load_encoder(path, device, views=2)
    elif checkpoint.kind == "classifier":
        load_classifier(path, device)


def checkpoint(data: bytes) -> None:
    """Bytes of a checkpoint file, as they are and with the length of the header put right."""
    _with_file(data, read_any)
    head, brace, body = data[8:].rpartition(b"}")
    if brace:
        _with_file((len(head) + 1).to_bytes(8, "little") + head + brace + body, read_any)


def config(data: bytes) -> None:
    """Bytes of a configuration file, and the same text as a setting and as the value of a variable."""
    _with_file(data, lambda path: resolve(file=path, environ={}))
    text = data.decode("utf-8", errors="replace")
    _allowed(lambda: resolve(settings=[text], environ={}))
    _allowed(lambda: resolve(environ={"METADIFF_PRETRAIN__EPOCHS": text}))


def _with_file(data: bytes, read: Callable[[Path], object]) -> None:
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(data)
        file.flush()
        _allowed(lambda: read(Path(file.name)))


def _allowed(work: Callable[[], object]) -> None:
    try:
        work()
    except MetaDiffError as error:
        assert error.message and error.hint, "an error says what is wrong and what to do"


TARGETS = {"checkpoint": checkpoint, "config": config}
