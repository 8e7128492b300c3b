"""`metadiff card`: the model card of a checkpoint, as the README.md of a repository on the Hugging Face Hub."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from metadiff_cli._version import __version__
from metadiff_cli.commands.settings import check_new
from metadiff_cli.commands.train.card import ORDER
from metadiff_cli.console import Screen
from metadiff_cli.core.checkpoints.file import KINDS, damaged, read_header, reason_of
from metadiff_cli.data.benchmarks import KNOWN
from metadiff_cli.data.hub import fetch, shown
from metadiff_cli.errors import CheckpointError
from metadiff_cli.files import checkpoint_path, write_text

TASK = {"type": "image-classification", "name": "Few-shot image classification"}
# identifiers that the Hub knows; any other licence is `other`, and stands in the text
LICENCES = (
    "mit", "apache-2.0", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0",
    "cc-by-nc-sa-4.0", "gpl-3.0", "lgpl-3.0", "mpl-2.0",
)  # fmt: skip
SEVERAL = "the mean over them"  # in a line of the protocol that names several data sets
SHOWN = 50  # classes of a classifier that the card names
USES = {  # how each kind of file is used, from the command line and from Python
    "model": ("metadiff adapt --checkpoint {} --support ./imgs --query ./q", 'FewShotClassifier.from_pretrained("{}")'),
    "classifier": ("metadiff adapt --classifier {} --query ./q", 'FewShotClassifier.load("{}")'),
    "encoder": ("metadiff adapt --encoder {} --support ./imgs --query ./q", 'FewShotClassifier(encoder="{}")'),
    "baseline": ("metadiff evaluate --checkpoint {} --data DIR", ""),
}


def write_card(file: Path | None, out: Path | None, screen: Screen, *, overwrite: bool) -> None:
    """Write the card of a checkpoint, or of the packaged one, to `out` or else to stdout.

    Raises CheckpointError when the file has no card, and ConfigError when `out` cannot be written.
    """
    if out is not None:
        check_new(out, overwrite=overwrite)
    path = checkpoint_path(fetch(file, screen.note))
    text = hub_card(path, read_header(path))
    if out is None:
        screen.text(text.rstrip("\n"))
        return
    write_text(out, text)
    screen.note(f"written: {out}; upload it as README.md beside {path.name if file is None else shown(file)}")


def hub_card(path: Path, header: Mapping[str, Any]) -> str:
    """The card in Markdown, with its YAML head.

    Raises CheckpointError for the state of an unfinished training, and for a header of another form.
    """
    if header["kind"] not in USES:
        raise CheckpointError(f"{path} is {KINDS[header['kind']]}", hint="give a checkpoint.safetensors")
    try:
        head = yaml.safe_dump(card_head(path, header), sort_keys=False, allow_unicode=True)
        body = "\n".join(_body(path, header))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise damaged(path, reason_of(error)) from error
    return f"---\n{head}---\n\n{body}\n"


def card_head(path: Path, header: Mapping[str, Any]) -> dict[str, Any]:
    """What the Hub reads: library, task, licence, data sets, and the measured accuracy."""
    name = _name(path, header)
    licence = str(header.get("card", {}).get("licence", "")).strip().lower()
    head: dict[str, Any] = {"library_name": "metadiff", "pipeline_tag": TASK["type"]}
    head |= {"license": licence} if licence in LICENCES else {"license": "other", "license_name": "see-the-model-card"}
    head["tags"] = ["metadiff", "few-shot-learning", header["kind"], _slug(str(header.get("encoder", "")))]
    dataset = _dataset(header)
    if dataset is not None:
        head["datasets"] = [dataset]
    if results := _results(header, dataset):
        head["model-index"] = [{"name": name, "results": results}]
    return head


def _dataset(header: Mapping[str, Any]) -> str | None:
    """The name of the data set, None for a folder of one's own and for several data sets."""
    name = header.get("config", {}).get("data", {}).get("name")
    several = any(SEVERAL in line for line in header.get("card", {}).get("protocol", []))
    return name if name in KNOWN and not several else None


