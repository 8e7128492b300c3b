"""`metadiff metatrain`: fit task space and denoiser on the base classes; ends with a checkpoint and a table."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from metadiff_cli.commands import completions, options
from metadiff_cli.commands.train import baselines as methods
from metadiff_cli.commands.train.pretrained import check_encoder, pretrained_file
from metadiff_cli.config.load import encoder_file, resolve
from metadiff_cli.config.schema import Config
from metadiff_cli.console import Screen
from metadiff_cli.core.training.world import world
from metadiff_cli.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from metadiff_cli.commands.train.run_folder import Run, Source
    from metadiff_cli.commands.train.starting import Start
    from metadiff_cli.core.encoders.bank import FeatureBank
    from metadiff_cli.core.encoders.image_encoder import ImageEncoder
    from metadiff_cli.core.method.adapt import MetaDiff
    from metadiff_cli.core.method.task_space import TaskSpace
    from metadiff_cli.core.training.metatrain import MetaStep, MetaTrainer, MetaValidation

METHODS = completions.METHODS


def metatrain(
    preset: options.Preset = None,
    data: options.Data = None,
    encoder: options.EncoderOption = None,
    encoder_weights: options.EncoderWeights = None,
    method: Annotated[
        str,
        typer.Option(
            "--method",
            metavar="NAME",
            help=f"What is trained: {', '.join(METHODS)}.",
            autocompletion=completions.methods,
            rich_help_panel=options.TRAINING,
        ),
    ] = "metadiff",
    out: options.Out = None,
    overwrite: options.Overwrite = False,
    resume: options.Resume = False,
    init_from: options.InitFrom = None,
    report: options.Report = None,
    dry_run: options.DryRun = False,
    config: options.ConfigFile = None,
    settings: options.Settings = None,
    seed: options.Seed = None,
    device: options.Device = None,
    threads: options.Threads = None,
    num_workers: options.NumWorkers = None,
    batch_size: options.BatchSize = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Train MetaDiff on base classes, and measure it.

    Without an encoder it takes the one of the same preset and data, or trains
    it first; those of torchvision and timm come trained. The checkpoint serves
    any number of classes and of images each. With --method, a gradient-based
    baseline is trained instead.

    Examples:

      metadiff metatrain --preset glyphs-5w1s

      metadiff metatrain --preset mini-5w5s --data ./mini-imagenet -o runs/5w5s

      metadiff metatrain --preset glyphs-5w1s --method anil-frozen -o runs/anil

      metadiff metatrain --preset glyphs-5w1s --report glyphs.html
    """
    screen = Screen(quiet=quiet, verbose=verbose)
    if method not in METHODS:
        raise ConfigError(f"unknown method '{method}'", hint=f"choose one of {', '.join(METHODS)}")
    file = encoder_file(encoder)
    flags = options.runtime_flags(seed, device, threads, num_workers, batch_size)
    resolved = resolve(preset, config, settings or (), {**flags, "encoder": None if file else encoder})
    check_encoder(resolved, method, file, encoder_weights)
    if dry_run and method != "metadiff":
        raise ConfigError("--dry-run plans the training of metadiff alone", hint="leave out --dry-run or --method")
    if dry_run:
        from metadiff_cli.commands.train.plan import show_plan

        return show_plan("metatrain", resolved, data, screen, as_json=as_json, encoder=file)
    from metadiff_cli.commands.evaluate.measure import PICTURES
    from metadiff_cli.commands.evaluate.table import show_result
    from metadiff_cli.commands.train.run_folder import CHECKPOINT, find_data, open_run, open_source
    from metadiff_cli.commands.train.starting import Start
    from metadiff_cli.core.training.distributed import on_main

    find_data(resolved, data)  # before anything is written
    start = Start.of(file, init_from, method)
    place = out or Path("runs") / resolved.name
    with open_run(place, "metatrain", resolved, overwrite=overwrite, resume=resume) as run:
        source = open_source(resolved, data, screen)
        library = start.encoder or on_main(lambda: pretrained_file(resolved, encoder_weights, run, screen))
        start = replace(start, encoder=library)
        if method == "metadiff":
            result = train_model(resolved, source, run, start, screen, drawn=report is not None)
        else:
            result = methods.train_method(method, resolved, source, run, start, screen)
        if report is not None:
            on_main(lambda: write_training_report(report, result, run, resolved.name))
            screen.note(f"report written: {report}")
        result.pop(PICTURES, None)
        run.save_json("result.json", result)
        run.save_manifest(data=source.dataset.root, encoder=str(encoder_weights or file or "") or None)
    if as_json:
        screen.json({**result, "checkpoint": str(run.folder / CHECKPOINT)})
        return
    show_result(result, screen)
    if method == "metadiff":
        screen.text(f"learned part: {_verdict(result['learned'])}")
    screen.text(f"checkpoint: {run.folder / CHECKPOINT}")


