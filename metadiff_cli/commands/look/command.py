"""The signatures of the commands that look around: inspect, presets, config, data, cache, doctor; export and card."""

from pathlib import Path
from typing import Annotated

import typer

from metadiff_cli.commands import completions, options
from metadiff_cli.commands.options import option, path, shown
from metadiff_cli.commands.parsing import Commands, path_option
from metadiff_cli.console import Screen

GETTING, READING = "Getting it", "Reading"  # groups of the help

Name = Annotated[str, typer.Argument(help="Name of the preset.", autocompletion=completions.presets)]

presets = Commands(
    no_args_is_help=True,
    help="""List, show and copy the presets.

    A preset is a named configuration: data set, encoder, training, episodes.

    Examples:

      metadiff presets list

      metadiff presets show photos
    """,
)
config = Commands(
    no_args_is_help=True,
    help="""Look at the configuration.

    To change it in a file, copy a preset with `metadiff presets copy`.

    Examples:

      metadiff config show --preset mini-5w5s

      metadiff config show --preset photos --origin
    """,
)
data = Commands(
    no_args_is_help=True,
    help="""List, prepare and verify data sets.

    A folder of your own needs no preparation: give it with --data DIR.

    Examples:

      metadiff data list

      metadiff data verify ./photos
    """,
)
cache = Commands(
    no_args_is_help=True,
    help="""List and clear what is kept to save time.

    The cache holds decoded images, their features, and encoders. All of it can
    be made again.

    Examples:

      metadiff cache list

      metadiff cache clear features --yes
    """,
)