def _results(header: Mapping[str, Any], dataset: str | None) -> list[dict[str, Any]]:
    """The accuracy in the header in the Hub's form; none for a file that was not measured on episodes."""
    metrics = header.get("metrics", {})
    methods = metrics.get("methods", {})
    if not methods:
        return []
    measured = methods.get("metadiff") or next(iter(methods.values()))
    episodes = f"{metrics['way']}-way {metrics['shot']}-shot"
    values = [{
        "type": "accuracy", "value": round(measured["accuracy"], 2),
        "name": f"{episodes} accuracy in %, 95 % interval ± {measured['ci95']:.2f}",
    }]  # fmt: skip
    if measured.get("ece") is not None:
        values.append({"type": "ece", "value": round(measured["ece"], 2), "name": f"{episodes} calibration error in %"})
    data = {"type": dataset or "custom", "name": dataset or "see the protocol in the card", "split": metrics["split"]}
    return [{"task": dict(TASK), "dataset": {**data, "args": _episodes(metrics)}, "metrics": values}]


def _episodes(metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {key: metrics[key] for key in ("way", "shot", "query", "episodes", "seed") if key in metrics}


def _body(path: Path, header: Mapping[str, Any]) -> Iterator[str]:
    """The lines of the text below the head."""
    kind, card = header["kind"], header.get("card", {})
    yield f"# {_name(path, header)}"
    yield ""
    what = KINDS[kind].partition(" (")[0].capitalize()
    yield f"{what} of metadiff, which learns image classes from a few images each."
    yield ""
    command, python = USES[kind]
    yield from ("```sh", "pip install metadiff", command.format(path.name), "```", "")
    if python:
        yield from ("```python", "from metadiff_cli import FewShotClassifier", "")
        yield from (f"classifier = {python.format(path.name)}", "```", "")
    if kind == "model":
        yield "`--checkpoint hf://USER/REPO/FILE@REVISION` takes it from the Hub, at a commit or a tag."
        yield ""
    for key in ORDER:
        if key in card:
            yield from _entry(key.capitalize(), card[key])
    yield from _table(header.get("metrics", {}))
    if kind == "classifier":
        classes = header["classes"]
        named = ", ".join(map(_line, classes[:SHOWN]))
        yield from (f"**Classes** ({len(classes)}). {named}{', ...' if len(classes) > SHOWN else ''}", "")
    yield f"Encoder: `{_line(header.get('encoder', 'none'))}`."
    yield f"Written by metadiff {_line(header['package'])}; this card by metadiff {__version__}."


def _table(metrics: Mapping[str, Any]) -> Iterator[str]:
    """The accuracy of all methods that were measured, as a Markdown table."""
    methods = metrics.get("methods", {})
    if not methods:
        return
    episodes = f"{metrics['way']}-way {metrics['shot']}-shot, {metrics.get('episodes')} episodes"
    yield f"{episodes}, {metrics['split']} classes:"
    yield from ("", "| method | accuracy % | calibration error % |", "|---|---|---|")
    for name, measured in methods.items():
        ece = "" if measured.get("ece") is None else f"{measured['ece']:.1f}"
        yield f"| {_line(name)} | {measured['accuracy']:.2f} ± {measured['ci95']:.2f} | {ece} |"
    yield ""


def _name(path: Path, header: Mapping[str, Any]) -> str:
    """The name of the model: that of its file, or of its settings where all files have that name."""
    name = header.get("config", {}).get("name") if header["kind"] != "classifier" else None
    return f"metadiff-{_slug(str(name or path.stem))}"


def _slug(text: str) -> str:
    """Letters, digits, dots and hyphens, as the names on the Hub have them."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-") or "none"


def _entry(key: str, value: object) -> Iterator[str]:
    """One entry of the stored card: a sentence, or a list."""
    if isinstance(value, list):
        yield from (f"**{key}:**", "", *(f"- {_line(line)}" for line in value), "")
    else:
        yield from (f"**{key}.** {_line(value).rstrip('.')}.", "")


def _line(value: object) -> str:
    """A value of the header as one line: whoever wrote it decides neither about tables nor about HTML."""
    return " ".join(str(value).split()).replace("<", "&lt;").replace("|", "&#124;")
