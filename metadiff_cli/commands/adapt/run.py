"""The body of `metadiff adapt`: options in, predictions, files and an exit code out."""

from dataclasses import replace
from pathlib import Path

from metadiff_cli.classify.classifier import default_steps, narrow_draws
from metadiff_cli.commands.adapt.build import Builder, Found, Start
from metadiff_cli.commands.adapt.checks import Options, check_folders, check_labels, check_options, check_outputs
from metadiff_cli.commands.adapt.inputs import Queries, find_queries
from metadiff_cli.commands.adapt.label import label, shows_bar
from metadiff_cli.commands.adapt.sorting import Sorting
from metadiff_cli.commands.runtime import start as start_device
from metadiff_cli.commands.settings import check_new, model_config
from metadiff_cli.config.load import flat, layers
from metadiff_cli.config.schema import Config
from metadiff_cli.console import Screen
from metadiff_cli.core.checkpoints.file import read_header
from metadiff_cli.core.method.adapt import Sampling
from metadiff_cli.core.method.rejection import require_rejection
from metadiff_cli.data.hub import fetch
from metadiff_cli.data.sort import Sorter
from metadiff_cli.errors import CheckpointError, ConfigError


def run(given: Options, screen: Screen) -> None:
    """Make the classifier and label the query images. Raises a MetaDiffError for what cannot be done."""
    check_options(given)
    config = model_config(given.config, given.set, given.flags, note=screen.note)
    _check_save(given)
    check_outputs(given)
    queries = find_queries(given.query, null=given.null, more=given.more) if given.query else Queries(())
    support = Found.of(given.support, given.none)
    for text in () if support is None else support.notes:
        screen.note(text)
    unlabeled = None if given.unlabeled is None else find_queries([str(given.unlabeled)], option="--unlabeled")
    builder = Builder(config, sampling_of(given, config, screen), start_device(config), screen)
    start = builder.start(replace(given, checkpoint=fetch(given.checkpoint, screen.note)), support, len(queries.items))
    start = start.corrected(given.corrections, screen)
    if given.reject is not None:
        require_rejection(start.model.metadiff)
    classes = _classes(support, start)
    sorting = None
    if given.sort_into is not None:
        sorter = Sorter(given.sort_into, classes, move=given.move)
        check_folders(sorter)
        queries = queries.outside(sorter.root, [*sorter.folders.values()], given.query)
        sorting = Sorting(sorter, () if support is None else support.split.paths)
    check_labels(given, queries, classes, screen)
    ready = builder.build(start, support, queries if given.transductive else None, unlabeled)
    if given.reject is not None:
        ready = replace(ready, rejector=ready.classifier.rejector())
    if given.save is not None:
        ready.classifier.save(given.save)
        screen.note(f"classifier written: {given.save}")
    if not given.query:
        return
    if ready.queries is not None:
        encoded = iter(ready.queries)
    else:
        encoded = builder.encode(queries, ready.classifier.model.images, "predicting", bar=shows_bar(given, screen))
    label(given, ready, queries, sorting, encoded, config, screen)


def _classes(support: Found | None, start: Start) -> list[str]:
    """The names of all classes, sorted."""
    new, saved = () if support is None else support.split.classes, () if start.saved is None else start.saved.classes
    return sorted({*new, *saved})


def _check_save(given: Options) -> None:
    """Raise ConfigError for a file of `--save` that cannot be written, or that must not be replaced."""
    if given.save is not None:
        check_new(given.save, overwrite=given.overwrite)
        if given.save.exists() and _kind_of(given.save) != "classifier":
            raise ConfigError(f"--save {given.save} would replace a file of another kind", hint="give another name")


def _kind_of(file: Path) -> str:
    """The kind of a checkpoint file; empty for any other file."""
    try:
        return str(read_header(file)["kind"])
    except CheckpointError:
        return ""


def sampling_of(given: Options, config: Config, screen: Screen) -> Sampling:
    """The settings of the sampler; where the number of steps is not given, draws take more of them, and it is said."""
    s = config.sampler
    steps = s.steps
    if not _steps_given(given):
        steps = default_steps(s.temperature)
        if given.adapts and steps != s.steps:
            screen.note(f"the sampler takes {steps} steps at temperature {s.temperature:g}; --steps sets the number")
    sampling = Sampling(steps, s.samples, s.temperature, None if s.guidance == "auto" else s.guidance, s.method)
    if given.adapts and (warning := narrow_draws(sampling)):
        screen.warn(warning)
    return sampling


def _steps_given(given: Options) -> bool:
    found = layers(None, given.config, given.set)  # the variables of the environment included
    return given.flags.get("sampler.steps") is not None or any("sampler.steps" in flat(values) for _, values in found)
