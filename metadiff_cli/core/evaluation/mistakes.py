"""An image that is taken for another class, as checks of a support and reports name it. No torch here."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mistake:
    """An image that looks like another class than its own, with the probability of that class."""

    path: str
    label: str
    looks_like: str
    confidence: float
