"""Options that several commands share, declared once."""

import operator
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from metadiff_cli.commands import completions
from metadiff_cli.commands.paths import path_option
from metadiff_cli.config.load import resolve
from metadiff_cli.config.schema import ENCODERS, Config
from metadiff_cli.errors import ConfigError

if TYPE_CHECKING:
    import torch

COMMON = "Common"  # groups of the help
PLACES = "Places"
TRAINING = "Training"
SAMPLER = "Sampler"


def shown(text: str, default: object) -> str:
    """The help of an option whose own default, None, stands for `default`: that of a setting, or said in words."""
    value = f"{default:g}" if isinstance(default, float) else default
    return f"{text} \\[default: {value}]"  # a bare bracket would be taken for markup, and vanish


def _of_setting(text: str, key: str) -> str:
    """The help of an option that sets the configuration key `key`."""
    return shown(text, operator.attrgetter(key)(Config()))


Preset = Annotated[
    str | None,
    typer.Option(
        "--preset",
        "-p",
        metavar="NAME",
        help=shown("Named settings; `metadiff presets list` shows all.", "none"),
        autocompletion=completions.presets,
        rich_help_panel=TRAINING,
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Show the plan, with data, steps and an estimate of the time, and leave.",
        rich_help_panel=TRAINING,
    ),
]
Data = Annotated[
    Path | None,
    typer.Option(
        "--data",
        help=shown("Folder of the data set.", "$METADIFF_DATA_DIR/NAME"),
        metavar="DIR",
        rich_help_panel=PLACES,
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        "-o",
        help=shown("Run directory to write.", "runs/PRESET, of `pretrain` runs/PRESET-encoder"),
        metavar="DIR",
        rich_help_panel=PLACES,
    ),
]
EncoderOption = Annotated[
    str | None,
    typer.Option(
        "--encoder",
        "-e",
        metavar="ENCODER",
        help=shown(
            f"{', '.join(ENCODERS)}, an encoder.safetensors, or for metatrain torchvision:MODEL or timm:MODEL.",
            "the preset's",
        ),
        autocompletion=completions.encoders,
        rich_help_panel=TRAINING,
    ),
]
EncoderWeights = Annotated[
    Path | None,
    typer.Option(
        "--encoder-weights",
        metavar="FILE",
        help=shown("Weights of a torchvision: or timm: encoder, .safetensors or .pth.", "the library downloads them"),
        rich_help_panel=TRAINING,
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace what is in the run directory.", rich_help_panel=PLACES)
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with the run in the run directory.", rich_help_panel=PLACES)
]
InitFrom = Annotated[
    Path | None,
    typer.Option(
        "--init-from",
        metavar="FILE",
        help="Start from the weights in an encoder or checkpoint file.",
        rich_help_panel=PLACES,
    ),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        parser=path_option,
        help=shown("YAML file laid over the preset.", "none"),
        metavar="FILE",
        rich_help_panel=COMMON,
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="A setting, as pretrain.epochs=3; repeatable.", metavar="KEY=VALUE", rich_help_panel=COMMON
    ),
]
Seed = Annotated[
    int | None,
    typer.Option("--seed", metavar="N", help=_of_setting("Seed of everything random.", "seed"), rich_help_panel=COMMON),
]
Device = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="NAME",
        help=_of_setting("auto, cpu, cuda or mps.", "runtime.device"),
        rich_help_panel=COMMON,
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        min=1,
        metavar="N",
        help=shown("CPU threads of one operation.", "torch's choice"),
        rich_help_panel=COMMON,
    ),
]
NumWorkers = Annotated[
    int | None,
    typer.Option(
        "--num-workers",
        min=1,
        metavar="N",
        help=shown("Threads that decode images.", "one per core"),
        rich_help_panel=COMMON,
    ),
]
BatchSize = Annotated[
    int | None,
    typer.Option(
        "--batch-size",
        min=1,
        metavar="N",
        help=_of_setting("Images of one forward pass of the encoder.", "runtime.batch_size"),
        rich_help_panel=COMMON,
    ),
]
Report = Annotated[
    Path | None,
    typer.Option(
        "--report",
        parser=path_option,
        help="Write a self-contained HTML page here, replacing it.",
        metavar="FILE",
        rich_help_panel=PLACES,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.", rich_help_panel=COMMON)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Results and errors only.", rich_help_panel=COMMON)]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="More about what happens.", rich_help_panel=COMMON)]
