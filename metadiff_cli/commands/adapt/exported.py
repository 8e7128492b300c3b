"""`metadiff adapt --classifier FILE.onnx`: label images by an exported classifier. No torch here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from metadiff_cli.classify.exported import ExportedClassifier
from metadiff_cli.classify.images import encode_images
from metadiff_cli.commands.adapt.checks import (
    Options,
    adapting_settings,
    check_folders,
    check_labels,
    check_options,
    check_outputs,
)
from metadiff_cli.commands.adapt.inputs import find_queries
from metadiff_cli.commands.adapt.label import label, shows_bar
from metadiff_cli.commands.adapt.predict import Chooser, Scores, guided_by
from metadiff_cli.commands.adapt.sorting import Sorting
from metadiff_cli.commands.settings import model_config
from metadiff_cli.config.schema import Config
from metadiff_cli.console import Screen
from metadiff_cli.core.evaluation.mistakes import Mistake
from metadiff_cli.data.sort import Sorter
from metadiff_cli.errors import CheckpointError, ConfigError


def run(given: Options, screen: Screen) -> None:
    """Label the query images. Raises a MetaDiffError for what cannot be done."""
    assert given.classifier is not None
    _check_adapting(given)
    check_options(given)
    config = model_config(given.config, given.set, given.flags, note=screen.note)
    _check_runtime(config)
    check_outputs(given)
    queries = find_queries(given.query, null=given.null, more=given.more)
    runtime = config.runtime
    classifier = ExportedClassifier(given.classifier, threads=runtime.threads, batch=runtime.batch_size)
    ready = ReadyGraph(classifier, rejects=given.reject is not None)
    if ready.rejects and classifier.facts.rejection is None:
        raise CheckpointError(
            f"{given.classifier} has no threshold for rejection: its checkpoint was made without validation classes",
            hint="use --reject-below, or export a classifier of another checkpoint",
        )
    sorting = None
    if given.sort_into is not None:
        sorting = Sorting(Sorter(given.sort_into, ready.classes, move=given.move), ())
        check_folders(sorting.sorter)
        queries = queries.outside(sorting.sorter.root, [*sorting.sorter.folders.values()], given.query)
    check_labels(given, queries, ready.classes, screen)
    with screen.progress("predicting", shown=shows_bar(given, screen)) as advance:
        encoded = encode_images(queries.paths(), classifier, workers=runtime.num_workers, progress=advance)
        label(given, ready, queries, sorting, encoded, config, screen)


@dataclass(frozen=True)
class ReadyGraph:
    """An exported classifier that is ready to label images; `rejects` says whether by its margins (`--reject auto`)."""

    graph: ExportedClassifier
    rejects: bool
    broken: Sequence[tuple[str, str]] = ()
    unlike: str = ""
    suspects: Sequence[Mistake] = ()
    mistakes: Sequence[Mistake] = ()

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the N classes, sorted."""
        return self.graph.facts.classes

    @property
    def encoder(self) -> str:
        """The name of the encoder."""
        return self.graph.facts.encoder

    @cached_property
    def twins(self) -> Mapping[bytes, str]:
        """The name of each support image, by the digest of its pixels."""
        return {bytes.fromhex(digest): name for digest, name in self.graph.facts.pictures.items()}

    @property
    def dependence(self) -> str:
        """What predictions depend on beside the support and their own image."""
        return guided_by(self.graph.facts.unlabelled)

    def scores(self, features: Sequence[Scores]) -> list[Scores]:
        """The scores of images, which the graph gave with the margins."""
        return [(probabilities, margin if self.rejects else None) for probabilities, margin in features]

    def document(self) -> dict[str, Any]:
        """What the JSON document says of the classifier."""
        facts = self.graph.facts
        return {
            "classes": list(facts.classes),
            "support": facts.support,
            "support_check": None,
            "doubt": None,
            "protocol": "transductive" if facts.unlabelled else "inductive",
            "unlabelled": facts.unlabelled,
            "rejection": self.rejection(),
        }

    def rejection(self) -> dict[str, float] | None:
        """Of `--reject auto`: the threshold in nats, and the rate (0..1) that it was fitted for."""
        found = self.graph.facts.rejection
        return found.model_dump() if self.rejects and found is not None else None

    def files(self) -> dict[str, list[str]]:
        """No files: the graph knows the names of its support images only."""
        return {}

    def suggestions(self, count: int) -> Chooser:
        """Nothing: the graph gives no features to compare images by."""
        raise AssertionError("--suggest is refused before")

    def sentences(self) -> list[str]:
        """Nothing: no image can be held out any more."""
        return []


def _check_adapting(given: Options) -> None:
    """Raise ConfigError for options that need the support, of which an exported classifier holds names only."""
    needing = {
        "--support": given.support, "--none": given.none, "--forget": given.corrections.forget,
        "--relabel": given.corrections.relabel, "--rename": given.corrections.rename,
        "--transductive": given.transductive, "--unlabeled": given.unlabeled, "--save": given.save,
        "--suggest": given.suggest,
    }  # fmt: skip
    if wrong := [*(option for option, value in needing.items() if value), *adapting_settings(given)]:
        raise ConfigError(
            f"{wrong[0]} has no effect: {given.classifier} is an exported classifier, which holds no features of its "
            "support and cannot be adapted again",
            hint="leave it out, or give the .safetensors classifier that it was exported from",
        )


def _check_runtime(config: Config) -> None:
    """Raise ConfigError for a device or a backend that does not run an exported classifier."""
    for option, value, fitting in (
        ("--device", config.runtime.device, ("auto", "cpu")),
        ("--backend", config.runtime.backend, ("auto", "onnxruntime")),
    ):
        if value not in fitting:
            raise ConfigError(
                f"{option} {value} has no effect: an exported classifier runs in onnxruntime on the CPU",
                hint="leave it out, or give the .safetensors classifier that it was exported from",
            )
