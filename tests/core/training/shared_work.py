"""What two processes do in `test_parallel`: each piece of work alone, then together, and how the results differ."""

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
from metadiff_cli.core.encoders import bank as features
from metadiff_cli.core.encoders.bank import FeatureBank, build_bank
from metadiff_cli.core.encoders.image_encoder import ImageEncoder
from metadiff_cli.core.encoders.networks import Encoder, build_encoder
from metadiff_cli.core.method.task_space import fit_task_space
from metadiff_cli.core.training import distributed as parallel
from metadiff_cli.core.training.metatrain import MetaTrainer
from metadiff_cli.core.training.pretrain import Pretrainer
from metadiff_cli.core.training.world import World, alone, announced, enter, world
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


def pretrained(**settings: object) -> Tensor:
    """The parameters after an epoch, and the losses."""
    values = {"epochs": 2, "precision": "fp32", "lr": 0.2, "augment": AugmentConfig(jitter=0.2), **settings}
    torch.manual_seed(world().rank)  # the main process's parameters count
    trainer = Pretrainer(
        Plain(), PretrainConfig.model_validate(values), PIXELS, LABELS, classes=8, size=16,
        mean=[0.5] * 3, std=[0.25] * 3, seed=0, device=CPU,
    )  # fmt: skip
    list(trainer.run(lambda encoder: 1.0))
    return torch.cat([flat(trainer.encoder, trainer.heads), torch.tensor([h["loss"] for h in trainer.history])])


def metatrained(**settings: object) -> Tensor:
    space = fit_task_space(torch.from_numpy(BANK.features.reshape(8, 12, 6)))
    config = MetatrainConfig(steps=8, batch=5, validate_every=2, shots=(1, 3), ways=(2, 4), query=3, lr=3e-3)
    denoiser = DenoiserConfig.model_validate({"width": 16, "depth": 1, "dropout": 0.3, **settings})
    trainer = MetaTrainer(BANK, space, denoiser, config, seed=0, device=CPU)
    list(trainer.run(lambda denoiser: None))
    return torch.cat([flat(trainer.denoiser), torch.tensor([h["loss"] for h in trainer.history])])


def inner_trained() -> Tensor:
    config = FrozenBaseline.model_validate({"steps": 4, "batch": 3, "validate_every": 2, "query": 3, "rate": 1.0})
    torch.manual_seed(0)
    learner = FrozenLearner("metasgd-frozen", 3, torch.from_numpy(BANK.features).mean(dim=0), config)
    trainer = InnerTrainer(learner, BANK, config, shot=2, seed=0, device=CPU)
    list(trainer.run(lambda learner: None))
    return torch.cat([flat(trainer.learner), torch.tensor([h["loss"] for h in trainer.history])])


def bank(folder: Path) -> Tensor:
    torch.manual_seed(0)
    encoder = ImageEncoder(build_encoder("conv4"), "conv4", 16, (0.5,) * 3, (0.25,) * 3, True, CPU)
    done: list[int] = []
    made = build_bank(encoder, PIXELS, LABELS, BANK.classes, folder=folder, key="k" * 32, batch=8,
                      progress=lambda now, total: done.append(now))  # fmt: skip
    assert done == sorted(done) and (done[-1] == 96 or not world().main) and not list(folder.glob("*.parts"))
    return torch.from_numpy(np.array(made.features))


def flat(*modules: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for module in modules for p in module.parameters()])


def difference(work: Callable[[], Tensor]) -> float:
    """How far the result of both processes is from that of one."""
    together = work()
    with alone():
        expected = work()
    return float((together - expected).abs().max())


def refused(work: Callable[[], object]) -> str:
    try:
        work()
    except MetaDiffError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def failing() -> None:
    raise ConfigError("no such thing", hint="try another")


def main(found: World, folder: Path) -> dict[str, object]:
    file = folder / "made"
    features.SHARD = 20
    first = parallel.main_first(lambda: file.exists() or file.write_text("x") == 0)
    return {
        "rank": found.rank,
        "order": [parallel.gather_in_order(parallel.mine(range(n))) == list(range(n)) for n in (0, 1, 2, 5)],
        "same": parallel.same(f"of {found.rank}"),
        "main": parallel.on_main(lambda: [found.rank, world().size]),
        "main_first": first,
        "failing": refused(lambda: parallel.on_main(failing)),
        "unlike": refused(lambda: parallel.check_same(f"{found.rank}", "the images")),
        "too_few": refused(lambda: parallel.part_of(1, "batch")),
        "largest": parallel.largest_of(found.rank),
        "classes": difference(lambda: pretrained(batch=7)),
        "rotation": difference(lambda: pretrained(batch=8, rotation_weight=1.0)),
        "pairs": difference(lambda: pretrained(batch=8, objective="pairs", cosine_head=10)),
        "odd_pairs": refused(lambda: pretrained(batch=6, objective="pairs", cosine_head=10)),
        "unet": difference(metatrained),
        "paper": difference(lambda: metatrained(kind="paper")),
        "inner": difference(inner_trained),
        "bank": difference(lambda: bank(folder / f"bank-{world().size}-{found.rank * (world().size == 1)}")),
        "speaks": parallel.speaks(),
    }


if __name__ == "__main__":
    place = announced(os.environ)
    enter(place)
    parallel.start(place)
    found = main(place, Path(sys.argv[1]))
    parallel.stop()
    print(json.dumps(found))
