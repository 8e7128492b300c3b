"""Names that options take, and their completion in the shell. Every Tab and every `--help` imports this module.

The lists repeat what heavier modules define; tests compare the two.
"""

from collections.abc import Iterator, Sequence

from metadiff_cli.errors import ConfigError

ENCODERS = ("conv4", "conv4-padded", "resnet10", "resnet12")
LITE = ("lite0", "lite1", "lite2")
SPLITS = ("train", "val", "test", "all")
CONTROLS = (
    "prototype", "analytic", "untrained", "nearest", "logreg", "ridge", "lda", "posterior", "inductive",
    "soft-kmeans", "label-propagation",
)  # fmt: skip
METHODS = ("metadiff", "anil-frozen", "metasgd-frozen", "maml", "fomaml", "anil")
CACHE_KINDS = ("images", "features", "encoders", "graphs")


def presets(incomplete: str) -> Iterator[tuple[str, str]]:
    """Names of presets, each with its summary."""
    from metadiff_cli.config.load import preset_names, read_preset

    for name in _beginning(preset_names(), incomplete):
        try:
            yield name, str(read_preset(name).get("summary", ""))
        except ConfigError:  # a damaged preset is reported when it is used
            yield name, ""


def data(incomplete: str) -> Iterator[tuple[str, str]]:
    """Names of the known data sets, each with a description."""
    from metadiff_cli.data.benchmarks import KNOWN

    yield from ((name, known.what) for name, known in KNOWN.items() if name.startswith(incomplete))


def splits(incomplete: str) -> list[str]:
    """Names of splits."""
    return _beginning(SPLITS, incomplete)


def encoders(incomplete: str) -> list[str]:
    """Names of our encoders, and the prefixes of those from libraries."""
    return _beginning((*ENCODERS, *LITE, "torchvision:", "timm:"), incomplete)


def trained_encoders(incomplete: str) -> list[str]:
    """Names of encoders that come trained, for the last item of a comma-separated list."""
    before, comma, last = incomplete.rpartition(",")
    return [f"{before}{comma}{name}" for name in _beginning(("auto", *LITE, "torchvision:", "timm:"), last)]


def methods(incomplete: str) -> list[str]:
    """Names of the methods that `metatrain` trains."""
    return _beginning(METHODS, incomplete)


def cache_kinds(incomplete: str) -> list[str]:
    """Kinds of files in the cache."""
    return _beginning(CACHE_KINDS, incomplete)


def controls(incomplete: str) -> list[str]:
    """Names of controls for the last item of a comma-separated list, without those before it."""
    before, comma, last = incomplete.rpartition(",")
    given = before.split(",")
    return [f"{before}{comma}{name}" for name in _beginning(CONTROLS, last) if name not in given]


def _beginning(names: Sequence[str], incomplete: str) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]
