"""Adaptation by descent beside scikit-learn's logistic regression: speed of episodes, of one task, and of large ones.

Features are cached, and there are statistics of base classes. What a large task and many steps take of memory is from
processes of their own.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV

from metadiff_cli.core.evaluation.episodes import sample_episode
from metadiff_cli.core.evaluation.evaluate import Protocol, evaluate, expanded, mean_interval, method_of, run_through
from metadiff_cli.core.method.adapt import MetaDiff, Sampling, TaskClassifier, adapt_tasks
from metadiff_cli.core.method.guidance import GUIDANCE_GRID
from metadiff_cli.core.method.metric import Metric
from metadiff_cli.core.method.support import TaskSupport
from metadiff_cli.core.method.task_space import class_statistics
from tests.benchmarks.common import CPU, Ratio, Report, Sizes, feature_bank, rates
from tests.benchmarks.learning import EXACT, forget_peak, resident_megabytes
from tests.benchmarks.memory import adaptation_memory

FASTER, LATENCY = 10.0, 25.0  # times as many episodes as scikit-learn; milliseconds of one task with 100 queries
SECONDS, MEGABYTES = 10.0, 2000.0  # of a large task
FLAT = 1.03  # memory with many steps over that with few
QUERIES = 100  # of one task
FEW_SHOTS = 5
FIXED, CHOSEN = "LogisticRegression", "LogisticRegressionCV"  # of scikit-learn; ours chooses for each task as well


def method_sizes(sizes: Sizes) -> Sizes:
    """The sizes of this file's tasks: 5-shot, with as many features as `method_features` says."""
    return replace(sizes, features=sizes.method_features, shot=FEW_SHOTS)


def model(sizes: Sizes) -> MetaDiff:
    """The analytic one, with the statistics of a bank of other classes."""
    bank = feature_bank(sizes, seed=7)
    return MetaDiff(Metric((sizes.features,), class_statistics(bank.by_class()).task_space()))


def episodes(sizes: Sizes) -> Report:
    """Episodes per second of `evaluate`, beside scikit-learn's logistic regression, task by task."""
    sizes = method_sizes(sizes)
    bank, protocol = feature_bank(sizes, seed=1), Protocol(sizes.way, sizes.shot, sizes.query, sizes.method_episodes)
    metadiff, indices = model(sizes), bank.class_indices()
    method = method_of(metadiff, bank, Sampling(), protocol, CPU, expanded(metadiff.metric, bank, CPU))
    found: dict[str, torch.Tensor] = {}

    def ours() -> int:
        scores = run_through(evaluate(bank, {"m": method}, protocol, CPU))["m"]
        found["ours"] = torch.cat(scores.accuracy)
        return protocol.episodes

    def theirs(name: str, oracle: LogisticRegression | LogisticRegressionCV, count: int) -> int:
        right = []
        for i in range(count):
            e = sample_episode(indices, sizes.way, sizes.shot, sizes.query, seed=protocol.seed, index=i)
            oracle.fit(bank.features[e.support[0].ravel()], np.repeat(np.arange(sizes.way), sizes.shot))
            right.append((oracle.predict(bank.features[e.query[0]]) == e.labels[0]).mean())
        found[name] = torch.tensor(right)
        return count

    few, fewer = max(1, protocol.episodes // 10), max(1, protocol.episodes // 100)  # theirs take longer
    fixed = LogisticRegression(max_iter=1000)
    chosen = LogisticRegressionCV(  # as many values as ours tries, on as many folds
        Cs=len(GUIDANCE_GRID),
        cv=sizes.shot,
        max_iter=1000,
        scoring="neg_log_loss",
        l1_ratios=(0,),
        use_legacy_attributes=False,
    )
    speed = rates({
        "MetaDiff": ours,
        FIXED: partial(theirs, FIXED, fixed, few),
        CHOSEN: partial(theirs, CHOSEN, chosen, fewer),
    }, sizes)  # fmt: skip
    differences = [mean_interval(100 * (found["ours"][: len(found[n])] - found[n])) for n in (FIXED, CHOSEN)]
    return Report(
        f"{sizes.way}-way {sizes.shot}-shot episodes with {sizes.query} queries per class, {sizes.features} features",
        ("method", "episodes/s"), [(name, round(value, 1)) for name, value in speed.items()],
        [Ratio(f"MetaDiff / {FIXED}", speed["MetaDiff"] / speed[FIXED], least=FASTER),
         Ratio(f"MetaDiff / {CHOSEN}", speed["MetaDiff"] / speed[CHOSEN], least=FASTER)],
        tuple(
            f"accuracy, MetaDiff minus {name}: {difference:+.2f} ± {half:.2f} points on {len(found[name])} episodes"
            for name, (difference, half) in zip((FIXED, CHOSEN), differences, strict=True)
        ),
    )  # fmt: skip


def latency(sizes: Sizes) -> Report:
    """One adaptation and QUERIES predictions, from features to probabilities."""
    sizes = method_sizes(sizes)
    z = torch.from_numpy(feature_bank(sizes, seed=1).features)
    metadiff, count = model(sizes), sizes.way * sizes.shot
    rows = torch.arange(count + QUERIES) % len(z)

    def work() -> int:
        x = metadiff.metric.expand(z[rows].unsqueeze(0))
        one_task(metadiff, TaskSupport(x[:, :count], torch.arange(count) % sizes.way)).probabilities(x[:, count:])
        return 1

    milliseconds = 1000 / rates({"one task": work}, sizes)["one task"]
    return Report(
        f"One adaptation, {sizes.way}-way {sizes.shot}-shot, and {QUERIES} predictions, {sizes.features} features",
        ("what", "ms"), [("adaptation and predictions", round(milliseconds, 2))],
        [Ratio("milliseconds", milliseconds, most=LATENCY)],
    )  # fmt: skip


def one_task(metadiff: MetaDiff, support: TaskSupport, steps: int = 10) -> TaskClassifier:
    """The classifier of one task."""
    ranks = torch.arange(support.ways).unsqueeze(0)
    return adapt_tasks(metadiff, support, Sampling(steps), ranks=ranks, seeds=[0])


def many_classes(sizes: Sizes) -> Report:
    """A task of many classes and images, in a process of its own: seconds, and the peak of its memory."""
    seconds, peak = _measured("large task", sizes)
    return Report(
        f"{sizes.method_classes} classes x {sizes.method_images} images, {sizes.method_features} features",
        ("seconds", "peak MB"), [(round(seconds, 2), round(peak))],
        [Ratio("seconds of adaptation and predictions", seconds, most=SECONDS),
         Ratio("peak memory of the process in MB", peak, most=MEGABYTES)],
        (f"adaptation and {QUERIES} predictions; the peak counts imports and features",),
    )  # fmt: skip


def flat(sizes: Sizes) -> Report:
    """Memory of adaptation with few and with many steps: of all tensors at once, and of a process beyond its data."""
    few, many = sizes.fast_steps, sizes.slow_steps
    rows, ratios = [], []
    for what in ("tensors", "process"):
        megabytes = [_measured(f"{what} {steps}", sizes)[1] for steps in (few, many)]
        rows.append((what, *(round(value, 2) for value in megabytes)))
        ratios.append(Ratio(f"{what}: {many} / {few} steps", megabytes[1] / max(megabytes[0], 1e-3), most=FLAT))
    return Report("Memory of adaptation in MB", ("of", f"S = {few}", f"S = {many}"), rows, ratios)


def _measured(what: str, sizes: Sizes) -> tuple[float, float]:
    """Seconds and megabytes of a piece of work in a fresh process."""
    command = [sys.executable, "-m", "tests.benchmarks.method", what, json.dumps(asdict(sizes))]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **EXACT})
    if done.returncode != 0:
        raise RuntimeError(f"measuring {what} failed:\n{done.stderr}")
    seconds, megabytes = json.loads(done.stdout)
    return seconds, megabytes


