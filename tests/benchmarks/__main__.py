"""`python -m tests.benchmarks [NAME ...] [--json] [--plot FILE.svg] [--SIZE VALUE ...]`, from the checkout's root."""

import argparse
import os
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

import torch

from metadiff_cli.console import Screen
from metadiff_cli.errors import ConfigError
from tests.benchmarks import adapting, images, large, learning, method, soak
from tests.benchmarks.common import TINY, Report, Sizes

BENCHMARKS: dict[str, Callable[[Sizes], Report]] = {
    "training": learning.training,
    "memory": learning.memory,
    "sampling": adapting.sampling,
    "evaluation": adapting.evaluation,
    "episodes": method.episodes,
    "latency": method.latency,
    "many-classes": method.many_classes,
    "flat": method.flat,
    "extraction": images.extraction,
    "pretraining": images.pretraining,
    "adapt": images.adapting,
    "large": large.images,
    "large-bank": large.bank,
    "soak": soak.soak,
}


def build_parser() -> argparse.ArgumentParser:
    """Names, outputs, and an option for each of the sizes."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which: {', '.join(BENCHMARKS)}; all without a name")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("--plot", type=Path, help="write the plot of `memory` there (.svg or .png; needs matplotlib)")
    parser.add_argument("--threads", type=int, help="CPU threads of one operation")
    parser.add_argument("--tiny", action="store_true", help="smallest sizes: whether it runs, not how fast")
    for size in fields(Sizes):
        many = isinstance(size.default, tuple)
        kind: Any = type(size.default[0] if isinstance(size.default, tuple) else size.default)
        assert size.default is not MISSING
        parser.add_argument(f"--{size.name.replace('_', '-')}", type=kind, nargs="+" if many else None, metavar="N",
                            help=f"default: {size.default}")  # fmt: skip
    return parser


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; an unknown name ends the process."""
    parser = build_parser()
    chosen = parser.parse_args(arguments)
    if unknown := [name for name in chosen.names if name not in BENCHMARKS]:
        parser.error(f"unknown benchmark {', '.join(unknown)}; choose from {', '.join(BENCHMARKS)}")
    return chosen


def sizes_of(chosen: argparse.Namespace) -> Sizes:
    """The sizes that were given, over the defaults or the tiny ones."""
    values = asdict(TINY if chosen.tiny else Sizes())
    for name in values:
        given = getattr(chosen, name)
        if given is not None:
            values[name] = tuple(given) if isinstance(given, list) else given
    return Sizes(**values)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what was asked for, one after the other; 0 also when a ratio does not reach what it should."""
    chosen, screen = parse(arguments), Screen()
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
        os.environ["OMP_NUM_THREADS"] = str(chosen.threads)  # of the processes that some benchmarks start
    if chosen.plot:
        _plotting()
    sizes, results = sizes_of(chosen), {}
    for name in chosen.names or BENCHMARKS:
        screen.note(f"benchmark {name}")
        report = BENCHMARKS[name](sizes)
        results[name] = _document(report)
        if not chosen.json:
            show(report, screen)
        if chosen.plot and report.series:
            plot(report, chosen.plot)
            screen.note(f"written: {chosen.plot}")
    document = {"schema": "metadiff.benchmarks/1", "machine": machine(), "sizes": asdict(sizes), "results": results}
    if chosen.json:
        screen.json(document)
    else:
        screen.text(", ".join(f"{key}: {value}" for key, value in document["machine"].items()))
    return 0


def show(report: Report, screen: Screen) -> None:
    """Table, ratios and notes."""
    screen.table(report.title, report.columns, [tuple(str(cell) for cell in row) for row in report.rows])
    for ratio in report.ratios:
        bound = (
            f"at least {ratio.least:g}"
            if ratio.least is not None
            else f"at most {ratio.most:g}"
            if ratio.most is not None
            else ""
        )
        reached = {True: "reached", False: "not reached", None: ""}[ratio.reached]
        screen.text(f"{ratio.name}: {ratio.value:.2f}" + (f" ({bound}: {reached})" if bound else ""))
    for note in report.notes:
        screen.text(note)


def _document(report: Report) -> dict[str, Any]:
    return {
        "title": report.title,
        "rows": [dict(zip(report.columns, row, strict=True)) for row in report.rows],
        "ratios": [{**asdict(ratio), "reached": ratio.reached} for ratio in report.ratios],
        "notes": list(report.notes),
    }


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    facts = {"processor": _processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    return {**facts, "python": platform.python_version(), "torch": torch.__version__}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _plotting() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("--plot needs matplotlib", hint='pip install -e ".[dev]"') from error
    return Figure


def plot(report: Report, path: Path) -> None:
    """The series of a report over inner steps, both axes logarithmic."""
    figure = _plotting()(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, points in report.series.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set(xscale="log", yscale="log", xlabel="inner steps", ylabel="peak memory, MB", title="Meta-training")
    axes.grid(True, which="major", alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ConfigError as problem:
        sys.exit(str(problem))
