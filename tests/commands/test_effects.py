"""No option is accepted and ignored: each one changes the outcome, or is refused, or is documented as harmless.

The outcome of a command is its exit code, its results on stdout, and the files that it writes.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import typer

from metadiff_cli import files
from metadiff_cli.app import app
from metadiff_cli.config.load import resolve, to_yaml
from tests.worlds import COLOURS, Result, invoke, paint

CLI = Callable[..., Result]
OUTPUT_ONLY = {"--quiet", "--verbose"}  # what else is printed, never the results
SPEED_ONLY = {
    "--device": "cpu",
    "--threads": "1",
    "--num-workers": "2",
    "--batch-size": "7",
    "--backend": "torch",
}  # how fast, never what
FLAG = ""  # the value of an option that takes none
UNSTABLE = ("episodes_per_second", "newest")  # parts of documents that differ from run to run
RECORDS = ("manifest.json", "result.json", "metrics.csv", "config.yaml")  # files of a run that tell times and machine


@dataclass(frozen=True)
class Walk:
    """A command that runs in a second, its usual options, and values that should matter for all its options."""

    arguments: dict[str, str]
    values: dict[str, str]
    beside: dict[str, dict[str, str]] = field(default_factory=dict)  # what an option needs beside it to matter


EVALUATE = Walk(
    {"-c": "run/checkpoint.safetensors", "--way": "3", "--query": "3", "--episodes": "4", "--controls": "prototype"},
    {
        "--checkpoint": "gone.safetensors", "--data": "photos", "--split": "val", "--way": "2", "--shot": "2",
        "--query": "2", "--episodes": "3", "--imbalance": "2", "--controls": "analytic", "--fail-under": "100",
        "--compare": "run/result.json", "--report": "new.html", "--steps": "3", "--samples": "2", "--temperature": "1",
        "--guidance": "2", "--config": "own.yaml", "--set": "seed=5", "--seed": "5",
    },
)  # fmt: skip
ADAPT = Walk(
    {"-S": "support", "-Q": "query", "-c": "run/checkpoint.safetensors", "--format": "json"},
    {
        "--query": "query/red.png", "--support": "photos", "--classifier": "saved.safetensors", "--format": "csv",
        "--top-k": "1", "--reject-below": "0.99", "--reject": "auto", "--sort-into": "sorted", "--unlabeled": "photos",
        "--none": "photos",
        "--checkpoint": "gone.safetensors", "--save": "new.safetensors", "--report": "new.html",
        "--steps": "3", "--samples": "2", "--temperature": "1", "--guidance": "2", "--config": "own.yaml",
        "--set": "seed=5", "--seed": "5", "--encoder": "lite0", "--encoder-weights": "saved.safetensors",
        "--views": "6", "--forget": "red/0.png", "--relabel": "fix.csv", "--rename": "red=pink", "--suggest": "2",
    },
    {
        "--overwrite": {"--save": "saved.safetensors"}, "--json": {"--format": "table"},
        "--move": {"--sort-into": "sorted"},
        "--seed": {"--temperature": "1"}, "--steps": {"--temperature": "1"},
    },
)  # fmt: skip
TINY = [
    "data.size=16", "metatrain.steps=2", "metatrain.validate_every=1", "metatrain.validation_episodes=4",
    "evaluation.episodes=4",
]  # fmt: skip
TRAIN = {
    "--preset": "none-of-them", "--data": "photos", "--out": "another", "--config": "own.yaml", "--set": "seed=5",
    "--seed": "5",
}  # fmt: skip
AGAIN = {"--overwrite": {"--out": "run"}, "--resume": {"--out": "run"}}
PRETRAIN = Walk(
    {"--config": "tiny.yaml", "--out": "new"},
    {**TRAIN, "--encoder": "conv4-padded", "--epochs": "1", "--init-from": "run/encoder.safetensors"},
    AGAIN,
)
METATRAIN = Walk(
    {"--config": "tiny.yaml", "--out": "new"},
    {
        **TRAIN, "--encoder": "gone.safetensors", "--encoder-weights": "there.onnx", "--method": "none-of-them",
        "--val-data": "photos",
        "--init-from": "run/checkpoint.safetensors", "--report": "new.html",
    },
    AGAIN,
)  # fmt: skip
OTHERS = {
    "demo": Walk({}, {"--out": "first"}),
    "inspect": Walk({"": "run/checkpoint.safetensors"}, {}),
    "card": Walk({"": "run/checkpoint.safetensors"}, {"--out": "new.md"}, {"--overwrite": {"--out": "there.onnx"}}),
    "doctor": Walk({}, {}),
    "export": Walk(
        {"": "saved.safetensors", "--onnx": "a.onnx"}, {"--onnx": "b.onnx"}, {"--overwrite": {"--onnx": "there.onnx"}}
    ),
    "presets list": Walk({}, {}),
    "presets show": Walk({"": "folder"}, {}),
    "presets copy": Walk({"": "folder new.yaml"}, {}),
    "config show": Walk({}, {"--preset": "folder", "--config": "own.yaml", "--set": "seed=5"}),
    "data list": Walk({}, {}),
    "data prepare": Walk({"": "glyphs"}, {"--root": "data", "--from-archive": "there.onnx"}),
    "data verify": Walk({"": "photos"}, {"--layout": "omniglot"}),
    "cache list": Walk({}, {}),
    "cache clear": Walk({}, {}),
}
WALKS = {"pretrain": PRETRAIN, "metatrain": METATRAIN, "evaluate": EVALUATE, "adapt": ADAPT, **OTHERS}


def commands(command: Any, words: str = "") -> dict[str, Any]:
    """All commands by their words."""
    inner = getattr(command, "commands", None)
    if inner is None:
        return {words.strip(): command}
    return {name: c for word, sub in inner.items() for name, c in commands(sub, f"{words} {word}").items()}


ALL = commands(typer.main.get_command(app))
CASES = [
    (name, option) for name, walk in WALKS.items() for option in ALL[name].params
    if option.param_type_name == "option" and option.name != "help"
]  # fmt: skip


@pytest.fixture(scope="module")
def world(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that the values above name."""
    root = tmp_path_factory.mktemp("effects")
    shutil.copytree(small_run, root / "run")
    (root / "other").mkdir()
    shutil.copy(
        Path("metadiff_cli/checkpoints/default.safetensors").resolve(), root / "other" / "checkpoint.safetensors"
    )
    for c in range(6):
        for i in range(5):
            paint(root / "photos" / f"kind-{c}" / f"{i}.png", (40 * c, 200 - 30 * c, 90), seed=10 * c + i, size=24)
    for c, (name, colour) in enumerate(COLOURS.items()):
        paint(root / "support" / name / "0.png", colour, seed=c)
        paint(root / "query" / f"{name}.png", colour, seed=100 + c)
    (root / "query" / "broken.png").write_bytes(b"x")
    (root / "own.yaml").write_text("seed: 7\n")
    (root / "tiny.yaml").write_text(to_yaml(resolve(None, small_run / "config.yaml", TINY)))
    (root / "there.onnx").touch()
    (root / "cache" / "features").mkdir(parents=True)
    (root / "cache" / "features" / f"{'0' * 32}-{'1' * 32}.npy").touch()
    saved = invoke("adapt", "-S", root / "support", "-Q", root / "query", "-c", root / "run" / "checkpoint.safetensors",
                   "--save", root / "saved.safetensors")  # fmt: skip
    assert saved.code == 0, saved.err
    return root


