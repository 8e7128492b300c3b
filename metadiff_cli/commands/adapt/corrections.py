"""`--forget`, `--relabel` and `--rename`: which corrections of a saved classifier are given. No torch here."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from metadiff_cli.data.scan import class_name
from metadiff_cli.errors import ConfigError


@dataclass(frozen=True)
class Corrections:
    """What was given on the command line: images or classes, a CSV of path,label, and texts such as OLD=NEW."""

    forget: Sequence[str] = ()
    relabel: Path | None = None
    rename: Sequence[str] = ()

    def __bool__(self) -> bool:
        """Whether there is anything to correct."""
        return bool(self.forget or self.relabel or self.rename)

    def check(self, classifier: Path | None) -> None:
        """Raise ConfigError for corrections without a saved classifier, and for a text that is not OLD=NEW."""
        options = {"--forget": self.forget, "--relabel": self.relabel, "--rename": self.rename}
        for option, value in options.items():
            if value and classifier is None:
                raise ConfigError(
                    f"{option} corrects a saved classifier, and none is given",
                    hint="add --classifier FILE; without one, move the images to another folder, or rename the folder",
                )
        self.names()

    def names(self) -> dict[str, str]:
        """The new names of classes, by their old names. Raises ConfigError as `check` does."""
        names: dict[str, str] = {}
        for text in self.rename:
            old, _, new = (class_name(part.strip()) for part in text.partition("="))
            if not old or not new:
                raise ConfigError(f"--rename {text} is not OLD=NEW", hint="give --rename cta=cat, say")
            if old in names:
                raise ConfigError(f"--rename gives class '{old}' two names", hint="give one")
            names[old] = new
        return names
