"""Shell completion of names: presets, data sets, splits, controls. Called at every press of Tab, so nothing heavy."""

from collections.abc import Iterator

from metadiff_cli.config.load import preset_names, read_preset
from metadiff_cli.config.schema import ENCODERS
from metadiff_cli.errors import ConfigError

SPLITS = ("train", "val", "test", "all")
# those of commands/learning.py, which loads torch
CONTROLS = (
    "prototype", "analytic", "untrained", "logreg", "ridge", "posterior", "inductive", "soft-kmeans",
    "label-propagation",
)  # fmt: skip
METHODS = ("metadiff", "anil-frozen", "metasgd-frozen", "maml", "fomaml", "anil")
CACHE_KINDS = ("images", "features", "encoders")


def presets(incomplete: str) -> Iterator[tuple[str, str]]:
    """Names of presets with what they are for."""
    for name in preset_names():
        if name.startswith(incomplete):
            try:
                yield name, str(read_preset(name).get("summary", ""))
            except ConfigError:  # a damaged one is told when it is used
                yield name, ""


def data(incomplete: str) -> Iterator[tuple[str, str]]:
    """Names of the known data sets with what they are."""
    from metadiff_cli.data.benchmarks import KNOWN

    yield from ((name, known.what) for name, known in KNOWN.items() if name.startswith(incomplete))


def splits(incomplete: str) -> list[str]:
    """Names of splits."""
    return [name for name in SPLITS if name.startswith(incomplete)]


def encoders(incomplete: str) -> list[str]:
    """Names of our encoders, and how those of libraries begin."""
    return [name for name in (*ENCODERS, "torchvision:", "timm:") if name.startswith(incomplete)]


def methods(incomplete: str) -> list[str]:
    """Names of what `metatrain` trains."""
    return [name for name in METHODS if name.startswith(incomplete)]


def controls(incomplete: str) -> list[str]:
    """Names of controls, the last one of a comma-separated list."""
    before, comma, last = incomplete.rpartition(",")
    given = before.split(",")
    return [f"{before}{comma}{name}" for name in CONTROLS if name.startswith(last) and name not in given]


def cache_kinds(incomplete: str) -> list[str]:
    """Kinds of things in the cache."""
    return [name for name in CACHE_KINDS if name.startswith(incomplete)]
