"""Memory as inner steps grow: of adaptation, and of meta-training beside MAML through the same encoder."""

import weakref
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from metadiff_cli.config.schema import ImageBaseline, MetatrainConfig
from metadiff_cli.core.baselines.learners import build_image_learner
from metadiff_cli.core.encoders.bank import FeatureBank
from metadiff_cli.core.encoders.image_encoder import ImageEncoder
from metadiff_cli.core.encoders.networks import build_encoder
from metadiff_cli.core.method.adapt import MetaDiff, Sampling, adapt_tasks
from metadiff_cli.core.method.diffusion import Schedule
from metadiff_cli.core.method.support import TaskSupport
from tests.benchmarks.learning import trainer_on

STEPS, MAML_STEPS = (1, 5, 10, 50, 100), (1, 5, 10)
WAY, QUERY = 5, 5  # of the one task of a step, with one support image a class
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


def training_memory(images: ImageEncoder, bank: FeatureBank) -> Series:
    """Of one 5-way 1-shot task: MetaDiff's training with T of STEPS, MAML's with MAML_STEPS inner steps.

    MAML's tensors are on the device "meta": they have their sizes and no values, so this takes neither time nor memory.
    """
    with torch.random.fork_rng(devices=[]):
        return {
            "MetaDiff": [(steps, _metadiff(bank, steps)) for steps in STEPS],
            "MAML": [(steps, _maml(images, steps)) for steps in MAML_STEPS],
        }


def adaptation_memory(metadiff: MetaDiff, support: TaskSupport, steps: int) -> float:
    """Megabytes that adaptation with S steps takes at most, beyond the support."""
    ranks = torch.arange(support.ways).expand(len(support.x), -1)
    live = LiveTensors()
    with live:
        adapt_tasks(metadiff, support, Sampling(steps), ranks=ranks, seeds=[0] * len(support.x))
    return live.megabytes


def _metadiff(bank: FeatureBank, steps: int) -> float:
    config = MetatrainConfig(batch=1, ways=(WAY, WAY), shots=(1, 1), query=QUERY)
    trainer, _ = trainer_on(bank, config)
    trainer.schedule = Schedule(steps)
    trainer.abar = torch.tensor(trainer.schedule.abar)
    trainer._train_step(1e-4)  # the first one makes the state of the optimiser
    live = LiveTensors()
    with live:
        trainer._train_step(1e-4)
    return live.megabytes


def _maml(images: ImageEncoder, steps: int) -> float:
    learner = build_image_learner(
        "maml",
        WAY,
        partial(build_encoder, images.name),
        images.size,
        images.mean,
        images.std,
        ImageBaseline(inner_steps=steps),
    ).to(META)
    learner.train()
    pixels = torch.zeros(1, WAY * (1 + QUERY), images.size**2 * 3, dtype=torch.uint8, device=META)
    labels = torch.arange(WAY, device=META).repeat_interleave(QUERY)
    live = LiveTensors()
    with live:
        logits = learner(pixels[:, :WAY].unsqueeze(2), pixels[:, WAY:])
        F.cross_entropy(logits[0], labels).backward()  # type: ignore[no-untyped-call]
    return live.megabytes
