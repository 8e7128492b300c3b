"""The examples of every help text, and the commands of README and docs/: they run as they stand."""

import shlex
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from PIL import Image

from metadiff_cli import files
from metadiff_cli.app import app
from metadiff_cli.core.checkpoints.file import load_checkpoint, save_checkpoint
from metadiff_cli.data.benchmarks import split_lists
from metadiff_cli.data.glyphs import draw_class
from tests.worlds import SMALL, invoke
from tests.written import PAGES, commands_of

# Commands that cannot end well here, with the reason as a comment and the exit code of the MetaDiffError they end with.
OTHERWISE = {
    # gates for photos; here a checkpoint trained for seconds meets drawn characters
    "metadiff evaluate --data ./photos --split all --fail-under 60": 5,
    "metadiff evaluate --data photos --split all --shot 5 --fail-under 90 --report report.html --json": 5,
}
# Commands of the pages that are not run, by their first words, and why.
NOT_RUN = {
    "adapt --support ./imgs --query ./q --encoder timm:": "the weights would be downloaded",
    "metatrain --preset folder --data ./photos --encoder timm:": "the weights would be downloaded",
    "metatrain --preset folder --data ./photos --encoder torchvision:": "the weights would be downloaded",
    "adapt --support ./imgs --query ./q --checkpoint hf://USER": "USER stands for somebody; test_hub.py has a stand-in",
    "adapt --classifier animals.safetensors --rename cta=cat": "its classes are misspelt, and those here are not",
    "metatrain --preset mini-5w5s-resnet12": "by torchrun and srun; test_several_processes.py runs the first of them",
    "evaluate --data drawn": "its data are drawn by a script of docs/ that takes a minute",
    "metatrain --preset glyphs-5w1s": ".ci/run runs it as it stands",
    "metatrain --preset photos --data mini-imagenet": "with 2,528 features it takes a minute",
    "adapt --support ./imgs --query ./q --encoder lite0": "an example of --help, which is run",
    "pretrain --data photos --set data.size=84 --epochs 30": "30 epochs take long; the examples of --help run others",
    "metatrain --data photos --encoder runs/photos-encoder": "it takes the file of the line before",
    "metatrain --encoder lite0 --data birds": "the same; test_several_data.py does it with another encoder",
}


def examples(command: Any) -> Iterator[str]:
    """The lines below "Examples:" of a command, and of those below it."""
    _, _, below = (command.help or "").partition("Examples:")
    yield from (line.strip() for line in below.splitlines() if line.strip())
    for inner in getattr(command, "commands", {}).values():
        yield from examples(inner)


EXAMPLES = sorted(set(examples(typer.main.get_command(app))))

SMALLER = {
    "data.size": "20", "pretrain.stages": "[]", "pretrain.epochs": "1", "pretrain.batch": "32", "metatrain.query": "2",
    "metatrain.shots": "[1, 2]", "metatrain.ways": "[2, 5]", "evaluation.shot": "1", "evaluation.episodes": "10",
    "baselines.frozen.steps": "4", "baselines.frozen.query": "5", "baselines.frozen.batch": "2",
    "baselines.frozen.validation_episodes": "10",
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, small_run: Path) -> Path:
    """A folder with all that the examples name: photos, data sets and a run, all of them generated and small."""
    root = tmp_path_factory.mktemp("world")
    for c, name in enumerate(("cat", "dog", "fox")):
        draw(root / "imgs" / name, c, 2)
        draw(root / "q", 10 + c, 1)
        draw(root / "others", 15 + c, 1)
        draw(root / "new" / f"new-{c}", 90 + c, 2)
        draw(root / "labelled" / name, c, 3)
        for folder in ("more", "pool"):
            draw(root / folder, c, 2)
    for c in range(8):
        draw(root / "photos" / f"kind-{c}", 20 + c, 16)
        for d, domain in enumerate(("birds", "signs", "waste", "food")):
            draw(root / domain / f"{domain}-{c}", 100 + 10 * d + c, 16)
    draw_one(root / "imgs" / "cat" / "blurred.jpg", 0)
    (root / "fix.csv").write_text("path,label\ncat/0-0.jpg,dog\n")
    files_of = [(path, path.parent.name) for path in sorted((root / "imgs").rglob("*.jpg"))]
    (root / "labels.csv").write_text("path,label\n" + "".join(f"{path},{label}\n" for path, label in files_of))
    for split, classes in split_lists("mini-imagenet").items():
        for c, name in enumerate(classes[: 5 if split == "val" else 6]):
            draw(root / "mini-imagenet" / name, 30 + 10 * len(split) + c, 20)
    alphabet, characters = next(iter(split_lists("omniglot")["train"]["background"].items()))
    draw(root / "data" / "omniglot" / "omniglot-py" / "images_background" / alphabet / characters[0], 60, 2)
    draw(root / "bird", 70, 1)
    with tarfile.open(root / "CUB_200_2011.tgz", "w:gz") as archive:
        for bird in (name for names in split_lists("cub").values() for name in names[:2]):
            archive.add(root / "bird" / "70-0.jpg", f"CUB_200_2011/images/{bird}/1.jpg")
    shutil.copytree(small_run, root / "runs" / "mini")
    small = load_checkpoint(small_run / "checkpoint.safetensors")
    small.header["config"]["data"]["layout"] = "mini-imagenet"  # that of the checkpoint in the package
    save_checkpoint(root.parent / "packaged.safetensors", "model", small.tensors, small.header)
    saved = invoke("adapt", "-S", root / "imgs", "-Q", root / "q", "-c", root.parent / "packaged.safetensors",
                   "--save", root / "pets.safetensors")  # fmt: skip
    assert saved.code == 0, saved.err
    return root


