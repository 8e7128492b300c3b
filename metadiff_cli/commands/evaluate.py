"""`metadiff evaluate`: accuracy on episodes, with controls, intervals and paired differences."""

from pathlib import Path
from typing import Annotated, Any

import typer

from metadiff_cli.commands import compare, completions, options
from metadiff_cli.config import Config, check
from metadiff_cli.console import Screen
from metadiff_cli.errors import ConfigError, GateError

SPLIT_NAMES = completions.SPLITS


def evaluate(
    checkpoint: options.CheckpointFile = None,
    data: options.Data = None,
    split: Annotated[
        str, typer.Option("--split", help="train, val, test or all.", autocompletion=completions.splits)
    ] = "test",
    way: Annotated[int, typer.Option("--way", min=2, help="Classes of an episode.")] = 5,
    shot: Annotated[int, typer.Option("--shot", min=1, help="Support images of a class.")] = 1,
    query: Annotated[int, typer.Option("--query", min=1, help="Query images of a class.")] = 15,
    episodes: Annotated[int, typer.Option("--episodes", min=1, help="Number of episodes.")] = 1000,
    controls: Annotated[
        str,
        typer.Option(
            "--controls",
            help="Comma-separated names, see the README; empty for none.",
            autocompletion=completions.controls,
        ),
    ] = "prototype,analytic,untrained",
    transductive: Annotated[
        bool, typer.Option("--transductive", help="Let the queries of an episode guide its weights together.")
    ] = False,
    imbalance: Annotated[
        float | None, typer.Option("--imbalance", min=0.01, help="Dirichlet parameter of the queries' class balance.")
    ] = None,
    halves: Annotated[
        bool,
        typer.Option(
            "--halves",
            help="Fit guidance and calibration on half of the split's classes, measure on the other half, and swap.",
        ),
    ] = False,
    report: options.Report = None,
    fail_under: Annotated[
        float | None,
        typer.Option("--fail-under", min=0, max=100, help="Leave with 5 when MetaDiff is below (percent)."),
    ] = None,
    compare_to: Annotated[
        Path | None,
        typer.Option(
            "--compare", help="An earlier --json result; leave with 5 when accuracy dropped beyond both intervals."
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
    """Measure a checkpoint on episodes of a data set, beside its controls, all on the same episodes.

    Examples:

      metadiff evaluate --checkpoint runs/mini/checkpoint.safetensors --data ./mini-imagenet --split val --shot 5

      metadiff evaluate --checkpoint runs/glyphs-5w1s/checkpoint.safetensors --fail-under 70 --json
    """
    screen = Screen(quiet=quiet, verbose=verbose)
    if split not in SPLIT_NAMES:
        raise ConfigError(f"unknown split '{split}'", hint=f"choose one of {', '.join(SPLIT_NAMES)}")
    from metadiff_cli.commands.learning import feature_bank, measure, parse_controls, sampling_of, show_result
    from metadiff_cli.core.evaluation import Protocol
    from metadiff_cli.core.model import load_model

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
    model = load_model(options.checkpoint_path(checkpoint), options.start(runtime))
    trained = check(model.header["config"])
    source = find_source(trained, runtime, data, screen)
    bank = feature_bank(model.images, source, split, runtime, screen)
    protocol = Protocol(way, shot, query, episodes, runtime.seed, transductive, imbalance)
    document = measure(model, bank, split, protocol, sampling_of(runtime), names, screen, halves=halves)
    if old is not None and compare_to is not None:
        document["compared"] = compare.compare(document, old, compare_to)
    if report is not None:
        from metadiff_cli.commands.evaluation_report import write_evaluation_report

        write_evaluation_report(report, document)
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


def find_source(trained: Config, runtime: Config, data: Path | None, screen: Screen) -> Any:
    """The data set: drawn or found as in training, but a folder that is given and is another one is read as it lies."""
    from metadiff_cli.commands.workspace import open_source
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
    accuracy = document["methods"]["metadiff"]["accuracy"]
    if fail_under is not None and accuracy < fail_under:
        raise GateError(
            f"accuracy {accuracy:.2f} % is below --fail-under {fail_under:g}", hint="the results above are complete"
        )
