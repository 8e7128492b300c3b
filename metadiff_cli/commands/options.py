"""Options that several commands share, declared once."""

from pathlib import Path
from typing import Annotated

import typer

COMMON = "Common"
PLACES = "Places"

Preset = Annotated[
    str | None, typer.Option("--preset", "-p", help="Named settings; `metadiff presets list` shows all.")
]
Data = Annotated[Path | None, typer.Option("--data", help="Folder of the data set.", rich_help_panel=PLACES)]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Run directory to write.", rich_help_panel=PLACES)]
EncoderOption = Annotated[
    str | None, typer.Option("--encoder", "-e", help="conv4, resnet12, or an encoder.safetensors.")
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
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.", rich_help_panel=COMMON)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Results and errors only.", rich_help_panel=COMMON)]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="More about what happens.", rich_help_panel=COMMON)]


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
