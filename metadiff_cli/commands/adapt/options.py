"""The options of `metadiff adapt` as one value."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Options:
    """What was given on the command line, by the names of the options; None where an option was not given.

    `more` are arguments without an option. `flags` are the options that set a key of the configuration, by that key.
    """

    query: list[str]
    more: list[str]
    null: bool
    support: Path | None
    classifier: Path | None
    checkpoint: Path | None
    encoder: str | None
    encoder_weights: Path | None
    views: int | None
    format: str | None
    as_json: bool
    top_k: int | None
    reject_below: float | None
    reject: str | None
    labelled: bool
    strict: bool
    sort_into: Path | None
    move: bool
    transductive: bool
    unlabeled: Path | None
    save: Path | None
    report: Path | None
    overwrite: bool
    config: Path | None
    set: list[str]
    flags: Mapping[str, object]

    @property
    def output(self) -> str:
        """The format of the output."""
        return "json" if self.as_json else self.format or "table"

    @property
    def encoders(self) -> list[str]:
        """The encoders to choose from; none where a checkpoint or a saved classifier has one."""
        return [name.strip() for name in (self.encoder or "").split(",") if name.strip()]

    @property
    def adapts(self) -> bool:
        """Whether a classifier is adapted, rather than used as it was saved."""
        return self.classifier is None or self.support is not None or self.transductive or self.unlabeled is not None