def inspect(
    file: Annotated[
        Path | None,
        typer.Argument(
            metavar="FILE",
            parser=path_option,
            help=shown("A checkpoint, a saved classifier, or a result.json.", "the checkpoint in the package"),
        ),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Show what a file of metadiff holds.

    For a checkpoint: its model card, then kind, classes, image size, settings
    and metrics. Results and manifests of runs (.json) are shown as they are.

    Examples:

      metadiff inspect

      metadiff inspect runs/mini/encoder.safetensors --json
    """
    from metadiff_cli.commands.look.inspect import show_file

    show_file(file, Screen(), as_json=as_json)


def card(
    file: Annotated[
        Path | None,
        typer.Argument(
            metavar="FILE",
            parser=path_option,
            help=shown("A checkpoint or a saved classifier.", "the checkpoint in the package"),
        ),
    ] = None,
    out: Annotated[
        Path | None, path(options.PLACES, "--out", "-o", metavar="FILE", default="stdout", help="File to write.")
    ] = None,
    overwrite: Annotated[bool, option(options.PLACES, "--overwrite", help="Replace an existing file.")] = False,
    quiet: options.Quiet = False,
) -> None:
    """Write the model card of a checkpoint, for the Hugging Face Hub.

    It is Markdown with a YAML head: library, task, licence, data sets, and the
    accuracy that was measured at the end of the training. Upload it as
    README.md beside the checkpoint.

    Examples:

      metadiff card runs/mini/checkpoint.safetensors

      metadiff card runs/mini/checkpoint.safetensors --out README.md
    """
    from metadiff_cli.commands.look.card import write_card

    write_card(file, out, Screen(quiet=quiet), overwrite=overwrite)


@presets.command("list")
def list_presets(as_json: options.AsJson = False) -> None:
    """Show all presets and what they are for.

    Benchmarks come with the accuracy to expect, where it was measured.

    Examples:

      metadiff presets list

      metadiff presets list --json
    """
    from metadiff_cli.commands.look.presets import show_all

    show_all(Screen(), as_json=as_json)


@presets.command("show")
def show_preset(name: Name) -> None:
    """Print the file of a preset, comments included.

    Its first line is the command that uses it.

    Examples:

      metadiff presets show glyphs-5w1s

      metadiff presets show folder
    """
    from metadiff_cli.commands.look.presets import preset_text

    Screen().text(preset_text(name).rstrip("\n"))


@presets.command("copy")
def copy_preset(
    name: Name,
    to: Annotated[Path, typer.Argument(metavar="TO", parser=path_option, help="File to write, for --config.")],
) -> None:
    """Copy a preset to a file of your own.

    Change the copy, and give it with --config instead of --preset.

    Examples:

      metadiff presets copy folder my.yaml

      metadiff presets copy mini-5w5s experiments/mini.yaml
    """
    from metadiff_cli.commands.look.presets import copy

    copy(name, to, Screen())


@config.command("show")
def show_config(
    preset: options.Preset = None,
    file: options.ConfigFile = None,
    settings: options.Settings = None,
    origin: Annotated[
        bool, option(options.COMMON, "--origin", help="Print a line per key, with the origin of its value.")
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Print the settings that a training would run with.

    These are the settings that `pretrain` and `metatrain` take from the same
    options. Later ones win: defaults, --preset, --config, METADIFF_* variables,
    --set. Without --origin the output is a file for --config.

    Examples:

      metadiff config show --preset mini-5w5s --origin

      metadiff config show --preset glyphs-5w1s --set pretrain.epochs=3
    """
    from metadiff_cli.commands.look.config import show

    show(preset, file, settings, Screen(), origin=origin, as_json=as_json)


@data.command("list")
def list_data(as_json: options.AsJson = False) -> None:
    """Show the known data sets.

    What each one is, its licence, its source, and how to get it.

    Examples:

      metadiff data list

      metadiff data list --json
    """
    from metadiff_cli.commands.look.data import show_known

    show_known(Screen(), as_json=as_json)


@data.command("prepare")
def prepare_data(
    name: Annotated[
        str, typer.Argument(help="Name of the data set, as in `metadiff data list`.", autocompletion=completions.data)
    ],
    root: Annotated[
        Path | None,
        path(
            GETTING, "--root", metavar="ROOT", default="$METADIFF_DATA_DIR",
            help="The data set is written to the folder ROOT/NAME.",
        ),
    ] = None,
    from_archive: Annotated[
        list[Path] | None,
        path(
            GETTING, "--from-archive", metavar="FILE",
            help="Unpack this zip or tar file instead of downloading; repeatable.",
        ),
    ] = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:  # fmt: skip
    """Put a known data set where `--preset` finds it.

    It is downloaded if there is a download, else unpacked from your archive. A
    data set that is already there is only checked.

    Examples:

      metadiff data prepare omniglot

      metadiff data prepare cub --root ~/data --from-archive CUB_200_2011.tgz
    """
    from metadiff_cli.commands.look.data import prepare

    prepare(name, root, from_archive or [], Screen(quiet=quiet), as_json=as_json)


@data.command("verify")
def verify_data(
    folder: Annotated[Path, typer.Argument(metavar="DIR", parser=path_option, help="Folder of a data set.")],
    layout: Annotated[
        str, option(READING, "--layout", metavar="NAME", help="auto, folder, or the name of a known data set.")
    ] = "auto",
    num_workers: options.NumWorkers = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Read every image of a folder, and report what is wrong.

    Counts the images per class and split, and names damaged, repeated, tiny and
    odd ones. Exits with 3 when an image or a whole class cannot be used;
    repeated and odd images are only reported.

    Examples:

      metadiff data verify ./photos

      metadiff data verify ./mini-imagenet --layout mini-imagenet --json
    """
    from metadiff_cli.commands.look.data import verify

    verify(folder, layout, num_workers, Screen(quiet=quiet), as_json=as_json)


@cache.command("list")
def list_cache(as_json: options.AsJson = False) -> None:
    """Show what the cache holds, its size, and its folder.

    The variable METADIFF_CACHE_DIR moves the cache.

    Examples:

      metadiff cache list

      metadiff cache list --json
    """
    from metadiff_cli.commands.look.cache import show

    show(Screen(), as_json=as_json)


@cache.command("clear")
def clear_cache(
    kinds: Annotated[
        list[str] | None,
        typer.Argument(help=shown("images, features, encoders.", "all"), autocompletion=completions.cache_kinds),
    ] = None,
    yes: Annotated[bool, option(options.COMMON, "--yes", "-y", help="Do not ask for confirmation.")] = False,
    quiet: options.Quiet = False,
) -> None:
    """Remove what the cache holds, after asking.

    Only files that metadiff wrote are removed, never anything else.

    Examples:

      metadiff cache clear features --yes

      metadiff cache clear --yes
    """
    from metadiff_cli.commands.look.cache import clear

    clear(kinds or [], Screen(quiet=quiet), yes=yes)


def doctor(as_json: options.AsJson = False) -> None:
    """Check that everything metadiff needs works here.

    Python, torch, torchvision, devices, threads, disk and cache. Exits with 1
    when something does not work, and says what to do about it.

    Examples:

      metadiff doctor

      metadiff doctor --json
    """
    from metadiff_cli.commands.look.doctor import show

    if not show(Screen(), as_json=as_json):
        raise typer.Exit(1)


def export(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", parser=path_option, help="A classifier that `metadiff adapt --save` wrote."),
    ],
    onnx: Annotated[Path, path(options.PLACES, "--onnx", metavar="FILE", help="ONNX file to write.")],
    overwrite: Annotated[bool, option(options.PLACES, "--overwrite", help="Replace an existing ONNX file.")] = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Write a saved classifier as one ONNX graph.

    The graph goes from pixels to class probabilities and needs no Python to
    run; writing it needs the extra \\[onnx]. Its input `pixels` is uint8
    (n, S, S, 3): RGB images whose central square is resized to S x S. Class
    names, the rule of resizing and the threshold of rejection are in the
    metadata of the file, and `adapt --classifier` takes it without torch. If
    onnxruntime is installed, the graph is compared with metadiff's own
    probabilities: nothing is written when they differ by more than 1e-4.

    Examples:

      metadiff export pets.safetensors --onnx pets.onnx

      metadiff export pets.safetensors --onnx pets.onnx --overwrite --json
    """
    from metadiff_cli.commands.look.export import export_classifier

    export_classifier(file, onnx, Screen(quiet=quiet), overwrite=overwrite, as_json=as_json)
