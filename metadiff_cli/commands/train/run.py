"""What `metadiff pretrain` and `metadiff metatrain` do, from the options to the printed result."""

import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metadiff_cli.commands.completions import METHODS
from metadiff_cli.commands.evaluate.measure import PICTURES
from metadiff_cli.commands.evaluate.report import write_evaluation_report
from metadiff_cli.commands.evaluate.table import show_result
from metadiff_cli.commands.pages.page import check_page
from metadiff_cli.commands.train.baselines import train_baseline
from metadiff_cli.commands.train.data import Data, check_data, folders_of
from metadiff_cli.commands.train.encoder import (
    check_encoder,
    image_size,
    library_encoder,
    require_trainable,
    train_encoder,
    validation_way,
)
from metadiff_cli.commands.train.plan import show_plan
from metadiff_cli.commands.train.run_folder import CHECKPOINT, ENCODER, RESULT, Run, open_run
from metadiff_cli.commands.train.stages import train_metadiff, verdict
from metadiff_cli.commands.train.training import StartingWeights, Training, begin
from metadiff_cli.config.load import encoder_file, resolve
from metadiff_cli.config.schema import Config, is_pretrained
from metadiff_cli.console import Screen
from metadiff_cli.core.baselines.learners import ON_IMAGES
from metadiff_cli.core.checkpoints.model import load_encoder
from metadiff_cli.core.device import CPU
from metadiff_cli.core.distributed import Group, joined
from metadiff_cli.errors import ConfigError


@dataclass(frozen=True)
class Request:
    """What was asked for: the options of both commands, then those that `metatrain` alone has."""

    preset: str | None
    config: Path | None
    settings: Sequence[str]
    flags: Mapping[str, object]  # options that are configuration keys; None where one is not given
    data: Data
    out: Path | None
    overwrite: bool
    resume: bool
    init_from: Path | None
    dry_run: bool
    as_json: bool
    quiet: bool
    verbose: bool
    encoder: str | None = None
    encoder_weights: Path | None = None
    method: str = "metadiff"
    report: Path | None = None


def run_pretrain(request: Request) -> None:
    """Do what `metadiff pretrain` is asked for."""
    with joined(os.environ) as group:
        screen = Screen(quiet=request.quiet, verbose=request.verbose, draws=group.rank == 0)
        config = resolve(request.preset, request.config, request.settings, request.flags)
        require_trainable(config, "pretrain")
        if request.dry_run:
            show_plan("pretrain", config, request.data, screen, as_json=request.as_json)
            return
        data = folders_of(request.data, config)
        if request.init_from is not None:
            load_encoder(request.init_from, CPU, views=1)
        stages = ("data", "pretrain")
        with _open_run(stages, "pretrain", config, request, data, group) as run:
            t = begin(config, request.data, run, screen, StartingWeights(init=request.init_from))
            t = t.fitted_to_data(stages, config.data.size)  # so all inputs can be opened
            _note(group.on_rank_zero(lambda: run.begin(config)), run, screen)
            trainer, _ = train_encoder(t)
            way = validation_way(t)
            run.save_manifest(data=t.source.dataset.root, classes=len(t.source.split("train").classes))
        _show_encoder(run.folder / ENCODER, trainer.epoch, trainer.best_value, way, screen, as_json=request.as_json)


def run_metatrain(request: Request) -> None:
    """Do what `metadiff metatrain` is asked for."""
    with joined(os.environ) as group:
        screen = Screen(quiet=request.quiet, verbose=request.verbose, draws=group.rank == 0)
        if request.method not in METHODS:
            raise ConfigError(f"unknown method '{request.method}'", hint=f"choose one of {', '.join(METHODS)}")
        file = encoder_file(request.encoder)
        flags = {**request.flags, "encoder": None if file else request.encoder}
        config = resolve(request.preset, request.config, request.settings, flags)
        check_encoder(config, request.method, file, request.encoder_weights)
        if request.dry_run:
            check_data(request.data, config, request.method, file)
            if request.method != "metadiff":
                raise ConfigError("--dry-run plans the training of metadiff alone", hint="leave out one of the two")
            show_plan("metatrain", config, request.data, screen, as_json=request.as_json, encoder=file)
            return
        if request.report is not None:
            check_page(request.report)
        start = StartingWeights.of(file, request.init_from, request.method, config.denoiser.kind)
        check_data(request.data, config, request.method, start.encoder, report=request.report is not None)
        data = folders_of(request.data, config)
        stages = _stages(config, request.method, start)
        with _open_run(stages, "metatrain", config, request, data, group) as run:
            t = begin(config, request.data, run, screen, start)
            t = t.fitted_to_data(stages, image_size(config, start.encoder))  # so all inputs can be opened
            left, library = group.on_rank_zero(lambda: _begin_run(config, request, run, start, screen))
            _note(left, run, screen)
            result = train_and_measure(t.with_encoder(start.encoder or library), request)
            run.save_json(RESULT, result)
            weights = str(request.encoder_weights or file or "") or None
            further = {"further_data": [source.dataset.root for source in t.further]} if t.further else {}
            run.save_manifest(data=t.source.dataset.root, **further, encoder=weights)
        _show(result, request, run, screen)


