"""What two processes do in `test_distributed`: each piece of work in one, then together, and how the results differ."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metadiff_cli.config.schema import AugmentConfig, DenoiserConfig, FrozenBaseline, MetatrainConfig, PretrainConfig
from metadiff_cli.core.baselines.learners import FrozenLearner
from metadiff_cli.core.baselines.train import InnerTrainer
from metadiff_cli.core.distributed import SINGLE, Group, joined
from metadiff_cli.core.encoders import bank as features
from metadiff_cli.core.encoders.bank import FeatureBank, build_bank
from metadiff_cli.core.encoders.image_encoder import ImageEncoder
from metadiff_cli.core.encoders.networks import Encoder, build_encoder
from metadiff_cli.core.method.adapt import Tuning
from metadiff_cli.core.method.task_space import class_statistics, cross_fitted
from metadiff_cli.core.training.metatrain import MetaTrainer, deal, images_needed, pools_of
from metadiff_cli.core.training.pretrain import Pretrainer
from metadiff_cli.errors import ConfigError, MetaDiffError

CPU = torch.device("cpu")
RNG = np.random.default_rng(0)
LABELS = np.repeat(np.arange(8), 12)
FEATURES = F.normalize(torch.from_numpy(RNG.normal(size=(8, 1, 6)) + 0.3 * RNG.normal(size=(8, 12, 6))), dim=2)
BANK = FeatureBank(FEATURES.flatten(0, 1).float().numpy(), LABELS, tuple("abcdefgh"))
PIXELS = RNG.integers(0, 256, (96, 16, 16, 3), dtype=np.uint8)


class Plain(Encoder):
    """Without BatchNorm, so that images do not depend on the others of their part."""

    pooled, channels, stride = False, 4, 8

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 8, stride=8)

    def maps(self, images: Tensor) -> Tensor:
        return self.conv(images).tanh()


def pretrained(group: Group, **settings: object) -> Tensor:
    """The parameters after an epoch, and the losses."""
    values = {"epochs": 2, "precision": "fp32", "lr": 0.2, "augment": AugmentConfig(jitter=0.2), **settings}
    trainer = Pretrainer(
        Plain, PretrainConfig.model_validate(values), PIXELS, LABELS, classes=8, size=16, mean=[0.5] * 3,
        std=[0.25] * 3, seed=group.rank, device=CPU, group=group,  # the parameters of rank 0 count
    )  # fmt: skip
    trainer.seed = 0
    list(trainer.run(lambda encoder: 1.0))
    return torch.cat([flat(trainer.encoder, trainer.heads), torch.tensor([h["loss"] for h in trainer.history])])


def metatrained(group: Group, **settings: object) -> Tensor:
    config = MetatrainConfig(steps=8, batch=5, validate_every=2, shots=(1, 3), ways=(2, 4), query=3, lr=3e-3)
    denoiser, sets = DenoiserConfig.model_validate({"width": 16, **settings}), [[12] * 8]
    parts = deal(sets, images_needed(config), denoiser.kind, seed=0)
    statistics = class_statistics(BANK.by_class())
    others = cross_fitted(BANK.by_class(), (6,), parts)[1] if denoiser.kind == "unet" else {0: statistics}
    spaces = {part: of.task_space() for part, of in others.items()}
    trainer = MetaTrainer(
        BANK, pools_of(sets, parts), spaces, statistics.task_space(), denoiser, config,
        means=statistics.means, tuning=Tuning(), seed=0, device=CPU, group=group,
    )  # fmt: skip
    list(trainer.run(lambda denoiser: None))
    return torch.cat([flat(trainer.module), torch.tensor([h["loss"] for h in trainer.history])])


def inner_trained(group: Group) -> Tensor:
    config = FrozenBaseline.model_validate({"steps": 4, "batch": 3, "validate_every": 2, "query": 3, "rate": 1.0})
    learner = FrozenLearner("metasgd-frozen", 3, torch.from_numpy(BANK.features).mean(dim=0), config)
    trainer = InnerTrainer(learner, BANK, config, shot=2, seed=0, device=CPU, group=group)
    list(trainer.run(lambda learner: None))
    return torch.cat([flat(trainer.module), torch.tensor([h["loss"] for h in trainer.history])])


def bank(group: Group, folder: Path) -> Tensor:
    torch.manual_seed(0)
    encoder = ImageEncoder(build_encoder("conv4"), "conv4", 16, (0.5,) * 3, (0.25,) * 3, 2, CPU)
    done: list[int] = []
    made = build_bank(
        encoder, PIXELS, LABELS, BANK.classes, folder=folder / f"bank-{group.world_size}", key="k" * 32, batch=8,
        progress=lambda now, total: done.append(now), group=group,
    )  # fmt: skip
    assert done == sorted(done) and (not done or done[-1] == 96 or group.rank > 0)
    assert not list(folder.glob("*.parts"))
    return torch.from_numpy(np.array(made.features))


def flat(*modules: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for module in modules for p in module.parameters()])


def difference(group: Group, work: Callable[[Group], Tensor]) -> float:
    """How far the result of both processes is from that of one."""
    together = work(group)
    expected = group.rank_zero_first(lambda: work(SINGLE))
    return float((together - expected).abs().max())


def refused(work: Callable[[], object]) -> str:
    try:
        work()
    except MetaDiffError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def failing() -> None:
    raise ConfigError("no such thing", hint="try another")


def main(group: Group, folder: Path) -> dict[str, object]:
    file = folder / "made"
    features.SHARD = 20
    first = group.rank_zero_first(lambda: file.exists() or file.write_text("x") == 0)
    return {
        "rank": group.rank,
        "broadcast": group.broadcast(f"of {group.rank}"),
        "rank_zero_first": first,
        "failing": refused(lambda: group.on_rank_zero(failing)),
        "unlike": refused(lambda: group.check_equal(f"{group.rank}", "the images")),
        "too_few": refused(lambda: group.slice_of(1, "batch")),
        "max": group.max(group.rank),
        "classes": difference(group, lambda group: pretrained(group, batch=7)),
        "rotation": difference(group, lambda group: pretrained(group, batch=8, rotation_weight=1.0)),
        "pairs": difference(group, lambda group: pretrained(group, batch=8, objective="pairs", cosine_head=10)),
        "odd_pairs": refused(lambda: pretrained(group, batch=6, objective="pairs", cosine_head=10)),
        "unet": difference(group, metatrained),
        "paper": difference(group, lambda group: metatrained(group, kind="paper")),
        "inner": difference(group, inner_trained),
        "bank": difference(group, lambda group: bank(group, folder)),
        "tells": group.is_first_to_fail(),
    }


if __name__ == "__main__":
    with joined(os.environ) as processes:
        found = main(processes, Path(sys.argv[1]))
    print(json.dumps(found))
