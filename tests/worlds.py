"""Made-up worlds for the tests: the command line in this process, small pictures, features, pages, archives."""

import contextlib
import io
import json
import sys
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import numpy as np
import torch
from jsonschema import Draft202012Validator
from PIL import Image
from torch import Tensor

from metadiff_cli.app import run
from metadiff_cli.commands.adapt.output import Outcome
from metadiff_cli.commands.adapt.report import AdaptReport
from metadiff_cli.commands.train import stages
from metadiff_cli.core.checkpoints.file import load_checkpoint, save_checkpoint
from metadiff_cli.core.checkpoints.model import Model, save_model
from metadiff_cli.core.encoders.bank import FeatureBank
from metadiff_cli.core.encoders.image_encoder import ImageEncoder
from metadiff_cli.core.encoders.networks import build_encoder
from metadiff_cli.core.method.adapt import MetaDiff, Sampling, TaskClassifier, Tuning, adapt_tasks, seeds_of
from metadiff_cli.core.method.denoisers import build_denoiser
from metadiff_cli.core.method.metric import Metric
from metadiff_cli.core.method.support import TaskSupport
from metadiff_cli.core.method.task_space import class_statistics, identity_space
from metadiff_cli.core.training import validation
from metadiff_cli.core.training.loop import Trainer

Trained = TypeVar("Trained", bound=Trainer[Any, Any])

SMALL = [
    "--set", "data.glyphs.train=12", "--set", "data.glyphs.val=8", "--set", "data.glyphs.test=8",
    "--set", "data.glyphs.images_per_class=12", "--set", "pretrain.epochs=2", "--set", "pretrain.batch=16",
    "--set", "metatrain.steps=6", "--set", "metatrain.batch=4", "--set", "metatrain.validate_every=3",
    "--set", "metatrain.validation_episodes=20", "--set", "evaluation.episodes=20", "--set", "evaluation.query=5",
    "--set", "denoiser.width=32",
]  # fmt: skip


@dataclass(frozen=True)
class Result:
    """Of one command: exit code, stdout, stderr."""

    code: int
    out: str
    err: str


def invoke(*arguments: str | Path, stdin: str = "") -> Result:
    """Run the command line in this process, as the console script does, with stdout and stderr apart."""
    out, err, previous = io.StringIO(), io.StringIO(), sys.stdin
    sys.stdin = io.StringIO(stdin)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), hasty():
            code = run([str(a) for a in arguments])
    finally:
        sys.stdin = previous
    return Result(code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def hasty() -> Iterator[None]:
    """A training in here fits and confirms on few episodes: that would be most of the time of a small one."""
    few = mock.patch.multiple(validation, EPISODES=20, FEWEST=10, CHECKED=10)
    with few, mock.patch.object(stages, "CONFIRMING", 40):
        yield


def paint(path: Path, colour: tuple[int, int, int], seed: int, size: int = 40) -> None:
    """A noisy picture of one colour."""
    rng = np.random.default_rng(seed)
    pixels = np.clip(np.array(colour) + rng.normal(0, 30, (size, size, 3)), 0, 255).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 50, 220), "grey": (128, 128, 128)}


SIZE = 24


def world(count: int, images: int, seed: int) -> Tensor:
    """Classes (count, images, D) from one world: means and noise that differ by direction."""
    g = torch.Generator().manual_seed(seed)
    scale = torch.linspace(2.0, 0.1, SIZE)
    means = torch.randn(count, 1, SIZE, generator=g) * scale
    z = means + torch.randn(count, images, SIZE, generator=g) * scale.flip(0)
    return torch.nn.functional.normalize(z, dim=-1)


def classifier_of(metadiff: MetaDiff, z: Tensor, sampling: Sampling | None = None, **more: object) -> TaskClassifier:
    ranks = more.pop("ranks", torch.arange(z.shape[1]).expand(len(z), -1))
    seeds = more.pop("seeds", seeds_of(0, 0, len(z)))
    support = TaskSupport.even(metadiff.metric.expand(z))
    return adapt_tasks(metadiff, support, sampling or Sampling(), ranks=ranks, seeds=seeds, **more)  # type: ignore[arg-type]


CPU = torch.device("cpu")


IMAGES = 30


def bank_of(count: int, seed: int) -> FeatureBank:
    z = world(count, IMAGES, seed)
    return FeatureBank(z.flatten(0, 1).numpy(), np.repeat(np.arange(count), IMAGES), tuple(map(str, range(count))))