def write_training_report(path: Path, result: dict[str, Any], run: "Run", name: str) -> None:
    """The page of a training: its curves, and the results of its end."""
    from metadiff_cli.commands.evaluate.report import write_evaluation_report

    metrics, before = run.read_metrics("metatrain"), run.read_metrics("pretrain")
    write_evaluation_report(path, result, metrics, before, title=f"metadiff: training of {name}")


def train_model(
    config: Config, source: "Source", run: "Run", start: "Start", screen: Screen, *, drawn: bool = False
) -> dict[str, Any]:
    """All stages; returns the result document with what became of the learned part under `learned`.

    With `drawn`, it also holds what only a page draws.
    """
    from metadiff_cli.commands.evaluate.measure import feature_bank, measure, sampling_of
    from metadiff_cli.commands.train.card import model_card
    from metadiff_cli.commands.train.run_folder import CHECKPOINT
    from metadiff_cli.core.checkpoints.model import Model, save_model
    from metadiff_cli.core.evaluation.evaluate import Protocol
    from metadiff_cli.core.training.distributed import on_main

    images = _encoder(config, source, run, start, screen)
    base = feature_bank(images, source, "train", config, screen)
    val = feature_bank(images, source, "val", config, screen) if source.has("val") else None
    identity = start.identity(config, "metadiff", source, images)
    metadiff, learned, kind = _learn(config, images, base, val, run, screen, start, identity)
    header: dict[str, Any] = {
        "config": config.model_dump(mode="json", exclude={"runtime"}),
        "classes": list(base.classes),
        "denoiser": {**config.denoiser.model_dump(mode="json"), "kind": kind},
    }
    split = "test" if source.has("test") else "val" if val is not None else "train"
    bank = feature_bank(images, source, split, config, screen)
    e = config.evaluation
    model = Model(images, metadiff, header)
    results: list[dict[str, Any]] = []
    for shot in dict.fromkeys((e.shot, *e.card_shots)):
        protocol = Protocol(e.way, shot, e.query, e.episodes, config.seed)
        controls = ("prototype", "analytic", "untrained")
        wanted = drawn and not results
        results.append(measure(model, bank, split, protocol, sampling_of(config), controls, screen, drawn=wanted))
    result = results[0]
    header["card"] = model_card(config, images, len(base.classes), results, _verdict(learned))
    result["learned"] = learned
    metrics = {"methods": result["methods"], "split": split, "learned": learned}
    metrics |= {key: result[key] for key in ("way", "shot", "query", "episodes", "seed")}
    on_main(lambda: save_model(run.folder / CHECKPOINT, images, metadiff, {**header, "metrics": metrics}))
    return result


def frozen_parts(
    config: Config, source: "Source", run: "Run", start: "Start", screen: Screen
) -> tuple["ImageEncoder", "FeatureBank", "FeatureBank | None", "MetaDiff"]:
    """Encoder, features of base and validation classes, and the analytic metadiff: where a baseline starts."""
    from metadiff_cli.commands.evaluate.measure import feature_bank

    images = _encoder(config, source, run, start, screen)
    base = feature_bank(images, source, "train", config, screen)
    val = feature_bank(images, source, "val", config, screen) if source.has("val") else None
    analytic = config.model_copy(update={"denoiser": config.denoiser.model_copy(update={"kind": "analytic"})})
    metadiff, _, _ = _learn(analytic, images, base, val, run, screen, start, {})
    return images, base, val, metadiff


