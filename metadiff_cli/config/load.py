"""From the layers of settings to a checked configuration. No torch here.

Later layers win: defaults < preset < `--config FILE` < METADIFF_* variables < `--set key=value` < dedicated flag.
"""

import os
import re
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from metadiff_cli.config.schema import ENCODERS, Config, is_pretrained
from metadiff_cli.errors import ConfigError, suggest

PREFIX = "METADIFF_"
NO_CONFIG_KEYS = {"METADIFF_DATA_DIR", "METADIFF_CACHE_DIR", "METADIFF_DEBUG"}
# what Kubernetes sets in every container beside a service called metadiff, or metadiff-something
SERVICE = re.compile(
    r"METADIFF_(?!.*__)(\w+_)?"
    r"(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)"
)
MAX_FILE = 64 * 1024  # bytes of a configuration file; ours have about one kilobyte
MAX_DEPTH, MAX_ALIASES = 16, 16  # of YAML: aliases of aliases grow exponentially when they are expanded
MAX_SHOWN = 80  # characters of a wrong value in a message

Layer = tuple[str, dict[str, Any]]  # the name of a source of values, and the values


def preset_folder() -> Path:
    """The folder of the presets: in the installed package, or beside it in a checkout and an editable install."""
    package = Path(__file__).parent.parent
    inside = package / "presets"
    return inside if inside.is_dir() else package.parent / "presets"


def preset_names() -> list[str]:
    """The names of all presets, sorted."""
    return sorted(path.stem for path in preset_folder().glob("*.yaml"))