CheckpointFile = Annotated[
    Path | None,
    typer.Option(
        "--checkpoint",
        "-c",
        parser=path_option,
        help=shown("checkpoint.safetensors of a run.", "the package's"),
        metavar="FILE",
        rich_help_panel=PLACES,
    ),
]
Steps = Annotated[
    int | None,
    typer.Option(
        "--steps",
        min=1,
        metavar="N",
        max=1000,
        help=_of_setting("Denoising steps S.", "sampler.steps"),
        rich_help_panel=SAMPLER,
    ),
]
Samples = Annotated[
    int | None,
    typer.Option(
        "--samples",
        min=1,
        metavar="N",
        help=_of_setting("Classifiers M that are averaged.", "sampler.samples"),
        rich_help_panel=SAMPLER,
    ),
]
Temperature = Annotated[
    float | None,
    typer.Option(
        "--temperature",
        min=0,
        metavar="TAU",
        help=_of_setting("Noise temperature tau: 0 predicts, 1 draws.", "sampler.temperature"),
        rich_help_panel=SAMPLER,
    ),
]
Guidance = Annotated[
    str | None,
    typer.Option(
        "--guidance",
        metavar="A",
        help=_of_setting("Scale of the support gradient: auto, or a number.", "sampler.guidance"),
        rich_help_panel=SAMPLER,
    ),
]


def runtime_flags(
    seed: int | None, device: str | None, threads: int | None, num_workers: int | None, batch_size: int | None
) -> dict[str, object]:
    """The shared flags as configuration keys."""
    return {
        "seed": seed,
        "runtime.device": device,
        "runtime.threads": threads,
        "runtime.num_workers": num_workers,
        "runtime.batch_size": batch_size,
    }


def sampler_flags(
    steps: int | None, samples: int | None, temperature: float | None, guidance: str | None
) -> dict[str, object]:
    """The sampler's flags as configuration keys."""
    scale: object = guidance
    if guidance is not None and guidance != "auto":
        try:
            scale = float(guidance)
        except ValueError:
            raise ConfigError(f"--guidance {guidance} is no number", hint="give auto or a number above 0") from None
    return {
        "sampler.steps": steps,
        "sampler.samples": samples,
        "sampler.temperature": temperature,
        "sampler.guidance": scale,
    }


def model_config(file: Path | None, settings: list[str] | None, *flags: Mapping[str, object]) -> Config:
    """Configuration of a command that works with a finished model."""
    merged: dict[str, object] = {}
    for part in flags:
        merged.update(part)
    return resolve(None, file, settings or (), merged)


def check_split(name: str) -> None:
    """Raises ConfigError for a split that there is not."""
    if name not in completions.SPLITS:
        raise ConfigError(f"unknown split '{name}'", hint=f"choose one of {', '.join(completions.SPLITS)}")


def check_new(file: Path, *, overwrite: bool) -> None:
    """Raises ConfigError when writing would replace a file without leave, or a folder, or cannot be done there."""
    place = next((parent for parent in file.absolute().parents if parent.exists()), file)
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise ConfigError(
            f"{file} cannot be written: {place} is no folder that you may write to", hint="give another place"
        )
    if file.is_dir() or (file.exists() and not overwrite):
        raise ConfigError(f"{file} exists already", hint="add --overwrite or give another name")


def start(config: Config) -> "torch.device":
    """Set threads and memory, and pick the device."""
    from metadiff_cli.core.device import keep_freed_memory, pick_device, set_threads

    keep_freed_memory()
    set_threads(config.runtime.threads)
    return pick_device(config.runtime.device)