def _encoder(config: Config, source: "Source", run: "Run", start: "Start", screen: Screen) -> "ImageEncoder":
    """The encoder that was given, else the kept one of these settings and images, else a new one."""
    from metadiff_cli.commands.train.pretrain import pretrain_encoder
    from metadiff_cli.commands.train.resume import file_digest
    from metadiff_cli.commands.train.run_folder import ENCODER, encoder_key
    from metadiff_cli.core.checkpoints.model import load_encoder
    from metadiff_cli.core.device import keep_freed_memory, pick_device, set_threads
    from metadiff_cli.core.training.distributed import on_main
    from metadiff_cli.files import copy_file

    keep_freed_memory()
    set_threads(config.runtime.threads)
    device = pick_device(config.runtime.device)
    file = start.encoder
    if file is None:
        val = source.split("val") if source.has("val") else None
        key = encoder_key(config, source.split("train"), val, file_digest(start.init))
        file, there = on_main(lambda: _kept(key))
        if there:
            screen.note("taking the encoder that these settings and images gave before")
        else:
            _, file = pretrain_encoder(config, source, run, screen, start.init)
    f = config.features
    images = load_encoder(file, device, mirror=f.mirror, shift=f.shift, half=f.half, size=f.size)
    if world().main and file.resolve() != (run.folder / ENCODER).resolve():
        copy_file(file, run.folder / ENCODER)
    return images


def _kept(key: str) -> tuple[Path, bool]:
    """Where the encoder of a key is kept, and whether it is there."""
    from metadiff_cli.commands.train.run_folder import kept_encoder

    path = kept_encoder(key)
    return path, path.is_file()


def _learn(
    config: Config,
    images: "ImageEncoder",
    base: "FeatureBank",
    val: "FeatureBank | None",
    run: "Run",
    screen: Screen,
    start: "Start",
    identity: dict[str, Any],
) -> tuple["MetaDiff", dict[str, Any], str]:
    """Task space, denoiser and tuning; what became of the learned part; the kind of denoiser that is kept."""
    from metadiff_cli.core.method.adapt import MetaDiff, Tuning
    from metadiff_cli.core.method.denoisers import AnalyticDenoiser
    from metadiff_cli.core.method.guidance import shared_of
    from metadiff_cli.core.training.fit import fit_tuning

    kind = config.denoiser.kind
    space, means = (_paper_space if kind == "paper" else _task_space)(config, base, val, images.device, screen)
    targets = space.to_task(means.float().to(images.device))
    metadiff = MetaDiff(space, AnalyticDenoiser(), False, Tuning(shared=shared_of(kind)), targets)
    learned: dict[str, Any] = {"kind": kind, "kept": False, "gain": None, "ci95": None}
    if kind != "analytic":
        metadiff, learned = _train_denoiser(
            config, metadiff, base, means, val, run, screen, images.device, start, identity
        )
    if val is not None:
        metadiff = metadiff.tuned(
            fit_tuning(metadiff, val, images.device, seed=config.seed, query=config.evaluation.query)
        )
    else:
        screen.warn("no validation classes: guidance and confidence keep their defaults, and nothing is selected")
    return metadiff, learned, kind if learned["kept"] else "analytic"


def _task_space(
    config: Config, base: "FeatureBank", val: "FeatureBank | None", device: Any, screen: Screen
) -> tuple["TaskSpace", "Tensor"]:
    """The task space of the base classes, its shrinkage as configured or as validation classes prefer; their means."""
    from metadiff_cli.core.method.task_space import class_statistics
    from metadiff_cli.core.training.distributed import on_main
    from metadiff_cli.core.training.fit import SHRINKAGE, choose_shrinkage

    statistics = on_main(lambda: class_statistics(base.by_class()))
    shrink, floor = config.space.shrink, config.space.floor
    if shrink == "auto":
        shrink = SHRINKAGE[0]
        if val is not None:
            shrink = choose_shrinkage(statistics, floor, val, device, seed=config.seed)
            screen.detail(f"shrinkage {shrink[0]:g} within classes and {shrink[1]:g} between, by validation classes")
    return on_main(lambda: statistics.task_space(*shrink, floor)).to(device), statistics.means


