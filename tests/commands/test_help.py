"""Every help text: a summary of one line, named groups, units and defaults, and examples that run as they stand."""

import re
import shlex
import shutil
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import typer
from PIL import Image

from metadiff_cli import files
from metadiff_cli.app import app
from metadiff_cli.config.schema import Config
from metadiff_cli.core.checkpoints.file import load_checkpoint, save_checkpoint
from metadiff_cli.data.benchmarks import split_lists
from metadiff_cli.data.glyphs import draw_class
from tests.worlds import SMALL, Result, invoke

CLI = Callable[..., Result]
SUMMARY, WIDTH = 64, 76  # columns: of a summary in the list of commands, of a line; both fit into a terminal of 80
OURS_NOT = {"help", "version", "install_completion", "show_completion"}  # options that Typer describes, or that act


@dataclass(frozen=True)
class Page:
    """The help of a command or of a group of commands."""

    name: str
    command: Any

    def lines(self) -> list[str]:
        """Its text as it is shown."""
        return [line.rstrip() for line in (self.command.help or "").replace("\\[", "[").splitlines()]

    def examples(self) -> list[str]:
        """The commands below "Examples:"."""
        _, _, below = (self.command.help or "").partition("Examples:")
        return [line.strip() for line in below.splitlines() if line.strip()]


def pages(command: Any, name: str) -> Iterator[Page]:
    """The page of a command, and those of its subcommands."""
    yield Page(name, command)
    for inner, subcommand in getattr(command, "commands", {}).items():
        yield from pages(subcommand, f"{name} {inner}")


PAGES = list(pages(typer.main.get_command(app), "metadiff"))
OPTIONS = [(page, option) for page in PAGES for option in page.command.params if option.name not in OURS_NOT]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@every_page
def test_a_summary_and_examples_that_fit_into_a_terminal(page: Page) -> None:
    summary, blank, *_ = page.lines()
    assert summary.endswith(".") and len(summary) <= SUMMARY and blank == ""
    assert len(page.examples()) >= 2
    assert all(f"{example} ".startswith(f"{page.name} ") for example in page.examples())
    assert max(len(line) for line in page.lines()) <= WIDTH, [line for line in page.lines() if len(line) > WIDTH]


@pytest.mark.parametrize(("page", "option"), OPTIONS, ids=lambda x: x.name)
def test_an_option_has_a_group_and_says_its_default(page: Page, option: Any) -> None:
    assert re.search(r"\.( \\\[default: .+\])?$", option.help or ""), option.help
    if option.param_type_name == "option":
        assert option.rich_help_panel, f"{page.name} {option.opts[0]} stands in no group"
    said = option.default is not None or "[default: " in option.help or option.required or option.multiple
    assert said or option.metavar in ("FILE", "DIR"), f"{page.name} {option.opts[0]} does not say its default"


@every_page
def test_a_page_shows_all_that_there_is_and_fits_into_a_terminal(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = invoke(*page.name.split()[1:], "--help").out
    assert f"Usage: {page.name} " in shown
    assert max(map(len, shown.splitlines())) <= 80
    words = set(shown.replace(",", " ").split())
    for param in page.command.params:
        assert param.param_type_name == "argument" or set(param.opts) <= words, param.opts
    assert set(getattr(page.command, "commands", {})) <= words
    assert set(page.examples()) <= {line.strip() for line in shown.splitlines()}
    assert "\\[" not in shown and "[/" not in shown


def test_defaults_limits_and_what_is_required_are_shown(cli: CLI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    adapt, verify = cli("adapt", "--help").out, cli("data", "verify", "--help").out
    assert re.search(r"\*  --query +-Q +PATH .* repeatable\. \[required\]", adapt)
    assert re.search(r"--views +N 1\.\.6 ", adapt) and re.search(r"--top-k +N >=1 ", adapt)
    assert re.search(r"--strict +Exit with", adapt) and "[default: auto]" in verify
    assert "Usage: metadiff data verify [OPTIONS]" in verify


@every_page
def test_no_bracket_is_taken_for_markup(page: Page) -> None:
    for text in (page.command.help or "", *(option.help or "" for option in page.command.params)):
        assert not re.search(r"(?<!\\)\[", text), text


def test_defaults_are_shown_and_not_taken_for_markup(cli: CLI) -> None:
    shown = " ".join(cli("evaluate", "--help").out.replace("│", " ").split())
    for text in ("Number of denoising steps. [default: 10]", "Seed of all random numbers. [default: 0]",
                 "[default: the one in the package]", "Number of episodes. [default: 1000]"):  # fmt: skip
        assert text in shown


SETTINGS = {
    "--seed": "seed", "--device": "runtime.device", "--steps": "sampler.steps",
    "--samples": "sampler.samples", "--temperature": "sampler.temperature", "--guidance": "sampler.guidance",
    "--way": "evaluation.way", "--shot": "evaluation.shot", "--episodes": "evaluation.episodes",
}  # fmt: skip


@pytest.mark.parametrize("flag", SETTINGS)
def test_defaults_in_the_help_are_those_of_the_configuration(flag: str) -> None:
    value = attrgetter(SETTINGS[flag])(Config())
    said = f"[default: {value:g}]" if isinstance(value, float) else f"[default: {value}]"
    options = [option for _, option in OPTIONS if flag in option.opts]
    assert options and all(said in option.help for option in options)


# Examples that cannot end well here, with the reason as a comment and the exit code of the MetaDiffError they end with.
OTHERWISE = {
    # a gate for photos; here a checkpoint trained for seconds meets drawn characters
    "metadiff evaluate --data ./photos --split all --fail-under 60": 5,
}
EXAMPLES = sorted({example for page in PAGES for example in page.examples()})


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
    for c in range(8):
        draw(root / "photos" / f"kind-{c}", 20 + c, 16)
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


@pytest.fixture
def place(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the world as the working directory of one example, with small settings and a small packaged model."""
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
    result = invoke(*arguments)
    assert result.code == OTHERWISE.get(example, 0), result.err
    assert result.out or result.err


def test_what_runs_otherwise_is_an_example() -> None:
    assert set(OTHERWISE) <= set(EXAMPLES)
