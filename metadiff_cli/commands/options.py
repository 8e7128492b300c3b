"""Options that several commands share, declared once. Every `--help` imports this module: nothing heavy here."""

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from metadiff_cli.commands import completions
from metadiff_cli.commands.parsing import path_option
from metadiff_cli.errors import ConfigError

COMMON, PLACES, TRAINING, SAMPLER = "Common", "Places", "Training", "Sampler"  # groups of the help


def shown(text: str, default: object) -> str:
    """The help `text` of an option, followed by its default: a value, or words for what happens without the option."""
    return f"{text} \\[default: {default}]"  # a bare bracket would be taken for markup, and vanish


def option(panel: str, *names: str, help: str, default: object = None, **more: Any) -> Any:
    """An option in the group `panel` of the help. `default` is shown where the parameter's own default is None."""
    return typer.Option(*names, help=help if default is None else shown(help, default), rich_help_panel=panel, **more)


def path(panel: str, *names: str, help: str, metavar: str, **more: Any) -> Any:
    """An option that takes a path, see `option`. An empty path is refused."""
    return option(panel, *names, help=help, metavar=metavar, parser=path_option, **more)


Preset = Annotated[
    str | None,
    option(
        TRAINING, "--preset", "-p", metavar="NAME", default="none", autocompletion=completions.presets,
        help="Start from the settings of this preset; `metadiff presets list` names all.",
    ),
]  # fmt: skip
DryRun = Annotated[
    bool,
    option(TRAINING, "--dry-run", help="Print the plan (data, steps, an estimate of the time) and train nothing."),
]
EncoderOption = Annotated[
    str | None,
    option(
        TRAINING, "--encoder", "-e", metavar="ENCODER", default="the preset's", autocompletion=completions.encoders,
        help=f"{', '.join(completions.ENCODERS)} or an encoder.safetensors; metatrain also takes torchvision:MODEL "
        "and timm:MODEL.",
    ),
]  # fmt: skip
EncoderWeights = Annotated[
    Path | None,
    path(
        TRAINING, "--encoder-weights", metavar="FILE", default="downloaded by the library",
        help="Weights of a torchvision: or timm: encoder, as .safetensors or .pth.",
    ),
]  # fmt: skip

Data = Annotated[
    Path | None,
    path(PLACES, "--data", metavar="DIR", default="$METADIFF_DATA_DIR/NAME", help="Folder of the data set."),
]
Out = Annotated[
    Path | None,
    path(
        PLACES, "--out", "-o", metavar="DIR", default="runs/PRESET, for pretrain runs/PRESET-encoder",
        help="Run directory to write.",
    ),
]  # fmt: skip
Overwrite = Annotated[bool, option(PLACES, "--overwrite", help="Replace the results in the run directory.")]
Resume = Annotated[bool, option(PLACES, "--resume", help="Continue the run in the run directory.")]
InitFrom = Annotated[
    Path | None,
    path(PLACES, "--init-from", metavar="FILE", help="Start from the weights of an encoder or checkpoint file."),
]
CheckpointFile = Annotated[
    Path | None,
    path(
        PLACES, "--checkpoint", "-c", metavar="FILE", default="the one in the package",
        help="The checkpoint.safetensors of a run, or hf://USER/REPO/FILE@REVISION.",
    ),
]  # fmt: skip
Report = Annotated[
    Path | None,
    path(PLACES, "--report", metavar="FILE", help="Write a self-contained HTML page, replacing an earlier one."),
]

Steps = Annotated[
    int | None, option(SAMPLER, "--steps", metavar="N", min=1, max=1000, default=10, help="Number of denoising steps.")
]
Samples = Annotated[
    int | None,
    option(SAMPLER, "--samples", metavar="N", min=1, default=1, help="Number of sampled classifiers to average."),
]
Temperature = Annotated[
    float | None,
    option(
        SAMPLER, "--temperature", metavar="TAU", min=0, default=0,
        help="Noise temperature: 0 gives the most probable classifier, 1 samples the posterior.",
    ),
]  # fmt: skip
Guidance = Annotated[
    str | None,
    option(
        SAMPLER,
        "--guidance",
        metavar="A",
        default="auto",
        help="How far class statistics are distrusted: auto, or 1 (not at all) and up.",
    ),
]

ConfigFile = Annotated[
    Path | None,
    path(COMMON, "--config", metavar="FILE", default="none", help="YAML file of settings, applied over a preset."),
]
Settings = Annotated[
    list[str] | None,
    option(COMMON, "--set", metavar="KEY=VALUE", help="Change one setting, as in seed=1; repeatable."),
]
Seed = Annotated[int | None, option(COMMON, "--seed", metavar="N", default=0, help="Seed of all random numbers.")]
Device = Annotated[
    str | None,
    option(COMMON, "--device", metavar="NAME", default="auto", help="Compute device: auto, cpu, cuda or mps."),
]
Threads = Annotated[
    int | None,
    option(COMMON, "--threads", metavar="N", min=1, default="torch's choice", help="CPU threads per operation."),
]
NumWorkers = Annotated[
    int | None,
    option(COMMON, "--num-workers", metavar="N", min=1, default="one per core", help="Threads that decode images."),
]
BatchSize = Annotated[
    int | None,
    option(
        COMMON, "--batch-size", metavar="N", min=1, default="32 or fewer, on a GPU 256",
        help="Images per forward pass of the encoder.",
    ),
]  # fmt: skip
Backend = Annotated[
    str | None,
    option(
        COMMON, "--backend", metavar="NAME", default="auto",
        help="What runs the encoder on a CPU: auto, torch or onnxruntime.",
    ),
]  # fmt: skip
AsJson = Annotated[bool, option(COMMON, "--json", help="Print one JSON document on stdout.")]
Quiet = Annotated[bool, option(COMMON, "--quiet", "-q", help="Print results and errors only.")]
Verbose = Annotated[bool, option(COMMON, "--verbose", "-v", help="Print more details.")]


def runtime_flags(
    seed: int | None,
    device: str | None,
    threads: int | None,
    num_workers: int | None,
    batch_size: int | None,
    backend: str | None = None,
) -> dict[str, object]:
    """The common flags by configuration key."""
    return {
        "seed": seed,
        "runtime.device": device,
        "runtime.threads": threads,
        "runtime.num_workers": num_workers,
        "runtime.batch_size": batch_size,
        "runtime.backend": backend,
    }


def sampler_flags(
    steps: int | None, samples: int | None, temperature: float | None, guidance: str | None
) -> dict[str, object]:
    """The sampler's flags by configuration key. Raises ConfigError when `guidance` is neither auto nor a number."""
    try:
        scale = guidance if guidance in (None, "auto") else float(guidance)
        if isinstance(scale, float) and not 0 < scale < math.inf:
            raise ValueError
    except ValueError:
        hint = "give auto or a number above 0"
        raise ConfigError(f"--guidance {guidance} is not a number above 0", hint=hint) from None
    return {
        "sampler.steps": steps,
        "sampler.samples": samples,
        "sampler.temperature": temperature,
        "sampler.guidance": scale,
    }