def _large_task(sizes: Sizes) -> tuple[float, float]:
    sizes = replace(method_sizes(sizes), classes=sizes.method_classes, per_class=sizes.method_images + 1)
    z = torch.from_numpy(feature_bank(sizes, seed=1).features).view(sizes.classes, sizes.per_class, -1)
    metadiff = model(replace(sizes, classes=min(sizes.classes, 64)))
    started = time.perf_counter()
    support = TaskSupport.even(metadiff.metric.expand(z[:, 1:].unsqueeze(0)))
    query = metadiff.metric.expand(z[torch.arange(QUERIES) % len(z), 0].unsqueeze(0))
    one_task(metadiff, support).probabilities(query)
    return time.perf_counter() - started, resident_megabytes(peak=True)


def _steps(sizes: Sizes, steps: int, tensors: bool) -> tuple[float, float]:
    sizes = method_sizes(sizes)
    metadiff = model(sizes)
    z = torch.from_numpy(feature_bank(sizes, seed=1).features)[: sizes.way * sizes.shot].unsqueeze(0)
    tasks = metadiff.metric.expand(z.expand(sizes.batch, -1, -1))
    support = TaskSupport(tasks, torch.arange(z.shape[1]) % sizes.way)
    if tensors:
        return 0.0, adaptation_memory(metadiff, support, steps)
    ranks = torch.arange(sizes.way).expand(sizes.batch, -1)
    forget_peak()
    before = resident_megabytes(peak=False)
    adapt_tasks(metadiff, support, Sampling(steps), ranks=ranks, seeds=[0] * sizes.batch)
    return 0.0, resident_megabytes(peak=True) - before


def _child(what: str, values: dict[str, Any]) -> tuple[float, float]:
    sizes = Sizes(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})
    kind, number = what.split()
    return _large_task(sizes) if kind == "large" else _steps(sizes, int(number), kind == "tensors")


if __name__ == "__main__":
    print(json.dumps(_child(sys.argv[1], json.loads(sys.argv[2]))))
