"""`metadiff config`: the settings that a command would run with, and where each comes from."""

from typing import Annotated

import typer

from metadiff_cli.commands import options
from metadiff_cli.config.load import check, flat, layers, merge_layers, origins, to_yaml
from metadiff_cli.console import Screen

app = typer.Typer(
    help="""Look at the configuration.

    `metadiff presets copy` gives a file to change, for --config.

    Examples:

      metadiff config show --preset mini-5w5s

      metadiff config show --preset photos --origin
    """,
    no_args_is_help=True,
)


@app.command("show")
def show(
    preset: options.Preset = None,
    config: options.ConfigFile = None,
    settings: options.Settings = None,
    origin: Annotated[
        bool, typer.Option("--origin", help="Say where each value comes from.", rich_help_panel=options.COMMON)
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Print the settings that a training would run with.

    They are those that `pretrain` and `metatrain` make of the same options.
    Later ones win: default, preset, --config, METADIFF_* variables, --set.
    The output without --origin can be given to --config.

    Examples:

      metadiff config show --preset mini-5w5s --origin

      metadiff config show --preset glyphs-5w1s --set pretrain.epochs=3
    """
    screen, given = Screen(), layers(preset, config, settings or ())
    resolved = check(merge_layers(given), given)
    if as_json:
        document = {"schema": "metadiff.config/1", "config": resolved.model_dump(mode="json"), "origin": origins(given)}
        screen.json(document)
    elif origin:
        known = origins(given)
        rows = [(key, _plain(value), known[key]) for key, value in flat(resolved.model_dump(mode="json")).items()]
        screen.table("Configuration", ("key", "value", "from"), rows, left=3)
    else:
        screen.text(to_yaml(resolved).rstrip("\n"))


def _plain(value: object) -> str:
    return "" if value is None else str(value)