def _open_run(
    stages: tuple[str, ...], command: str, config: Config, request: Request, data: Sequence[Path], group: Group
) -> AbstractContextManager[Run]:
    name = f"{config.name}-encoder" if command == "pretrain" else config.name
    place = request.out or Path("runs") / name
    inputs = [*data, request.config, encoder_file(request.encoder), request.encoder_weights, request.init_from]
    return open_run(
        place, command, config, overwrite=request.overwrite, resume=request.resume,
        inputs=[path for path in inputs if path is not None], stages=stages, group=group,
    )  # fmt: skip


def _stages(config: Config, method: str, start: StartingWeights) -> tuple[str, ...]:
    """The stages of a `metatrain`, by the names of DEPENDS."""
    if method in ON_IMAGES:
        return ("data", method)
    if start.encoder is not None:
        return ("data", "features", method)
    return ("data", "library" if is_pretrained(config.encoder) else "pretrain", "features", method)


def _begin_run(
    config: Config, request: Request, run: Run, start: StartingWeights, screen: Screen
) -> tuple[list[str], Path | None]:
    """Begin the run, with a library's encoder in it if one is asked for; what stays of other files, and its path.

    A resumed run takes the encoder file that it has.
    """
    path = run.folder / ENCODER
    if start.encoder is not None or not is_pretrained(config.encoder):
        return run.begin(config), None
    if path.is_file() and not run.overwrite:
        return run.begin(config), path
    library = library_encoder(config, request.encoder_weights, screen)
    return run.begin(config), library.save(run)


def _note(left: list[str], run: Run, screen: Screen) -> None:
    if left:
        screen.note(f"other files stay in {run.folder}: {', '.join(left)}")


def _show_encoder(
    path: Path, epochs: int, validation: float | None, way: int, screen: Screen, *, as_json: bool
) -> None:
    if as_json:
        document = {"schema": "metadiff.pretrain/1", "encoder": str(path), "epochs": epochs, "validation": validation}
        screen.json(document)
    else:
        shown = "not measured" if validation is None else f"{validation:.1f} %"
        screen.text(f"encoder: {path}  (prototype, {way}-way 1-shot, validation classes: {shown})")


def _show(result: dict[str, Any], request: Request, run: Run, screen: Screen) -> None:
    path = run.folder / CHECKPOINT
    if request.as_json:
        screen.json({**result, "checkpoint": str(path)})
        return
    show_result(result, screen)
    if request.method == "metadiff":
        screen.text(f"learned part: {verdict(result['learned'])}")
    screen.text(f"checkpoint: {path}")


def train_and_measure(t: Training, request: Request) -> dict[str, Any]:
    """Train the method that was asked for and write its report; returns the result document."""
    if request.method == "metadiff":
        result = train_metadiff(t, drawn=request.report is not None)
    else:
        result = train_baseline(t, request.method)
    if request.report is not None:
        page = request.report
        t.group.on_rank_zero(lambda: _write_report(page, result, t))
        t.screen.note(f"report written: {page}")
    result.pop(PICTURES, None)
    return result


def _write_report(path: Path, result: dict[str, Any], t: Training) -> None:
    """The page of a training: its curves, and the results of its end."""
    metrics, before = t.run.read_metrics("metatrain"), t.run.read_metrics("pretrain")
    write_evaluation_report(path, result, metrics, before, title=f"metadiff: training of {t.config.name}")