HOSTILE = "</script><script>alert(1)</script>\"'><img src=http://x onerror=alert(1)>{{ 7 * 7 }}&amp;\u202e"


class Page(HTMLParser):
    """Tags with their attributes, and the text outside of style and script."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str, kind: str = "") -> list[dict[str, str | None]]:
        """Attributes of all elements with that tag and class."""
        return [a for t, a in self.tags if t == tag and (not kind or kind in (a.get("class") or "").split())]


def outcome(path: str, names: Sequence[str], probabilities: Sequence[float], **more: Any) -> Outcome:
    """A prediction with these probabilities of the classes."""
    ranking = sorted(zip(names, probabilities, strict=True), key=lambda pair: -pair[1])
    return Outcome(path, tuple(ranking), **more)


def report(photos: Path, names: Sequence[str] = tuple(COLOURS), **changes: object) -> AdaptReport:
    """The four colours with unequal support, a query image of each, and one that cannot be read."""
    support = {n: sorted(map(str, (photos / "support" / c).iterdir())) for n, c in zip(names, COLOURS, strict=True)}
    outcomes = [
        outcome(str(photos / "query" / f"{c}.png"), names, [0.7 if i == j else 0.1 for j in range(4)])
        for i, c in enumerate(COLOURS)
    ]
    outcomes.insert(1, Outcome(str(photos / "broken.png"), reason="not an image, or damaged"))
    fields: dict[str, object] = {"classes": names, "support": support, "outcomes": outcomes, **changes}
    return AdaptReport(**fields)  # type: ignore[arg-type]


SCHEMAS = {json.loads(f.read_text())["$id"]: json.loads(f.read_text()) for f in files("metadiff_cli.schemas").iterdir()
           if f.name.endswith(".json")}  # fmt: skip


def validate(result: Result, name: str, code: int = 0) -> dict[str, Any]:
    assert result.code == code, result.err
    document: dict[str, Any] = json.loads(result.out)
    assert document["schema"] == name
    Draft202012Validator(SCHEMAS[name]).validate(document)
    return document


def zip_of(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in files.items():
            file.writestr(name, content)
    return path


def tar_of(path: Path, files: dict[str, bytes], *more: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for info in more:
            tar.addfile(info)
    return path


def small_encoder(size: int = 16, name: str = "conv4", seed: int = 0, **views: Any) -> ImageEncoder:
    """An encoder of ours with random weights, on the CPU; `views` are `views`, 2 if not given, and `shift`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = build_encoder(name)
    return ImageEncoder(encoder, name, size, (0.5,) * 3, (0.25,) * 3, device=CPU, **{"views": 2, **views})


def small_model(path: Path) -> Path:
    """A real checkpoint, untrained: conv4 at 16 x 16 and a small denoiser."""
    images = small_encoder()
    g = torch.Generator().manual_seed(0)
    space = identity_space(torch.randn(3, images.feature_size, generator=g))
    denoiser = build_denoiser("unet", images.feature_size, 8, space)
    metadiff = MetaDiff(Metric(images.groups, space), denoiser, True, Tuning())
    settings = {"kind": "unet", "width": 8}
    header = {"classes": ["a", "ß", "日本"], "denoiser": settings, "config": {"seed": 0}, "metrics": {"x": 1.5}}
    save_model(path, images, metadiff, header)
    return path


def restored(trainer: Trainer[Any, Any], fresh: Trained, path: Path) -> Trained:
    """A fresh trainer with the state of another one, by way of a file."""
    tensors, plain = trainer.state()
    save_checkpoint(path, "state", tensors, {"plain": plain})
    kept = load_checkpoint(path, "state")
    fresh.restore(kept.part, kept.header["plain"])
    return fresh


def model_of_world() -> Model:
    """A model of the features of `world`, never fitted; its encoder is not asked for anything but its device."""
    statistics = class_statistics(list(world(40, IMAGES, seed=0)))
    metadiff = MetaDiff(Metric((SIZE,), statistics.task_space()), targets=statistics.means.float())
    header = {"classes": ["a"], "denoiser": {"kind": "analytic", "width": 8}}
    return Model(small_encoder(), metadiff, {**header, "config": {"denoiser": {"kind": "unet", "width": 8}}})
