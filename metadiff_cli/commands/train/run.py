"""What `metadiff pretrain` and `metadiff metatrain` do, from the options to the printed result."""

import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from metadiff_cli.commands.completions import METHODS
from metadiff_cli.commands.evaluate.measure import PICTURES
from metadiff_cli.commands.evaluate.report import write_evaluation_report
from metadiff_cli.commands.evaluate.table import show_result
from metadiff_cli.commands.pages.page import check_page
from metadiff_cli.commands.train.baselines import train_baseline
from metadiff_cli.commands.train.encoder import check_encoder, library_encoder, require_trainable, train_encoder
from metadiff_cli.commands.train.plan import show_plan
from metadiff_cli.commands.train.request import Request
from metadiff_cli.commands.train.run_folder import CHECKPOINT, ENCODER, Run, open_run
from metadiff_cli.commands.train.stages import train_metadiff, verdict
from metadiff_cli.commands.train.training import Start, Training, begin
from metadiff_cli.config.load import encoder_file, resolve
from metadiff_cli.config.schema import Config
from metadiff_cli.console import Screen
from metadiff_cli.core.checkpoints.file import read_header
from metadiff_cli.core.training.distributed import Group, joined
from metadiff_cli.data.open import find_data
from metadiff_cli.errors import ConfigError


def run_pretrain(request: Request) -> None:
    """Do what `metadiff pretrain` is asked for."""
    with joined(os.environ) as group:
        screen = Screen(quiet=request.quiet, verbose=request.verbose, draws=group.rank == 0)
        config = resolve(request.preset, request.config, request.settings, request.flags)
        require_trainable(config, "pretrain")
        if request.dry_run:
            show_plan("pretrain", config, request.data, screen, as_json=request.as_json)
            return
        find_data(config, request.data)  # before anything is written
        if request.init_from is not None:
            read_header(request.init_from)
        with _open_run("pretrain", config, request, group) as run:
            t = begin(config, request.data, run, screen, Start(init=request.init_from))
            trainer, _ = train_encoder(t)
            run.save_manifest(data=t.source.dataset.root, classes=len(t.source.split("train").classes))
        _show_encoder(run.folder / ENCODER, trainer.epoch, trainer.best_value, screen, as_json=request.as_json)


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
            if request.method != "metadiff":
                raise ConfigError("--dry-run plans the training of metadiff alone", hint="leave out one of the two")
            show_plan("metatrain", config, request.data, screen, as_json=request.as_json, encoder=file)
            return
        if request.report is not None:
            check_page(request.report)
        find_data(config, request.data)  # before anything is written
        start = Start.of(file, request.init_from, request.method)
        with _open_run("metatrain", config, request, group) as run:
            t = begin(config, request.data, run, screen, start)
            library = group.on_rank_zero(lambda: library_encoder(config, request.encoder_weights, run, screen))
            result = train_and_measure(t.with_encoder(start.encoder or library), request)
            run.save_json("result.json", result)
            weights = str(request.encoder_weights or file or "") or None
            run.save_manifest(data=t.source.dataset.root, encoder=weights)
        _show(result, request, run, screen)


def _open_run(command: str, config: Config, request: Request, group: Group) -> AbstractContextManager[Run]:
    name = f"{config.name}-encoder" if command == "pretrain" else config.name
    place = request.out or Path("runs") / name
    return open_run(place, command, config, overwrite=request.overwrite, resume=request.resume, group=group)


def _show_encoder(path: Path, epochs: int, validation: float | None, screen: Screen, *, as_json: bool) -> None:
    if as_json:
        document = {"schema": "metadiff.pretrain/1", "encoder": str(path), "epochs": epochs, "validation": validation}
        screen.json(document)
    else:
        shown = "not measured" if validation is None else f"{validation:.1f} %"
        screen.text(f"encoder: {path}  (prototype, 5-way 1-shot, validation classes: {shown})")


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