@pytest.fixture(scope="module")
def outcomes() -> dict[tuple[Any, ...], tuple[Any, ...]]:
    """What command lines gave before."""
    return {}


@pytest.fixture
def measured(
    outcomes: dict[tuple[Any, ...], tuple[Any, ...]], world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, dict[str, str]], tuple[Any, ...]]:
    """Runs a command in a new copy of the world: its exit code, results, and files."""
    monkeypatch.setattr("metadiff_cli.commands.look.export.export_onnx", lambda classifier, path: path.write_text("x"))
    monkeypatch.setattr("metadiff_cli.commands.look.export.require_exporter", lambda: None)
    monkeypatch.setattr("webbrowser.open", lambda page: Path("opened").write_text(page))

    def run(name: str, arguments: dict[str, str]) -> tuple[Any, ...]:
        known = (name, *sorted(arguments.items()))
        if known not in outcomes:
            outcomes[known] = outcome(name, arguments)
        return outcomes[known]

    def outcome(name: str, arguments: dict[str, str]) -> tuple[Any, ...]:
        place = tmp_path / "place"
        shutil.copytree(world, place)
        monkeypatch.chdir(place)
        if name == "demo":  # which takes the packaged encoder otherwise
            monkeypatch.setattr(files, "PACKAGED", place / "run" / "checkpoint.safetensors")
        if name.startswith("cache"):
            monkeypatch.setenv("METADIFF_CACHE_DIR", str(place / "cache"))
        line = name.split()
        for option, value in arguments.items():
            line += [option, value] if option and value != FLAG else [option] if option else value.split()
        result = invoke(*line)
        found = {
            str(path.relative_to(place)): "" if path.name in RECORDS else digest(path)
            for path in place.rglob("*") if path.is_file()
        }  # fmt: skip
        monkeypatch.chdir(tmp_path)
        shutil.rmtree(place)
        return result.code, stable(result.out), found

    return run


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def stable(out: str) -> Any:
    """The results without what differs from run to run."""
    try:
        document = json.loads(out)
    except ValueError:
        return out
    return {key: value for key, value in document.items() if key not in UNSTABLE} if isinstance(document, dict) else out


def test_every_command_is_walked() -> None:
    assert set(ALL) == set(WALKS)


@pytest.mark.parametrize(("name", "option"), CASES, ids=lambda x: x if isinstance(x, str) else x.opts[0])
def test_an_option_matters(name: str, option: Any, measured: Callable[..., tuple[Any, ...]]) -> None:
    walk, flag = WALKS[name], option.opts[0]
    usual = {**walk.arguments, **walk.beside.get(flag, {})}
    if name in ("pretrain", "metatrain", "evaluate") and flag != "--json":
        usual["--json"] = FLAG
    changed = {key: value for key, value in usual.items() if key not in option.opts}
    changed[flag] = FLAG if option.is_flag else {**walk.values, **SPEED_ONLY}[flag]
    before, after = measured(name, usual), measured(name, changed)
    if flag in OUTPUT_ONLY or flag in SPEED_ONLY:
        assert after == before
    else:
        assert after != before or after[0] == 2
