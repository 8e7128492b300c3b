"""`metadiff presets`: list, show and copy the named settings."""

from pathlib import Path
from typing import Annotated

import typer

from metadiff_cli.commands import completions, options
from metadiff_cli.config.load import preset_folder, preset_names, read_preset
from metadiff_cli.console import Screen
from metadiff_cli.errors import ConfigError
from metadiff_cli.files import write_text

Name = Annotated[str, typer.Argument(help="Name of the preset.", autocompletion=completions.presets)]
app = typer.Typer(
    help="""List, show and copy the presets.

    A preset is a named configuration: data set, encoder, training, episodes.

    Examples:

      metadiff presets list

      metadiff presets show photos
    """,
    no_args_is_help=True,
)


@app.command("list")
def list_presets(as_json: options.AsJson = False) -> None:
    """Show every preset with what it is for.

    Benchmarks come with the accuracy to expect, where it was measured.

    Examples:

      metadiff presets list

      metadiff presets list --json
    """
    screen = Screen()
    rows = []
    for name in preset_names():
        values = read_preset(name)
        rows.append({key: str(values.get(key, "")) for key in ("name", "kind", "summary", "expect")})
    if as_json:
        screen.json({"schema": "metadiff.presets/1", "presets": rows})
    else:
        screen.table(
            "Presets", ("name", "kind", "what", "expected accuracy"), [tuple(r.values()) for r in rows], left=4
        )


@app.command("show")
def show(name: Name) -> None:
    """Print a preset's file, comments included.

    Its first line is the command that uses it.

    Examples:

      metadiff presets show glyphs-5w1s

      metadiff presets show folder
    """
    read_preset(name)
    Screen().text((preset_folder() / f"{name}.yaml").read_text(encoding="utf-8").rstrip("\n"))


@app.command("copy")
def copy(
    name: Name,
    to: Annotated[Path, typer.Argument(help="File to write, for --config.")],
) -> None:
    """Copy a preset to a file of your own, to change it there.

    Give the copy with --config instead of --preset.

    Examples:

      metadiff presets copy folder my.yaml

      metadiff presets copy mini-5w5s experiments/mini.yaml
    """
    read_preset(name)
    if to.exists():
        raise ConfigError(f"{to} exists already", hint="give another name")
    write_text(to, (preset_folder() / f"{name}.yaml").read_text(encoding="utf-8"))
    Screen().note(f"written: {to}; use it with `metadiff metatrain --config {to}`")