def read_preset(name: str) -> dict[str, Any]:
    """The values of a preset. Raises ConfigError with a suggestion if there is none of that name."""
    names = preset_names()
    if name not in names:
        raise ConfigError(f"unknown preset '{name}'", hint=f"{suggest(name, names)}`metadiff presets list` shows all")
    return read_yaml(preset_folder() / f"{name}.yaml")


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, safely loaded within limits. Raises ConfigError."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE + 1)  # devices and pipes do not tell their size before
        if len(raw) > MAX_FILE:
            raise ConfigError(f"{path} is larger than {MAX_FILE // 1024} KiB", hint="give a configuration file")
        values = load_yaml(raw.decode("utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist", hint=f"`metadiff presets copy NAME {path}` makes one") from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as YAML ({error})", hint="mend or replace the file") from error
    if values is not None and not isinstance(values, dict):
        raise ConfigError(f"{path} holds no `key: value` lines", hint="`metadiff presets show NAME` prints an example")
    return values or {}


def load_yaml(text: str) -> Any:
    """Load YAML safely. Raises YAMLError or ValueError for what is no YAML or exceeds the limits above."""
    depth, aliases, anchors = 0, 0, []
    for event in yaml.parse(text, Loader=yaml.SafeLoader):  # events come one by one, before anything is built
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            anchors.append(event.anchor)
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
            anchors.pop()
        elif isinstance(event, yaml.AliasEvent):
            aliases += 1
            if event.anchor in anchors:
                raise ValueError(f"alias *{event.anchor} is inside of what it stands for")
        if depth > MAX_DEPTH or aliases > MAX_ALIASES:
            raise ValueError(f"more than {MAX_DEPTH} levels or {MAX_ALIASES} aliases")
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise
    except Exception as error:  # PyYAML's constructors fail on values such as `!!int ''`
        raise ValueError(f"a value does not fit its tag: {error}") from error


def resolve(
    preset: str | None = None,
    file: Path | None = None,
    settings: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
) -> Config:
    """Merge all layers and check the result.

    `settings` are `--set` arguments such as "pretrain.epochs=3". `flags` are values by dotted key; None means not
    given. Raises one ConfigError that lists every problem.
    """
    given = layers(preset, file, settings, environ)
    given += [("flag", _dotted(key, value)) for key, value in (flags or {}).items() if value is not None]
    return check(merge_layers(given), given)


def layers(
    preset: str | None = None,
    file: Path | None = None,
    settings: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
) -> list[Layer]:
    """All layers but the flags, in rising precedence. Raises ConfigError."""
    found: list[Layer] = [] if preset is None else [(f"preset {preset}", read_preset(preset))]
    found += [(f"--config {file}", read_yaml(file))] if file else []
    found += environment_layers(os.environ if environ is None else environ)
    return found + [("--set", _dotted(*_split_setting(text))) for text in settings]


def merge_layers(given: Sequence[Layer]) -> dict[str, Any]:
    """The values of all layers together; later layers win."""
    merged: dict[str, Any] = {}
    for _, layer in given:
        _merge(merged, layer)
    return merged


def origins(given: Sequence[Layer]) -> dict[str, str]:
    """For every dotted key, the name of the layer that its value comes from, or "default"."""
    found = dict.fromkeys(flat(Config().model_dump()), "default")
    for name, layer in given:
        found |= {key: name for key in flat(layer) if key in found}
    return found


def flat(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """The values of nested mappings by dotted key."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{before}{name}.") if isinstance(value, dict) else {f"{before}{name}": value}
    return found


def check(values: dict[str, Any], given: Sequence[Layer] = ()) -> Config:
    """The configuration that `values` make. Raises one ConfigError that lists every problem.

    `given` are the layers that the values come from, which the error names.
    """
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        lines = [_explain(problem, given) for problem in error.errors()]
        raise ConfigError("; ".join(lines), hint="`metadiff config show` prints every key") from error


def environment_layers(environ: Mapping[str, str]) -> list[Layer]:
    """The layers of METADIFF_* variables: METADIFF_PRETRAIN__EPOCHS=3 sets pretrain.epochs, METADIFF_SEED=3 seed.

    Variables that are empty, or that Kubernetes sets for a service called metadiff, count as not set.
    """
    return [
        (f"${name}", _dotted(name.removeprefix(PREFIX).lower().replace("__", "."), _parse(text)))
        for name, text in sorted(environ.items())
        if name.startswith(PREFIX) and name not in NO_CONFIG_KEYS and text.strip() and not SERVICE.fullmatch(name)
    ]


def encoder_file(encoder: str | None) -> Path | None:
    """The file that `--encoder` gives, or None if it names an encoder.

    A name always wins over a file or folder of that name: `./conv4` is a path, `conv4` is not.
    """
    if not encoder or encoder in ENCODERS or is_pretrained(encoder):
        return None
    path = Path(encoder)
    is_path = "/" in encoder or os.sep in encoder or path.suffix == ".safetensors"
    return path if is_path or path.exists() else None


def to_yaml(config: Config) -> str:
    """The whole configuration as a YAML document that `--config` reads back."""
    text: str = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    return text


def _split_setting(text: str) -> tuple[str, Any]:
    """Key and value of a `--set` argument. Raises ConfigError."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {text} has no value", hint="write --set key=value, as in --set pretrain.epochs=3")
    return key.strip(), _parse(value)


def _parse(text: str) -> Any:
    """A value as YAML reads it, or the text itself if it is no YAML; the schema refuses text where it wants numbers."""
    try:
        return load_yaml(text)
    except (yaml.YAMLError, ValueError):
        return text


def _dotted(key: str, value: Any) -> dict[str, Any]:
    """The nested mapping with one value, at a dotted key. Raises ConfigError for a key of too many parts."""
    if key.count(".") > MAX_DEPTH:
        raise ConfigError(f"unknown key '{key[:MAX_SHOWN]}'", hint="`metadiff config show` prints every key")
    for part in reversed(key.split(".")):
        value = {part: value}
    result: dict[str, Any] = value
    return result


def _merge(into: dict[str, Any], layer: Mapping[str, Any]) -> None:
    """Put the values of `layer` over those of `into`, key by key at any depth."""
    for key, value in layer.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = dict(value) if isinstance(value, dict) else value


def _explain(problem: Any, given: Sequence[Layer]) -> str:
    """One problem that pydantic found, as a sentence; an unknown key gets a suggestion."""
    place = [str(part) for part in problem["loc"]]
    key, source = ".".join(place), _source(place, given)
    if problem["type"] == "extra_forbidden":
        known = [".".join([*place[:-1], other]) for other in _keys_beside(place)]
        return f"unknown key '{key}'{suggest(key, known, before=', ', after='')}{f' (from {source})' if source else ''}"
    what, value = problem["msg"].removeprefix("Value error, "), _shown(problem["input"])
    return f"{key or 'configuration'}: {what} (got {value}{f' from {source}' if source else ''})"


def _source(place: Sequence[str], given: Sequence[Layer]) -> str | None:
    """The name of the last layer that has a value at `place`."""
    for name, layer in reversed(given if place else ()):
        value: Any = layer
        for part in place:
            value = value.get(part) if isinstance(value, dict) else value
        if value is not None:
            return name
    return None


def _shown(value: object) -> str:
    """The beginning of a value; a large value is never written out whole."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = MAX_SHOWN
    try:
        return short.repr(value)[:MAX_SHOWN]
    except ValueError:  # Python writes no integer of more than 4,300 digits
        return "a very long number"


def _keys_beside(place: Sequence[str]) -> list[str]:
    """The known keys of the section that holds the key at `place`."""
    section: type[BaseModel] = Config
    for part in place[:-1]:
        field = section.model_fields.get(part)
        if field is None or not isinstance(field.annotation, type) or not issubclass(field.annotation, BaseModel):
            return []
        section = field.annotation
    return list(section.model_fields)
