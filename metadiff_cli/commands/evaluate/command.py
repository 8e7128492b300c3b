"""The signature of `metadiff evaluate`: accuracy on episodes, with controls, intervals and paired differences."""

from pathlib import Path
from typing import Annotated

from metadiff_cli.commands import completions, options
from metadiff_cli.commands.options import option, path
from metadiff_cli.console import Screen

EPISODES, COMPARISON, GATES = "Episodes", "Comparison", "Gates, for CI"


def evaluate(
    checkpoint: options.CheckpointFile = None,
    data: Annotated[
        list[Path] | None,
        path(
            options.PLACES, "--data", metavar="DIR", default="$METADIFF_DATA_DIR/NAME",
            help="Folder of the data set; repeatable, for a table of several and their mean.",
        ),
    ] = None,
    split: Annotated[
        str | None,
        option(
            EPISODES, "--split", metavar="NAME", default="test", autocompletion=completions.splits,
            help="Classes to measure on: train, val, test or all.",
        ),
    ] = None,
    way: Annotated[
        int | None, option(EPISODES, "--way", metavar="N", min=2, default=5, help="Classes per episode.")
    ] = None,
    shot: Annotated[
        int | None, option(EPISODES, "--shot", metavar="K", min=1, default=1, help="Support images per class.")
    ] = None,
    query: Annotated[
        int | None, option(EPISODES, "--query", metavar="Q", min=1, default=15, help="Query images per class.")
    ] = None,
    episodes: Annotated[
        int | None, option(EPISODES, "--episodes", metavar="N", min=1, default=1000, help="Number of episodes.")
    ] = None,
    transductive: Annotated[
        bool, option(EPISODES, "--transductive", help="Let the query images of an episode guide its weights together.")
    ] = False,
    imbalance: Annotated[
        float | None,
        option(
            EPISODES, "--imbalance", metavar="ALPHA", min=0.01, default="equally many queries per class",
            help="Draw the classes' shares of the queries from a Dirichlet distribution with this parameter.",
        ),
    ] = None,
    controls: Annotated[
        str,
        option(
            COMPARISON, "--controls", metavar="NAMES", autocompletion=completions.controls,
            help=f"Comma-separated: {', '.join(completions.CONTROLS)}, or checkpoint files; empty for none.",
        ),
    ] = "prototype,analytic,logreg",
    halves: Annotated[
        bool,
        option(
            COMPARISON, "--halves",
            help="Fit all settings on one half of the classes, measure on the other half, and swap.",
        ),
    ] = False,
    open_set: Annotated[
        bool,
        option(COMPARISON, "--open-set", help="Also measure how well images of classes outside a task are rejected."),
    ] = False,
    fail_under: Annotated[
        float | None,
        option(
            GATES, "--fail-under", metavar="PCT", min=0, max=100, default="no gate",
            help="Exit with 5 when the accuracy in percent is lower, over several data sets their mean.",
        ),
    ] = None,
    compare_to: Annotated[
        Path | None,
        path(
            GATES, "--compare", metavar="FILE",
            help="Compare with this earlier --json result; exit with 5 when the accuracy is lower and the intervals "
            "lie apart.",
        ),
    ] = None,
    report: options.Report = None,
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
) -> None:  # fmt: skip
    """Measure a checkpoint on episodes, beside its controls.

    All methods see the same episodes of the same features. Accuracies come with
    95 % intervals and with paired differences between methods. Of several data
    sets, each with as many ways and queries as its images allow, the mean is
    shown too; a folder that has no splits is measured on all its classes.

    Examples:

      metadiff evaluate --data ./mini-imagenet --split val --controls prototype

      metadiff evaluate -c runs/mini/checkpoint.safetensors --query 5 --json

      metadiff evaluate --data ./photos --split all --fail-under 60

      metadiff evaluate --data ./photos --split all --open-set

      metadiff evaluate --data ./photos --data ./mini-imagenet --shot 5
    """
    from metadiff_cli.commands.evaluate.run import Request, run

    flags = {
        **options.runtime_flags(seed, device, threads, num_workers, batch_size),
        **options.sampler_flags(steps, samples, temperature, guidance),
        "evaluation.way": way,
        "evaluation.shot": shot,
        "evaluation.query": query,
        "evaluation.episodes": episodes,
    }
    request = Request(
        checkpoint=checkpoint, data=tuple(data or ()), split=split, transductive=transductive, imbalance=imbalance,
        controls=controls, halves=halves, open_set=open_set, fail_under=fail_under, compare_to=compare_to,
        report=report, as_json=as_json,
    )  # fmt: skip
    run(request, config, settings, flags, Screen(quiet=quiet, verbose=verbose))
