"""Meta-training: tasks per second, and peak memory as inner steps grow, beside second-order ANIL and MAML.

ANIL is there twice: as the package trains it, with the inner gradient written out and all tasks in one product, and as
it is usually written, with `torch.autograd.grad(..., create_graph=True)`.
"""

import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from metadiff_cli.config.schema import DenoiserConfig, FrozenBaseline, ImageBaseline, MetatrainConfig
from metadiff_cli.core.baselines.learners import FrozenLearner, Head, build_image_learner
from metadiff_cli.core.baselines.train import InnerTrainer
from metadiff_cli.core.encoders.bank import FeatureBank
from metadiff_cli.core.encoders.networks import build_encoder
from metadiff_cli.core.method.adapt import MetaDiff, Sampling, Tuning, adapt_tasks
from metadiff_cli.core.method.diffusion import Schedule
from metadiff_cli.core.method.metric import Metric
from metadiff_cli.core.method.support import TaskSupport
from metadiff_cli.core.method.task_space import TaskSpace, cross_fitted
from metadiff_cli.core.training.metatrain import MetaTrainer, deal, images_needed, pools_of
from tests.benchmarks.common import CPU, Ratio, Report, Sizes, feature_bank, pixel_bank, rates

MAML_STEPS = 5
KINDS = ("metadiff", "anil", "anil-autograd", "maml")
MEMORY_STEPS = 2
EXACT = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}  # glibc: freed tensors go back at once


Spaces = tuple[TaskSpace, dict[int, TaskSpace], Tensor]


