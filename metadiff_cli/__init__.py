"""metadiff: few-shot image classification by diffusion over classifier weights."""

from typing import TYPE_CHECKING, Any

from metadiff_cli._version import __version__

if TYPE_CHECKING:
    from metadiff_cli.api import FewShotClassifier

__all__ = ["FewShotClassifier", "__version__"]


def __getattr__(name: str) -> Any:
    """Load the Python interface when it is first asked for: `import metadiff_cli` alone loads no torch."""
    if name == "FewShotClassifier":
        from metadiff_cli.api import FewShotClassifier

        return FewShotClassifier
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
