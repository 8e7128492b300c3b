"""Memory of a step of meta-training as the number of its inner steps grows, beside MAML through the same encoder."""

import weakref
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from metadiff_cli.config.schema import ENCODERS, DenoiserConfig, ImageBaseline, MetatrainConfig
from metadiff_cli.core.baselines.learners import build_image_learner
from metadiff_cli.core.encoders.bank import FeatureBank
from metadiff_cli.core.encoders.image_encoder import ImageEncoder
from metadiff_cli.core.encoders.networks import build_encoder
from metadiff_cli.core.method.diffusion import Schedule
from metadiff_cli.core.method.task_space import TaskSpace
from metadiff_cli.core.training.metatrain import MetaTrainer

STEPS, MAML_STEPS = (1, 5, 10, 50, 100), (1, 5, 10)
WAY, QUERY = 5, 5  # of the one task of a step, with one support image a class
IMAGES = 2 * QUERY  # of a class: the targets are the mean of those that the task leaves
META = torch.device("meta")
Series = dict[str, list[tuple[int, float]]]  # megabytes against inner steps, by name


class LiveTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors that come up while it is entered; `peak` is the most that was alive at once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now, self.peak = 0, 0
        self.sizes: dict[int, int] = {}  # of the storages that are alive

    @property
    def megabytes(self) -> float:
        """The peak."""
        return float(self.peak) / 1e6

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in given and storage._cdata not in self.sizes:
                    self._count(storage)
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        self.sizes[storage._cdata] = storage.nbytes()
        weakref.finalize(storage, self._forget, storage._cdata)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)

    def _forget(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


def training_memory(images: ImageEncoder, space: TaskSpace, bank: FeatureBank) -> Series:
    """Of one 5-way 1-shot task: MetaDiff's training with T of STEPS, MAML's with MAML_STEPS inner steps.

    MAML's tensors are on the device "meta": they have their sizes and no values, so this takes neither time nor memory.
    Encoders of other libraries are left out there.
    """
    with torch.random.fork_rng(devices=[]):
        series: Series = {"MetaDiff": [(steps, _metadiff(space, bank, steps, images.device)) for steps in STEPS]}
        if images.name in ENCODERS:
            series["MAML"] = [(steps, _maml(images, steps)) for steps in MAML_STEPS]
    return series


def _metadiff(space: TaskSpace, bank: FeatureBank, steps: int, device: torch.device) -> float:
    rows = [rows[:IMAGES] for rows in bank.class_indices()[:WAY]]
    labels = np.repeat(np.arange(len(rows)), [len(r) for r in rows])
    few = FeatureBank(bank.features[np.concatenate(rows)], labels, bank.classes[: len(rows)])
    query = min(QUERY, min(len(r) for r in rows) - 1)
    config = MetatrainConfig(batch=1, ways=(len(rows), len(rows)), shots=(1, 1), query=query)
    trainer = MetaTrainer(few, space, DenoiserConfig(), config, seed=0, device=device)
    trainer.schedule = Schedule(steps)
    trainer.abar = trainer.schedule.abar.float().to(device)
    trainer._train_step(1e-4)  # the first one makes the state of the optimiser
    live = LiveTensors()
    with live:
        trainer._train_step(1e-4)
    return live.megabytes


def _maml(images: ImageEncoder, steps: int) -> float:
    learner = build_image_learner(
        "maml", WAY, build_encoder(images.name), images.size, images.mean, images.std, ImageBaseline()
    ).to(META)
    learner.train()
    pixels = torch.zeros(1, WAY * (1 + QUERY), images.size**2 * 3, dtype=torch.uint8, device=META)
    labels = torch.arange(WAY, device=META).repeat_interleave(QUERY)
    live = LiveTensors()
    with live:
        logits = learner(pixels[:, :WAY].unsqueeze(2), pixels[:, WAY:], steps)
        F.cross_entropy(logits[0], labels).backward()  # type: ignore[no-untyped-call]
    return live.megabytes