def _paper_space(
    config: Config, base: "FeatureBank", val: "FeatureBank | None", device: Any, screen: Screen
) -> tuple["TaskSpace", "Tensor"]:
    from metadiff_cli.core.method.task_space import class_means, identity_space

    means = class_means(base.by_class())
    return identity_space(means.unsqueeze(1)).to(device), means  # each class as its mean alone: its space is the same


def _train_denoiser(
    config: Config, metadiff: "MetaDiff", base: "FeatureBank", means: "Tensor", val: "FeatureBank | None", run: "Run",
    screen: Screen, device: Any, start: "Start", identity: dict[str, Any],
) -> tuple["MetaDiff", dict[str, Any]]:  # fmt: skip
    """Train, select by the paired gain over `analytic`, and confirm the choice on fresh episodes."""
    from metadiff_cli.commands.train.resume import follow
    from metadiff_cli.commands.train.run_folder import STATE
    from metadiff_cli.core.evaluation.evaluate import Protocol
    from metadiff_cli.core.training.fit import paired_gain
    from metadiff_cli.core.training.metatrain import MetaTrainer

    trainer = MetaTrainer(
        base, metadiff.space, config.denoiser, config.metatrain, seed=config.seed, device=device, means=means
    )
    start.begin(trainer, config)
    e, m = config.evaluation, config.metatrain
    selection = Protocol(e.way, e.shot, e.query, m.validation_episodes, config.seed + 1)

    def validate(denoiser: Any) -> tuple[float, float] | None:
        if val is None:
            return None
        return paired_gain(replace(metadiff, denoiser=denoiser, learned=True), val, selection, device)

    follow(
        trainer, validate, partial(_show, run, trainer, screen), label="meta-training", state=run.folder / STATE,
        identity=identity, screen=screen,
    )  # fmt: skip
    candidate = replace(metadiff, denoiser=trainer.chosen(), learned=True)
    learned: dict[str, Any] = {"kind": config.denoiser.kind, "kept": val is None, "gain": None, "ci95": None}
    if val is not None:
        fresh = replace(selection, seed=config.seed + 2, episodes=max(m.validation_episodes, 1000))
        gain, ci95 = paired_gain(candidate, val, fresh, device)
        # `paper` is kept whatever it gives: it is there to be measured
        learned |= {"gain": round(gain, 4), "ci95": round(ci95, 4), "episodes": fresh.episodes}
        learned["kept"] = gain - ci95 > 0 or config.denoiser.kind == "paper"
    return candidate if learned["kept"] else metadiff, learned


def _show(run: "Run", trainer: "MetaTrainer", screen: Screen, record: "MetaStep | MetaValidation", update: Any) -> bool:
    from metadiff_cli.commands.train.resume import show_step
    from metadiff_cli.core.training.metatrain import MetaValidation

    measured = None
    if isinstance(record, MetaValidation):
        measured = "" if record.gain is None else f"  gain over analytic {record.gain:+.2f} ± {record.ci95:.2f}"
    return show_step(run, trainer.history, screen, record, update, measured)


def _verdict(learned: dict[str, Any]) -> str:
    """One sentence on whether the learned part helped."""
    if learned["kind"] == "analytic":
        return "none was asked for; the denoiser is the analytic one"
    if learned["gain"] is None:
        return "kept unmeasured, as there are no validation classes"
    gain = f"{learned['gain']:+.2f} ± {learned['ci95']:.2f} points over analytic on validation classes"
    if learned["kept"]:
        helped = "helped" if learned["gain"] - learned["ci95"] > 0 else "did not help, but is kept as asked"
        return f"{learned['kind']}: {helped}, {gain}"
    return f"{learned['kind']}: did not help ({gain}); the checkpoint holds the analytic denoiser"