def draw(folder: Path, cls: int, count: int) -> None:
    """`count` drawings of a character into a folder of its own, or beside others."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, pixels in enumerate(draw_class(cls, count, 32, 0)):
        Image.fromarray(pixels).save(folder / f"{cls}-{i}.jpg")


def draw_one(path: Path, cls: int) -> None:
    """A drawing of a character that is in no other file."""
    Image.fromarray(draw_class(cls, 9, 32, 0)[-1]).save(path)


@pytest.fixture
def place(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the world as the working directory of one example or page; settings and packaged model are small."""
    shutil.copytree(world, tmp_path / "world")
    monkeypatch.setattr(files, "PACKAGED", world.parent / "packaged.safetensors")
    monkeypatch.chdir(tmp_path / "world")
    monkeypatch.setenv("HOME", str(tmp_path / "world"))
    monkeypatch.setenv("METADIFF_DATA_DIR", str(tmp_path / "world" / "data"))
    monkeypatch.setenv("METADIFF_CACHE_DIR", str(world.parent / "cache"))
    small = dict(setting.split("=") for setting in SMALL if setting != "--set")
    for key, value in {**small, **SMALLER}.items():
        monkeypatch.setenv(f"METADIFF_{key.upper().replace('.', '__')}", value)
    return tmp_path / "world"


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_run_as_they_stand(example: str, place: Path) -> None:
    program, *arguments = shlex.split(example)
    assert program == "metadiff"
    run(arguments)


@pytest.mark.parametrize("page", [page for page in PAGES if any(commands_of(page))], ids=lambda page: page.name)
def test_the_commands_of_a_page_run_one_after_the_other(page: Path, place: Path) -> None:
    paths = "\0".join(str(path) for path in sorted((place / "q").iterdir()))
    for command in commands_of(page):
        line = shlex.join(command.words)
        if not any(line.startswith(words) for words in NOT_RUN):
            out = run(command.words, stdin=paths)
            if command.output:
                (place / command.output).write_text(out, encoding="utf-8")


def run(arguments: list[str], stdin: str = "") -> str:
    """What a command writes to stdout; it ends as it should."""
    result = invoke(*arguments, stdin=stdin)
    assert result.code == OTHERWISE.get(shlex.join(["metadiff", *arguments]), 0), (
        f"{shlex.join(arguments)}: {result.err}"
    )
    assert result.out or result.err
    return result.out


def test_what_runs_otherwise_or_not_at_all_is_written_somewhere() -> None:
    lines = [shlex.join(command.words) for page in PAGES for command in commands_of(page)]
    assert set(OTHERWISE) <= {*EXAMPLES, *(f"metadiff {line}" for line in lines)}
    assert all(any(line.startswith(words) for line in lines) for words in NOT_RUN)
