"""metadiff: few-shot image classification by diffusion over classifier weights."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metadiff_cli.api import FewShotClassifier

__version__ = "0.1.0"
__all__ = ["FewShotClassifier", "__version__"]


def __getattr__(name: str) -> Any:
    """The Python interface, loaded when it is asked for: `import metadiff_cli` alone loads no torch."""
    if name == "FewShotClassifier":
        from metadiff_cli.api import FewShotClassifier

        return FewShotClassifier
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
