"""The model card of a checkpoint: made by `metatrain` from settings and measurements, shown by `inspect`."""

from collections.abc import Mapping, Sequence
from typing import Any

from metadiff_cli.config.load import preset_names, read_preset
from metadiff_cli.config.schema import Config, is_pretrained

SEEN = "its weights come from elsewhere, and may have seen the classes that it is measured on"
ORDER = ("summary", "encoder", "data", "licence", "made by", "protocol", "accuracy", "learned part", "limits")


def model_card(
    config: Config,
    encoder: str,
    size: int,
    classes: int,
    results: Sequence[Mapping[str, Any]],
    learned: str,
    sets: Sequence[str] = (),
) -> dict[str, Any]:
    """The card of a model that was trained with `config` on `classes` base classes.

    `encoder` is its name, which sees images of `size` pixels; `results` are `evaluate --json` documents; `learned` says
    what became of the learned part; `sets` are the names of the data sets where these are others than the one of the
    configuration.
    """
    return {
        "summary": _summary(config, encoder),
        "encoder": _encoder(config, encoder, size),
        "data": config.card.data or f"{', '.join(sets) or config.data.name}: {classes} base classes",
        "licence": config.card.licence or "that of the training images; metadiff does not know it",
        "made by": f"metadiff metatrain --preset {config.name}",
        "protocol": [_protocol(result) for result in results],
        "accuracy": [line for result in results for line in _accuracy(result)],
        "learned part": learned,
        "limits": config.card.limits or "not stated",
    }


def _summary(config: Config, encoder: str) -> str:
    """The preset's summary, unless the encoder is another one than the preset's."""
    usual = config.name not in preset_names() or read_preset(config.name).get("encoder") == encoder
    return config.summary if usual else f"preset {config.name} with the encoder {encoder}"


def _encoder(config: Config, encoder: str, size: int) -> str:
    if is_pretrained(encoder):
        return f"{encoder}, images at {size} pixels; {SEEN}"
    return f"{encoder}, trained at {config.data.size} pixels, images at {size}"


def card_lines(card: Mapping[str, Any]) -> list[str]:
    """The card as lines of text in the order ORDER, as a checkpoint's header is sorted by name."""
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
        f"{result['way']}-way {result['shot']}-shot, {result['query']} queries per class, "
        f"{result['episodes']} episodes of {_classes(result)}, seed {result['seed']}, {result['protocol']}"
    )


def _classes(result: Mapping[str, Any]) -> str:
    """Which classes were measured; of several data sets, as far as each has classes and images."""
    if "data" in result:
        names = ", ".join(document["name"] for document in result["data"])
        return f"{result['split']} classes of each of {names}, the mean over them"
    of = f" of {result['name']}" if "name" in result else ""
    return f"{result['classes']} {result['split']} classes{of}"


def _accuracy(result: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, m in (result["mean"] if "mean" in result else result["methods"]).items():
        line = f"{result['shot']}-shot {name}: {m['accuracy']:.2f} ± {m['ci95']:.2f} %"
        if name == "metadiff" and m["ece"] is not None:
            line += f", calibration error {m['ece']:.1f} %"
        if (paired := m.get("paired_to_prototype")) is not None:
            line += f", minus prototype {paired['difference']:+.2f} ± {paired['ci95']:.2f}"
        lines.append(line)
    return lines
