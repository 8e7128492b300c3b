"""`metadiff evaluate`: accuracy on episodes, with controls, intervals and paired differences."""

from pathlib import Path
from typing import Annotated, Any

import typer

from metadiff_cli.commands import completions, options
from metadiff_cli.commands.evaluate import compare
from metadiff_cli.config.load import check
from metadiff_cli.config.schema import Config
from metadiff_cli.console import Screen
from metadiff_cli.errors import ConfigError, GateError

EPISODES, COMPARISON, GATES = "Episodes", "Comparison", "Gates, for CI"


def evaluate(
    checkpoint: options.CheckpointFile = None,
    data: options.Data = None,
    split: Annotated[
        str,
        typer.Option(
            "--split",
            metavar="NAME",
            help="Classes: train, val, test or all.",
            autocompletion=completions.splits,
            rich_help_panel=EPISODES,
        ),
    ] = "test",
    way: Annotated[
        int, typer.Option("--way", min=2, metavar="N", help="Classes of an episode.", rich_help_panel=EPISODES)
    ] = 5,
    shot: Annotated[
        int, typer.Option("--shot", min=1, metavar="K", help="Support images of a class.", rich_help_panel=EPISODES)
    ] = 1,
    query: Annotated[
        int, typer.Option("--query", min=1, metavar="N", help="Query images of a class.", rich_help_panel=EPISODES)
    ] = 15,
    episodes: Annotated[
        int, typer.Option("--episodes", min=1, metavar="N", help="Number of episodes.", rich_help_panel=EPISODES)
    ] = 1000,
    controls: Annotated[
        str,
        typer.Option(
            "--controls",
            metavar="NAMES",
            help=f"Comma-separated: {', '.join(completions.CONTROLS)}, or checkpoint files; empty for none.",
            autocompletion=completions.controls,
            rich_help_panel=COMPARISON,
        ),
    ] = "prototype,analytic,untrained",
    transductive: Annotated[
        bool,
        typer.Option(
            "--transductive", help="Let the queries of an episode guide its weights together.", rich_help_panel=EPISODES
        ),
    ] = False,
    imbalance: Annotated[
        float | None,
        typer.Option(
            "--imbalance",
            min=0.01,
            metavar="ALPHA",
            rich_help_panel=EPISODES,
            help=options.shown("Dirichlet parameter of the queries' class balance.", "as many of each class"),
        ),
    ] = None,
    halves: Annotated[
        bool,
        typer.Option(
            "--halves",
            help="Fit guidance and calibration on half of the split's classes, measure on the other half, and swap.",
            rich_help_panel=COMPARISON,
        ),
    ] = False,
    open_set: Annotated[
        bool,
        typer.Option(
            "--open-set",
            help="Also measure how images of classes that a task lacks are rejected.",
            rich_help_panel=COMPARISON,
        ),
    ] = False,
    report: options.Report = None,
    fail_under: Annotated[
        float | None,
        typer.Option(
            "--fail-under",
            min=0,
            max=100,
            metavar="PCT",
            rich_help_panel=GATES,
            help=options.shown("Leave with 5 when accuracy is below this, in percent.", "no gate"),
        ),
    ] = None,
    compare_to: Annotated[
        Path | None,
        typer.Option(
            "--compare",
            help="An earlier --json result; leave with 5 when accuracy dropped beyond both intervals.",
            metavar="FILE",
            rich_help_panel=GATES,
        ),
    ] = None,
    steps: options.Steps = None,
    samples: options.Samples = None,
    temperature: options.Temperature = None,
    guidance: options.Guidance = None,
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
    """Measure a checkpoint on episodes, beside its controls.

    All methods see the same episodes of the same features; accuracies come
    with 95 % intervals and paired differences.

    Examples:

      metadiff evaluate --data ./mini-imagenet --split val --controls prototype

      metadiff evaluate -c runs/mini/checkpoint.safetensors --query 5 --json

      metadiff evaluate --data ./photos --split all --fail-under 60

      metadiff evaluate --data ./photos --split all --open-set
    """
    screen = Screen(quiet=quiet, verbose=verbose)
    options.check_split(split)
    if open_set and imbalance is not None:
        raise ConfigError("--open-set asks for balanced queries", hint="leave out --imbalance or --open-set")
    from metadiff_cli.commands.evaluate.measure import PICTURES, parse_controls, show_result
    from metadiff_cli.core.checkpoints.file import read_header
    from metadiff_cli.core.evaluation.evaluate import Protocol

    names = parse_controls(controls)
    old = compare.read_result(compare_to) if compare_to else None
    if old is not None and compare_to is not None:
        compare.check_comparable(old, compare_to, {
            "way": way, "shot": shot, "query": query, "split": split, "imbalance": imbalance, "halves": halves,
            "protocol": "transductive" if transductive else "inductive",
        })  # fmt: skip
    runtime = options.model_config(
        config, settings, options.runtime_flags(seed, device, threads, num_workers, batch_size),
        options.sampler_flags(steps, samples, temperature, guidance),
    )  # fmt: skip
    protocol = Protocol(way, shot, query, episodes, runtime.seed, transductive, imbalance)
    path = options.checkpoint_path(checkpoint)
    if old is not None and read_header(path)["kind"] == "baseline":
        raise ConfigError("--compare is for the accuracy of metadiff", hint="leave it out with a baseline's checkpoint")
    document = measure_file(
        path, names, runtime, data, split, protocol, screen, halves=halves, open_set=open_set, drawn=report is not None
    )
    if old is not None and compare_to is not None:
        document["compared"] = compare.compare(document, old, compare_to)
    if report is not None:
        from metadiff_cli.commands.evaluate.report import write_evaluation_report

        write_evaluation_report(report, document)
        document.pop(PICTURES, None)
        screen.note(f"report written: {report}")
    if as_json:
        screen.json(document)
    else:
        show_result(document, screen)
        if old is not None:
            screen.text(compare.describe(document))
        screen.detail(f"{document['episodes_per_second']} episodes per second")
    _gate(document, fail_under)
    if old is not None:
        compare.gate(document)


def measure_file(
    path: Path, controls: list[str], runtime: Config, data: Path | None, split: str, protocol: Any, screen: Screen,
    *, halves: bool, open_set: bool = False, drawn: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """The result document of a model or a baseline, beside its controls."""
    from metadiff_cli.commands.evaluate.measure import feature_bank, measure, sampling_of
    from metadiff_cli.commands.train.baselines import FILE, further, mark, measure_method
    from metadiff_cli.core.checkpoints.baseline import load_baseline
    from metadiff_cli.core.checkpoints.file import read_header
    from metadiff_cli.core.checkpoints.model import Model, load_model

    device = options.start(runtime)
    baseline = read_header(path)["kind"] == "baseline"
    if halves and (baseline or any(name.endswith(FILE) for name in controls)):
        raise ConfigError("--halves fits what belongs to a MetaDiff model", hint="leave it out with baselines' files")
    if open_set and baseline:
        raise ConfigError("--open-set measures a MetaDiff model", hint="leave it out with a baseline's checkpoint")
    model = (load_baseline if baseline else load_model)(path, device)
    source = find_source(check(model.header["config"]), runtime, data, screen)
    labels = source.split(split, model.images.size).labels
    name = "metadiff" if isinstance(model, Model) else model.name
    more, statistics = further(controls, name, runtime, source, split, labels, protocol, device, screen)
    if isinstance(model, Model):
        bank = feature_bank(model.images, source, split, runtime, screen)
        document = measure(
            model,
            bank,
            split,
            protocol,
            sampling_of(runtime),
            controls,
            screen,
            more,
            halves=halves,
            open_set=open_set,
            drawn=drawn,
        )
    else:
        document = measure_method(model, controls, runtime, source, split, protocol, screen, more)
    return mark(document, statistics)


def find_source(trained: Config, runtime: Config, data: Path | None, screen: Screen) -> Any:
    """The data set: drawn or found as in training, but a folder that is given and is another one is read as it lies."""
    from metadiff_cli.data.open import open_source
    from metadiff_cli.errors import DataError

    found = trained.data.model_copy(update={"layout": "auto"} if data and trained.data.layout == "glyphs" else {})
    config = runtime.model_copy(update={"data": found, "seed": trained.seed})
    try:
        return open_source(config, data, screen)
    except DataError:
        if data is None or not data.is_dir() or found.layout in ("auto", "folder"):
            raise
        folder = config.model_copy(update={"data": found.model_copy(update={"layout": "folder"})})
        return open_source(folder, data, screen)


def _gate(document: dict[str, Any], fail_under: float | None) -> None:
    accuracy = next(iter(document["methods"].values()))["accuracy"]  # the checkpoint's own comes first
    if fail_under is not None and accuracy < fail_under:
        raise GateError(
            f"accuracy {accuracy:.2f} % is below --fail-under {fail_under:g}", hint="the results above are complete"
        )
