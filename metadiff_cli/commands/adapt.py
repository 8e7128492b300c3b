"""`metadiff adapt`: a folder of labelled images per class in, predictions for other images out."""

import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from metadiff_cli.commands import options
from metadiff_cli.config import Config
from metadiff_cli.console import Screen
from metadiff_cli.errors import ConfigError, DataError

if TYPE_CHECKING:
    from metadiff_cli.commands.queries import Queries
    from metadiff_cli.core.adaptation import Prediction, SupportSet
    from metadiff_cli.core.model import SavedClassifier

FORMATS = ("table", "json", "jsonl", "csv")


def adapt(
    query: Annotated[
        list[str], typer.Option("--query", "-Q", help="Folder, file, glob, or - for paths on stdin; may be repeated.")
    ],
    support: Annotated[
        Path | None, typer.Option("--support", "-S", help="Folder with one folder of images per class.")
    ] = None,
    classifier: Annotated[
        Path | None, typer.Option("--classifier", help="A classifier that --save wrote, instead of --support.")
    ] = None,
    checkpoint: options.CheckpointFile = None,
    format: Annotated[str, typer.Option("--format", "-f", help="table, json, jsonl or csv.")] = "table",
    as_json: options.AsJson = False,
    top_k: Annotated[int, typer.Option("--top-k", min=1, help="Classes named per image.")] = 3,
    reject_below: Annotated[
        float | None, typer.Option("--reject-below", min=0, max=1, help="Give no label below this confidence (0..1).")
    ] = None,
    steps: options.Steps = None,
    samples: options.Samples = None,
    temperature: options.Temperature = None,
    guidance: options.Guidance = None,
    transductive: Annotated[
        bool, typer.Option("--transductive", help="Let the query images guide the classifier together.")
    ] = False,
    unlabeled: Annotated[
        Path | None, typer.Option("--unlabeled", help="Folder of further images that guide the classifier.")
    ] = None,
    save: Annotated[
        Path | None,
        typer.Option("--save", help="Write the classifier, for --classifier.", rich_help_panel=options.PLACES),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the file of --save.", rich_help_panel=options.PLACES)
    ] = False,
    config: options.ConfigFile = None,
    settings: options.Settings = None,
    seed: options.Seed = None,
    device: options.Device = None,
    threads: options.Threads = None,
    num_workers: options.NumWorkers = None,
    batch_size: options.BatchSize = None,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Learn the classes of a support folder and label the query images. No training, no GPU.

    Examples:

      metadiff adapt --support ./imgs --query ./q --checkpoint runs/mini/checkpoint.safetensors

      metadiff adapt --support ./imgs --query './q/*.jpg' --checkpoint runs/mini/checkpoint.safetensors --format csv
    """
    screen = Screen(quiet=quiet, verbose=verbose)
    format = "json" if as_json else format
    _check_arguments(format, support, classifier, save, overwrite, transductive or unlabeled is not None)
    resolved = options.model_config(
        config, settings, options.runtime_flags(seed, device, threads, num_workers, batch_size),
        options.sampler_flags(steps, samples, temperature, guidance),
    )  # fmt: skip
    from metadiff_cli.commands.queries import find_queries
    from metadiff_cli.core.model import save_classifier

    queries = find_queries(query)
    source = str(classifier or options.checkpoint_path(checkpoint))
    ready, examples, pooled = _classifier(
        resolved, support, classifier, checkpoint, queries, transductive, unlabeled, screen
    )
    if save is not None:
        save_classifier(save, ready)
        screen.note(f"classifier written: {save}")
    predictions = _predict(resolved, ready, queries, examples, screen)
    head = {
        "schema": "metadiff.adapt/1",
        "classes": list(ready.classes),
        "support": examples.counts() if examples else None,
        "protocol": "transductive" if pooled else "inductive",
        "checkpoint": source,
        "seed": resolved.seed,
        "errors": [{"path": path, "reason": reason} for path, reason in examples.broken] if examples else [],
    }
    labelled = WRITERS[format](screen, head, predictions, top_k, reject_below)
    if queries.skipped:
        screen.note(f"{queries.skipped} query files are no images and were left out")
    if pooled:
        screen.note("transductive: each prediction also depends on the other images")
    if not labelled:
        raise DataError("nothing could be predicted", hint="see the reasons above; give images that can be read")


def _check_arguments(
    format: str, support: Path | None, classifier: Path | None, save: Path | None, overwrite: bool, pooled: bool
) -> None:
    if format not in FORMATS:
        raise ConfigError(f"unknown format '{format}'", hint=f"choose one of {', '.join(FORMATS)}")
    if (support is None) == (classifier is None):
        raise ConfigError("give either --support or --classifier", hint="--support DIR has one folder per class")
    if classifier is not None and pooled:
        raise ConfigError("--transductive and --unlabeled need --support", hint="leave them out with --classifier")
    if save is not None and save.exists() and not overwrite:
        raise ConfigError(f"{save} exists already", hint="add --overwrite or give another name")


def _classifier(
    config: Config, support: Path | None, classifier: Path | None, checkpoint: Path | None, queries: "Queries",
    transductive: bool, unlabeled: Path | None, screen: Screen,
) -> tuple["SavedClassifier", "SupportSet | None", bool]:  # fmt: skip
    """The classifier, from a file or adapted now; the support it was made of; whether unlabelled images guided it."""
    from metadiff_cli.commands.learning import sampling_of
    from metadiff_cli.commands.queries import find_queries
    from metadiff_cli.core.adaptation import adapt_classifier, read_images, read_support
    from metadiff_cli.core.model import load_classifier, load_model

    device = options.start(config)
    if classifier is not None:
        return load_classifier(classifier, device), None, False
    assert support is not None
    model = load_model(options.checkpoint_path(checkpoint), device)
    workers = config.runtime.num_workers
    examples = read_support(support, model.images, workers=workers)
    for path, reason in examples.broken:
        screen.warn(f"support image {path} is left out: {reason}")
    pool = list(queries.paths) if transductive else []
    pool += find_queries([str(unlabeled)]).paths if unlabeled else []
    features = None
    if pool:
        with screen.progress("reading unlabelled images") as advance:
            features = read_images(pool, model.images, config.runtime.batch_size, workers=workers, progress=advance)
    ready = adapt_classifier(model, examples, sampling_of(config), seed=config.seed, pool=features)
    return ready, examples, features is not None


def _predict(
    config: Config, ready: "SavedClassifier", queries: "Queries", examples: "SupportSet | None", screen: Screen
) -> Iterator["Prediction"]:
    """Predictions in the order of the queries, with progress; support images among the queries are named."""
    from metadiff_cli.core.adaptation import Prediction, predict_images

    for path in queries.missing:
        yield Prediction(str(path), None, "does not exist")
    known = examples.digests if examples else {}
    twins = 0
    with screen.progress("predicting") as advance:
        done = predict_images(
            ready, queries.paths, config.runtime.batch_size, known, workers=config.runtime.num_workers
        )
        for i, prediction in enumerate(done):
            advance(i + 1, len(queries.paths))
            twins += prediction.twin is not None
            if prediction.twin is not None and twins <= 5:
                screen.warn(f"query {prediction.path} is also in the support ({prediction.twin})")
            yield prediction
    if twins > 5:
        screen.warn(f"{twins} query images are also in the support")


def _entry(prediction: "Prediction", classes: list[str], top_k: int, reject_below: float | None) -> dict[str, Any]:
    """The JSON of one prediction."""
    assert prediction.probabilities is not None
    order = sorted(range(len(classes)), key=lambda i: (-prediction.probabilities[i], i))  # type: ignore[index]
    top = [{"label": classes[i], "confidence": round(prediction.probabilities[i], 6)} for i in order[:top_k]]
    best = prediction.probabilities[order[0]]
    rejected = reject_below is not None and best < reject_below
    label = None if rejected else classes[order[0]]
    return {"path": prediction.path, "label": label, "confidence": round(best, 6), "rejected": rejected, "top": top}


Writer = Callable[[Screen, dict[str, Any], Iterator["Prediction"], int, float | None], int]


def _write_json(
    screen: Screen, head: dict[str, Any], predictions: Iterator["Prediction"], top_k: int, reject: float | None
) -> int:
    entries: list[dict[str, Any]] = []
    errors = list(head.pop("errors"))
    for p in predictions:
        if p.probabilities is None:
            errors.append({"path": p.path, "reason": p.reason})
        else:
            entries.append(_entry(p, head["classes"], top_k, reject))
    screen.json({**head, "predictions": entries, "errors": errors})
    return len(entries)


def _write_jsonl(
    screen: Screen, head: dict[str, Any], predictions: Iterator["Prediction"], top_k: int, reject: float | None
) -> int:
    count = 0
    for p in predictions:
        good = p.probabilities is not None
        line = _entry(p, head["classes"], top_k, reject) if good else {"path": p.path, "error": p.reason}
        screen.text(json.dumps(line, ensure_ascii=False))
        count += good
    return count


def _write_csv(
    screen: Screen, head: dict[str, Any], predictions: Iterator["Prediction"], top_k: int, reject: float | None
) -> int:
    screen.text("path,label,confidence,rejected,error")
    count = 0
    for p in predictions:
        row: list[object] = [p.path, "", "", "", p.reason]
        if p.probabilities is not None:
            e = _entry(p, head["classes"], top_k, reject)
            row = [p.path, e["label"] or "", f"{e['confidence']:.6f}", str(e["rejected"]).lower(), ""]
            count += 1
        line = io.StringIO()
        csv.writer(line, lineterminator="").writerow(row)
        screen.text(line.getvalue())
    return count


def _write_table(
    screen: Screen, head: dict[str, Any], predictions: Iterator["Prediction"], top_k: int, reject: float | None
) -> int:
    rows, errors = [], []
    for p in predictions:
        if p.probabilities is None:
            errors.append(f"{p.path}: {p.reason}")
            continue
        e = _entry(p, head["classes"], top_k, reject)
        runners = ", ".join(f"{t['label']} {t['confidence']:.0%}" for t in e["top"][1:])
        rows.append((p.path, e["label"] if e["label"] is not None else "(rejected)", f"{e['confidence']:.1%}", runners))
    if rows:
        title = f"{len(rows)} images, {len(head['classes'])} classes"
        screen.table(title, ("image", "label", "confidence", "runners-up"), rows, left=2)
    for line in errors:
        screen.warn(f"no prediction for {line}")
    return len(rows)


WRITERS: dict[str, Writer] = {"json": _write_json, "jsonl": _write_jsonl, "csv": _write_csv, "table": _write_table}
