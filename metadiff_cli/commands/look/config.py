"""`metadiff config`: the settings that a command would run with, and where each comes from."""

from collections.abc import Sequence
from pathlib import Path

from metadiff_cli.config.load import check, flat, layers, merge_layers, origins, to_yaml
from metadiff_cli.console import Screen


def show(
    preset: str | None,
    file: Path | None,
    settings: Sequence[str] | None,
    screen: Screen,
    *,
    origin: bool,
    as_json: bool,
) -> None:
    """Print the configuration of all layers: as YAML, with `origin` a line per key, or as JSON. Raises ConfigError."""
    given = layers(preset, file, settings or ())
    resolved = check(merge_layers(given), given)
    values, known = resolved.model_dump(mode="json"), origins(given)
    if as_json:
        screen.json({"schema": "metadiff.config/1", "config": values, "origin": known})
    elif origin:
        for key, value in flat(values).items():
            screen.text(f"{key + ' = ' + ('none' if value is None else str(value)):<50}  {known[key]}")
    else:
        screen.text(to_yaml(resolved).rstrip("\n"))
