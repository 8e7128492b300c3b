"""The stages of `metadiff evaluate`: check what is asked for, open model and data, measure, show the result."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metadiff_cli.classify.classifier import require_posterior
from metadiff_cli.commands.evaluate import compare
from metadiff_cli.commands.evaluate.domains import Domain, check_different, domain_of, domains_document, known_classes
from metadiff_cli.commands.evaluate.measure import PICTURES, measure, measure_baseline
from metadiff_cli.commands.evaluate.methods import FILE, feature_bank, further, parse_controls
from metadiff_cli.commands.evaluate.report import write_evaluation_report
from metadiff_cli.commands.evaluate.table import show_result
from metadiff_cli.commands.pages.page import check_page
from metadiff_cli.commands.runtime import sampling_of, start
from metadiff_cli.commands.settings import USED, check_split, model_config
from metadiff_cli.config.load import check
from metadiff_cli.config.schema import Config, SamplerConfig
from metadiff_cli.console import Screen
from metadiff_cli.core.checkpoints.baseline import Baseline, load_baseline
from metadiff_cli.core.checkpoints.file import read_header
from metadiff_cli.core.checkpoints.model import Model, load_model
from metadiff_cli.core.evaluation.evaluate import Protocol
from metadiff_cli.data.hub import fetch
from metadiff_cli.data.open import Source, open_source
from metadiff_cli.errors import ConfigError, DataError, GateError
from metadiff_cli.files import checkpoint_path

TEST = "test"  # the split that is measured where none is asked for
SAMPLED = ("analytic", "untrained", "posterior", "inductive")  # controls that sample weights
EPISODES = ("evaluation.way", "evaluation.shot", "evaluation.query", "evaluation.episodes")


@dataclass(frozen=True)
class Request:
    """What one call of `evaluate` asks for, besides its configuration; see the options of the same names."""

    checkpoint: Path | None
    data: tuple[Path, ...]  # none: that of the training
    split: str | None  # None: "test", but see `domain_of`
    transductive: bool
    imbalance: float | None
    controls: str
    halves: bool
    open_set: bool
    fail_under: float | None
    compare_to: Path | None
    report: Path | None
    as_json: bool

    def protocol(self, config: Config) -> Protocol:
        """The episodes that are asked for."""
        e = config.evaluation
        return Protocol(e.way, e.shot, e.query, e.episodes, config.seed, self.transductive, self.imbalance)


def run(
    request: Request, file: Path | None, settings: Sequence[str] | None, flags: Mapping[str, object], screen: Screen
) -> None:
    """Measure, show the result, then check the gates. Raises GateError when one of them is not met."""
    if request.split is not None:
        check_split(request.split)
    check_different(request.data)
    controls = parse_controls(request.controls)
    if request.report is not None:
        check_page(request.report)
    earlier = None if request.compare_to is None else compare.read_result(request.compare_to)
    config = model_config(file, settings, flags, used=(*USED, *EPISODES), note=screen.note)
    path = checkpoint_path(fetch(request.checkpoint, screen.note))
    _check(request, controls, baseline=read_header(path)["kind"] == "baseline")
    protocol = request.protocol(config)
    if earlier is not None:
        compare.check_comparable(earlier, protocol, request.split or TEST, halves=request.halves)
    document = measure_checkpoint(path, request, controls, config, protocol, screen)
    if earlier is not None:
        document["compared"] = compare.compared(document, earlier)
    _show(document, request, screen)
    _check_gates(document, request.fail_under)


def measure_checkpoint(
    path: Path, request: Request, controls: Sequence[str], config: Config, protocol: Protocol, screen: Screen
) -> dict[str, Any]:
    """The result document of the model or baseline in the file `path`, beside its controls.

    Several data sets are all opened, and checked, before the first one is measured.
    """
    device = start(config)
    baseline = read_header(path)["kind"] == "baseline"
    model = (load_baseline if baseline else load_model)(path, device)
    if isinstance(model, Baseline):
        _check_sampled(model, request, controls, config)
    else:
        require_posterior(model.metadiff, sampling_of(config))
    trained, known = check(model.header["config"]), model.header["classes"]
    if len(request.data) < 2:
        source = find_source(trained, config, next(iter(request.data), None), screen)
        split = request.split or TEST
        if split == "all":
            screen.note(_all_of(source, known))
        return _measured(model, source, split, request, controls, config, protocol, screen)
    domains: list[Domain] = []
    for folder in request.data:
        screen.note(f"data set {folder}")
        source, taken = find_source(trained, config, folder, screen), [domain.name for domain in domains]
        if request.split == "all":
            screen.note(_all_of(source, known))
        domains.append(domain_of(source, request.split, model.images.size, known, protocol, taken, screen))
    documents = []
    for domain in domains:
        screen.note(f"measuring {domain.name}")
        found = _measured(model, domain.source, domain.split, request, controls, config, domain.protocol, screen)
        documents.append({"name": domain.name, **found})
    return domains_document(documents, protocol)


def _measured(
    model: Model | Baseline, source: Source, split: str, request: Request, controls: Sequence[str], config: Config,
    protocol: Protocol, screen: Screen,
) -> dict[str, Any]:  # fmt: skip
    """The result document of one data set."""
    labels = source.split(split, model.images.size).labels
    name = "metadiff" if isinstance(model, Model) else model.name
    more = further(controls, name, config, source, split, labels, protocol, model.images.device, screen)
    if isinstance(model, Baseline):
        return measure_baseline(model, controls, config, source, split, protocol, screen, more)
    bank = feature_bank(model.images, source, split, config, screen)
    return measure(
        model, bank, split, protocol, sampling_of(config), controls, screen, more,
        halves=request.halves, open_set=request.open_set, drawn=request.report is not None,
    )  # fmt: skip


def find_source(trained: Config, config: Config, data: Path | None, screen: Screen) -> Source:
    """The data set that the model was trained on, or the folder `data` if that is another one.

    The folder is read in the training's layout if it has it, else as class folders. Raises DataError when there is no
    such data set.
    """
    drawn = trained.data.layout == "glyphs" and data is not None
    layout = "auto" if drawn else trained.data.layout
    found = config.model_copy(
        update={"data": trained.data.model_copy(update={"layout": layout}), "seed": trained.seed}
    )  # the seed decides how a folder without splits is split
    try:
        return open_source(found, data, screen)
    except DataError:
        if data is None or not data.is_dir() or layout in ("auto", "folder"):
            raise
        folder = found.data.model_copy(update={"layout": "folder"})
        return open_source(found.model_copy(update={"data": folder}), data, screen)


def _all_of(source: Source, trained: Sequence[str]) -> str:
    """What `--split all` takes, and how many of the classes are classes of the training."""
    splits = source.dataset.splits
    classes = {cls for split in splits.values() for cls in split.classes}
    images = sum(len(split.labels) for split in splits.values())
    known = known_classes(source, trained)
    parts = "" if source.dataset.drawn else f" ({', '.join(splits)})"
    warning = f"; {len(known)} of them are classes of the training, which makes accuracies too good" if known else ""
    return f"--split all: {len(classes)} classes, {images} images{parts}{warning}"


def _check(request: Request, controls: Sequence[str], *, baseline: bool) -> None:
    """Raise ConfigError for options that do not go together, or not with the file of a baseline."""
    if len(request.data) > 1 and (given := _of_one_data_set(request)):
        raise ConfigError(
            f"{given} takes one data set, and --data is given {len(request.data)} times",
            hint=f"leave out {given}, or give one --data",
        )
    if request.open_set and request.imbalance is not None:
        raise ConfigError("--open-set needs balanced queries", hint="leave out --imbalance or --open-set")
    if request.halves and (baseline or any(name.endswith(FILE) for name in controls)):
        raise ConfigError("--halves fits a MetaDiff model anew, and no baseline", hint="leave out --halves")
    if request.open_set and baseline:
        raise ConfigError("--open-set measures a MetaDiff model, not a baseline", hint="leave out --open-set")
    if request.compare_to is not None and baseline:
        raise ConfigError("--compare compares MetaDiff models, not baselines", hint="leave out --compare")


def _of_one_data_set(request: Request) -> str | None:
    """The first option given that has no meaning for several data sets."""
    options = {
        "--halves": request.halves, "--open-set": request.open_set, "--compare": request.compare_to is not None,
        "--report": request.report is not None,
    }  # fmt: skip
    return next((name for name, given in options.items() if given), None)


def _check_sampled(baseline: Baseline, request: Request, controls: Sequence[str], config: Config) -> None:
    """Raise ConfigError for options of the sampler when neither the baseline nor a control has one."""
    sampled = baseline.base is not None and any(name in SAMPLED for name in controls)
    sampled = sampled or any(read_header(Path(name))["kind"] == "model" for name in controls if name.endswith(FILE))
    if not sampled and (request.transductive or config.sampler != SamplerConfig()):
        raise ConfigError(
            f"{baseline.name} has no sampler: --transductive and the settings of the sampler have no effect",
            hint="leave them out, or give a MetaDiff checkpoint among --controls",
        )


def _show(document: dict[str, Any], request: Request, screen: Screen) -> None:
    """Write the report, and print the result as JSON or as tables."""
    if request.report is not None:
        write_evaluation_report(request.report, document)
        screen.note(f"report written: {request.report}")
    document.pop(PICTURES, None)
    if request.as_json:
        screen.json(document)
        return
    show_result(document, screen)
    if "compared" in document:
        screen.text(compare.describe(document))
    for measured in document.get("data", [document]):
        screen.detail(f"{measured['episodes_per_second']} episodes per second")


def _check_gates(document: dict[str, Any], fail_under: float | None) -> None:
    rows = document["mean"] if "mean" in document else document["methods"]
    accuracy = next(iter(rows.values()))["accuracy"]  # the checkpoint's own comes first
    if fail_under is not None and accuracy < fail_under:
        raise GateError(
            f"accuracy {accuracy:.2f} % is below --fail-under {fail_under:g}", hint="the results above are complete"
        )
    if "compared" in document:
        compare.check_no_drop(document)
