"""`metadiff presets`: list, show and copy the named settings."""

import os
from pathlib import Path

from metadiff_cli.config.load import preset_folder, preset_names, read_preset
from metadiff_cli.console import Screen
from metadiff_cli.errors import ConfigError
from metadiff_cli.files import atomic


def show_all(screen: Screen, *, as_json: bool) -> None:
    """Print name, kind, summary and expected accuracy of every preset."""
    rows = []
    for name in preset_names():
        values = read_preset(name)
        rows.append({key: str(values.get(key, "")) for key in ("name", "kind", "summary", "expect")})
    if as_json:
        screen.json({"schema": "metadiff.presets/1", "presets": rows})
        return
    cells = [(row["name"], f"{row['kind']}: {row['summary']}", row["expect"]) for row in rows]
    screen.table("Presets", ("name", "what", "expected accuracy"), cells, left=3)


def preset_text(name: str) -> str:
    """The file of a preset. Raises ConfigError for an unknown name."""
    read_preset(name)
    return (preset_folder() / f"{name}.yaml").read_text(encoding="utf-8")


def copy(name: str, to: Path, screen: Screen) -> None:
    """Write the file of a preset to `to`. Raises ConfigError for an unknown name and when `to` exists."""
    text = preset_text(name)
    try:
        with atomic(to, new=True) as temporary:
            temporary.write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        if os.path.lexists(to):
            raise ConfigError(f"{to} exists already", hint="give the name of a new file") from error
        raise ConfigError(f"{to} cannot be written ({error.strerror})", hint="give a file in another folder") from error
    screen.note(f"written: {to}; use it with `metadiff metatrain --config {to}`")
