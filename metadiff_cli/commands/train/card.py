"""The model card of a checkpoint: made by `metatrain` from settings and measurements, shown by `inspect`."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from metadiff_cli.commands.train.pretrained import SEEN
from metadiff_cli.config.load import preset_names, read_preset
from metadiff_cli.config.schema import Config, is_pretrained

if TYPE_CHECKING:
    from metadiff_cli.core.encoders.image_encoder import ImageEncoder


def model_card(
    config: Config, images: "ImageEncoder", classes: int, results: Sequence[Mapping[str, Any]], learned: str
) -> dict[str, Any]:
    """The card of a model of `config`, trained on so many base classes; `results` are `evaluate --json` documents."""
    return {
        "summary": _summary(config, images),
        "encoder": _encoder(config, images),
        "data": config.card.data or f"{config.data.name}: {classes} base classes",
        "licence": config.card.licence or "that of the training images; metadiff does not know it",
        "made by": f"metadiff metatrain --preset {config.name}",
        "protocol": [_protocol(result) for result in results],
        "accuracy": [line for result in results for line in _accuracy(result)],
        "learned part": learned,
        "limits": config.card.limits or "not stated",
    }


def _summary(config: Config, images: "ImageEncoder") -> str:
    """That of the preset, unless the encoder is another one than the preset's."""
    usual = config.name not in preset_names() or read_preset(config.name).get("encoder") == images.name
    return config.summary if usual else f"preset {config.name} with the encoder {images.name}"


def _encoder(config: Config, images: "ImageEncoder") -> str:
    if is_pretrained(images.name):
        return f"{images.name}, images at {images.size} pixels; {SEEN}"
    return f"{images.name}, trained at {config.data.size} pixels, images at {images.size}"


ORDER = ("summary", "encoder", "data", "licence", "made by", "protocol", "accuracy", "learned part", "limits")


def card_lines(card: Mapping[str, Any]) -> list[str]:
    """The card as lines of text, in the order of ORDER (a checkpoint's header is sorted by name)."""
    lines = []
    for key in ORDER:
        value = card.get(key, "not stated")
        if isinstance(value, list):
            lines += [f"{key}:", *(f"  {line}" for line in value)]
        else:
            lines.append(f"{key}: {value}")
    return lines


def _protocol(result: Mapping[str, Any]) -> str:
    return (
        f"{result['way']}-way {result['shot']}-shot, {result['query']} queries a class, {result['episodes']} episodes "
        f"of {result['classes']} {result['split']} classes, seed {result['seed']}, {result['protocol']}"
    )


def _accuracy(result: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, m in result["methods"].items():
        line = f"{result['shot']}-shot {name}: {m['accuracy']:.2f} ± {m['ci95']:.2f} %"
        if name == "metadiff":
            line += f", calibration error {m['ece']:.1f} %"
        if (paired := m.get("paired_to_prototype")) is not None:
            line += f", minus prototype {paired['difference']:+.2f} ± {paired['ci95']:.2f}"
        lines.append(line)
    return lines
