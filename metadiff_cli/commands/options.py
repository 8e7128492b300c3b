"""Options that several commands share, declared once."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from metadiff_cli.commands import completions
from metadiff_cli.config import Config, resolve
from metadiff_cli.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    import torch

PACKAGED = Path(__file__).parent.parent / "checkpoints" / "default.safetensors"
COMMON = "Common"
PLACES = "Places"

Preset = Annotated[
    str | None,
    typer.Option(
        "--preset", "-p", help="Named settings; `metadiff presets list` shows all.", autocompletion=completions.presets
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Show the plan, with data, steps and an estimate of the time, and leave.")
]
Data = Annotated[Path | None, typer.Option("--data", help="Folder of the data set.", rich_help_panel=PLACES)]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Run directory to write.", rich_help_panel=PLACES)]
EncoderOption = Annotated[
    str | None,
    typer.Option(
        "--encoder",
        "-e",
        help="conv4, resnet10, resnet12, an encoder.safetensors, or for metatrain torchvision:MODEL or timm:MODEL.",
        autocompletion=completions.encoders,
    ),
]
EncoderWeights = Annotated[
    Path | None,
    typer.Option(
        "--encoder-weights",
        help="Weights of a torchvision: or timm: encoder, .safetensors or .pth. [default: the library downloads them]",
        rich_help_panel=PLACES,
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace what is in the run directory.", rich_help_panel=PLACES)
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with the run in the run directory.", rich_help_panel=PLACES)
]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="YAML file laid over the preset.", rich_help_panel=COMMON)
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="key=value, as in pretrain.epochs=3.", rich_help_panel=COMMON)
]
Seed = Annotated[
    int | None, typer.Option("--seed", help="Seed of everything random. [default: 0]", rich_help_panel=COMMON)
]
Device = Annotated[
    str | None, typer.Option("--device", help="auto, cpu, cuda or mps. [default: auto]", rich_help_panel=COMMON)
]
Threads = Annotated[
    int | None, typer.Option("--threads", min=1, help="CPU threads of one operation.", rich_help_panel=COMMON)
]
NumWorkers = Annotated[
    int | None, typer.Option("--num-workers", min=1, help="Threads that decode images.", rich_help_panel=COMMON)
]
BatchSize = Annotated[
    int | None,
    typer.Option("--batch-size", min=1, help="Images of one forward pass of the encoder.", rich_help_panel=COMMON),
]
Report = Annotated[
    Path | None,
    typer.Option("--report", help="Write a self-contained HTML page here, replacing it.", rich_help_panel=PLACES),
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.", rich_help_panel=COMMON)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Results and errors only.", rich_help_panel=COMMON)]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="More about what happens.", rich_help_panel=COMMON)]
CheckpointFile = Annotated[
    Path | None,
    typer.Option(
        "--checkpoint",
        "-c",
        help="checkpoint.safetensors of a run. [default: the package's]",
        rich_help_panel=PLACES,
    ),
]
SAMPLER = "Sampler"
Steps = Annotated[
    int | None,
    typer.Option("--steps", min=1, max=1000, help="Denoising steps S. [default: 10]", rich_help_panel=SAMPLER),
]
Samples = Annotated[
    int | None,
    typer.Option("--samples", min=1, help="Classifiers M that are averaged. [default: 1]", rich_help_panel=SAMPLER),
]
Temperature = Annotated[
    float | None,
    typer.Option("--temperature", min=0, help="Noise temperature tau, 0 to 1. [default: 0]", rich_help_panel=SAMPLER),
]
Guidance = Annotated[
    str | None,
    typer.Option(
        "--guidance", help="Scale of the support gradient: auto, or a number. [default: auto]", rich_help_panel=SAMPLER
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
            raise ConfigError(f"--guidance {guidance}", hint="give auto or a number above 0") from None
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


def checkpoint_path(given: Path | None) -> Path:
    """The checkpoint that was given, else the one that comes with the package."""
    if given is not None:
        return given
    if not PACKAGED.is_file():
        raise CheckpointError(
            f"the checkpoint that comes with the package is not there ({PACKAGED})",
            hint="install metadiff again, or give one that `metadiff metatrain` made with --checkpoint",
        )
    return PACKAGED


def start(config: Config) -> "torch.device":
    """Set threads and memory, and pick the device."""
    from metadiff_cli.core.device import keep_freed_memory, pick_device, set_threads

    keep_freed_memory()
    set_threads(config.runtime.threads)
    return pick_device(config.runtime.device)