class AutogradHead(Head):
    """The same head, whose inner gradient autograd finds."""

    def adapt(self, z: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        tasks, ways, shots, size = z.shape
        x, labels = z.reshape(tasks, ways * shots, size), torch.arange(ways).repeat_interleave(shots).repeat(tasks)
        weight, bias = self.weight.expand(tasks, -1, -1), self.bias.expand(tasks, 1, -1)
        for _ in range(steps):
            loss = F.cross_entropy((x @ weight.mT + bias).flatten(0, 1), labels) * tasks  # the mean within each task
            slopes = torch.autograd.grad(loss, (weight, bias), create_graph=True)
            weight, bias = weight - self.rate * slopes[0], bias - self.rate * slopes[1]
        return weight, bias


def trainer_on(
    bank: FeatureBank, config: MetatrainConfig, spaces: Spaces | None = None
) -> tuple[MetaTrainer, TaskSpace]:
    """A trainer of the denoiser on one data set, as `metatrain` makes it, and the space of its tasks."""
    parts = parts_of(bank, config)
    space, others, means = spaces or spaces_of(bank, parts)
    pools = pools_of([[len(rows) for rows in bank.class_indices()]], parts)
    trainer = MetaTrainer(
        bank, pools, others, space, DenoiserConfig(), config, means=means, tuning=Tuning(), seed=0, device=CPU
    )
    return trainer, space


def parts_of(bank: FeatureBank, config: MetatrainConfig) -> list[int]:
    """The part of each class that is left out of the statistics of its tasks."""
    return deal([[len(rows) for rows in bank.class_indices()]], images_needed(config), DenoiserConfig().kind, seed=0)


def spaces_of(bank: FeatureBank, parts: Sequence[int]) -> Spaces:
    """The task space of all classes, those without each part, and the class means."""
    statistics, others = cross_fitted(bank.by_class(), (), parts)
    return statistics.task_space(), {part: of.task_space() for part, of in others.items()}, statistics.means


def meta_config(sizes: Sizes) -> MetatrainConfig:
    """Tasks of the ways and shots of the sizes."""
    return MetatrainConfig(
        batch=sizes.batch, query=sizes.query, ways=(sizes.way, sizes.way), shots=(sizes.shot, sizes.shot)
    )


@cache
def known_spaces(sizes: Sizes) -> Spaces:
    """Those of the bank of the sizes: they take longer than a training step, and depend on no steps."""
    bank = feature_bank(sizes)
    return spaces_of(bank, parts_of(bank, meta_config(sizes)))


def metadiff_trainer(sizes: Sizes, inner: int) -> tuple[MetaTrainer, TaskSpace]:
    """MetaDiff with T = `inner` diffusion steps, and the space of its tasks."""
    trainer, space = trainer_on(feature_bank(sizes), meta_config(sizes), known_spaces(sizes))
    trainer.schedule = Schedule(inner)
    trainer.abar = torch.tensor(trainer.schedule.abar)
    return trainer, space


def anil_trainer(sizes: Sizes, inner: int, autograd: bool = False) -> InnerTrainer:
    """Second-order ANIL on the same features, the same tasks a step."""
    config = FrozenBaseline(batch=sizes.batch, query=sizes.query)
    bank = feature_bank(sizes)
    learner = FrozenLearner("anil-frozen", sizes.way, torch.zeros(sizes.features), config)
    learner.inner_steps = learner.test_steps = inner
    if autograd:
        learner.head = AutogradHead(sizes.way, sizes.features, config.rate)
    return InnerTrainer(learner, bank, config, shot=sizes.shot, seed=0, device=CPU)


def maml_trainer(sizes: Sizes, inner: int) -> InnerTrainer:
    """Second-order MAML on images of the configured size."""
    config = ImageBaseline(batch=1, query=sizes.query, inner_steps=inner)
    shape = (sizes.image, (0.5,) * 3, (0.25,) * 3)
    learner = build_image_learner("maml", sizes.way, partial(build_encoder, sizes.encoder), *shape, config)
    return InnerTrainer(learner, pixel_bank(sizes), config, shot=sizes.shot, seed=0, device=CPU)


TRAINERS: dict[str, Callable[[Sizes, int], InnerTrainer]] = {
    "anil": anil_trainer,
    "anil-autograd": partial(anil_trainer, autograd=True),
    "maml": maml_trainer,
}


def stepper(kind: str, sizes: Sizes, inner: int) -> Callable[[], int]:
    """One training step of a kind; returns its number of tasks."""
    if kind == "metadiff":
        ours, _ = metadiff_trainer(sizes, inner)

        def step() -> int:
            ours._train_step(1e-4)
            ours.step += 1
            return sizes.batch

        return step
    theirs = TRAINERS[kind](sizes, inner)

    def other() -> int:
        theirs._train_step()
        theirs.step += 1
        return theirs.config.batch

    return other


def adapters(sizes: Sizes, inner: int) -> dict[str, Callable[[], int]]:
    """One adaptation of one task: ours with S = T = `inner` sampling steps, ANIL's with as many inner steps."""
    (ours, space), theirs = metadiff_trainer(sizes, inner), anil_trainer(sizes, inner)
    metadiff = MetaDiff(Metric(space.groups, space), ours.averaged(), True, schedule=ours.schedule)
    z = torch.from_numpy(ours.bank.features[: sizes.way * sizes.shot]).view(1, sizes.way, sizes.shot, -1)
    support, ranks = TaskSupport.even(metadiff.metric.expand(z)), torch.arange(sizes.way).unsqueeze(0)

    def sample() -> int:
        adapt_tasks(metadiff, support, Sampling(steps=inner, guidance=1.0), ranks=ranks, seeds=[0])
        return 1

    theirs.module.eval()

    @torch.no_grad()
    def descend() -> int:
        theirs.module(z, z[:, :, 0])
        return 1

    return {"metadiff adaptation": sample, "anil adaptation": descend}


def training(sizes: Sizes) -> Report:
    """Tasks per second of meta-training, and the time of one adaptation."""
    rows, ratios = [], []
    for inner in sizes.inner:
        works = {kind: stepper(kind, sizes, inner) for kind in KINDS[:3]} | adapters(sizes, inner)
        found = rates(works, sizes)
        times = (1000 / found[f"{kind} adaptation"] for kind in ("metadiff", "anil"))
        rows.append((inner, *(round(found[kind], 1) for kind in KINDS[:3]), *(round(t, 2) for t in times)))
        for kind in KINDS[1:3]:
            least = 10 if inner == 100 else None
            ratios.append(Ratio(f"metadiff / {kind}, {inner} inner steps", found["metadiff"] / found[kind], least))
    found = rates({kind: stepper(kind, sizes, MAML_STEPS) for kind in ("metadiff", "maml")}, sizes)
    ratios.append(Ratio(f"metadiff / maml on images, {MAML_STEPS} inner steps", found["metadiff"] / found["maml"], 100))
    return Report(
        "Meta-training, tasks per second",
        ("inner steps", *KINDS[:3], "one adaptation, metadiff ms", "anil ms"),
        rows,
        ratios,
        (
            f"maml on {sizes.image} x {sizes.image} images with {MAML_STEPS} inner steps: {found['maml']:.2f} tasks/s",
            "the frozen encoder's training is not in these numbers; the benchmark `pretraining` has its images/s",
        ),
    )


def memory(sizes: Sizes) -> Report:
    """Peak memory of training steps beyond imports and data, each number from a process of its own."""
    series: dict[str, list[tuple[int, float]]] = {kind: [] for kind in KINDS}
    for kind in KINDS:
        for inner in sizes.memory_inner:
            if _expected(series[kind], inner) > 1000 * sizes.memory_limit:
                break
            series[kind].append((inner, _peak_of(kind, inner, sizes)))
    rows = [(inner, *(dict(series[kind]).get(inner, f"over {sizes.memory_limit:g} GB") for kind in KINDS))
            for inner in sizes.memory_inner]  # fmt: skip
    ratios = []
    for kind in KINDS:
        (n0, first), (n1, last) = series[kind][0], series[kind][-1]
        values = [megabytes for _, megabytes in series[kind]]
        most = 1.05 if kind == "metadiff" else None
        ratios.append(
            Ratio(
                f"{kind}: largest / smallest, {n0} to {n1} inner steps", max(values) / max(min(values), 1e-3), most=most
            )
        )
        ratios.append(Ratio(f"{kind}: growth in MB per inner step", (last - first) / max(n1 - n0, 1)))
    return Report(
        "Meta-training, peak memory in MB beyond imports and data", ("inner steps", *KINDS), rows, ratios,
        (f"metadiff and both anil: {sizes.batch} tasks a step; maml: one task at a time",
         "with --allocator default, glibc may keep much of what was freed"), series,
    )  # fmt: skip


def _expected(points: list[tuple[int, float]], inner: int) -> float:
    """MB at `inner` steps along the line through the last two measurements; 0 before there are two."""
    if len(points) < 2:
        return 0.0
    (n0, m0), (n1, m1) = points[-2:]
    return m1 + (m1 - m0) / (n1 - n0) * (inner - n1)


def _peak_of(kind: str, inner: int, sizes: Sizes) -> float:
    command = [sys.executable, "-m", "tests.benchmarks.learning", kind, str(inner), json.dumps(asdict(sizes))]
    environment = {**os.environ, **(EXACT if sizes.allocator == "exact" else {})}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        raise RuntimeError(f"measuring {kind} with {inner} inner steps failed:\n{done.stderr}")
    return float(done.stdout)


def resident_megabytes(peak: bool) -> float:
    """Resident size of this process, now or at its peak since the last `forget_peak`.

    Linux tells it per program; elsewhere getrusage does, which knows the peak alone.
    """
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            name = "VmHWM" if peak else "VmRSS"
            return next(int(line.split()[1]) for line in file if line.startswith(name)) / 1000
    except (OSError, StopIteration):
        import resource

        unit = 1e6 if sys.platform == "darwin" else 1e3
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def private_megabytes() -> float:
    """What of it belongs to this process alone, where Linux tells it: no files that are mapped."""
    with suppress(OSError, StopIteration), open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) / 1000
    return resident_megabytes(peak=False)


def forget_peak() -> None:
    """Give freed memory back and start the peak anew: making the data takes more for a moment than the data do."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    with suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")


def _child(kind: str, inner: int, values: dict[str, Any]) -> float:
    """In the fresh process: imports and data, then training steps; the growth of the peak."""
    sizes = Sizes(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})
    step = stepper(kind, sizes, inner)
    forget_peak()
    before = resident_megabytes(peak=False)
    for _ in range(MEMORY_STEPS):
        step()
    return round(resident_megabytes(peak=True) - before, 1)


if __name__ == "__main__":
    print(_child(sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])))
