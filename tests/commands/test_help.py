"""Every help text: a summary of one line, named groups, units, defaults, and examples (test_examples.py runs them)."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import pytest
import typer

from metadiff_cli.app import app
from metadiff_cli.config.schema import Config
from tests.worlds import Result, invoke

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
    assert re.search(r"\*  --onnx +FILE +ONNX file to write\. \[required\]", cli("export", "--help").out)
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
