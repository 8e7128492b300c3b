"""README and docs/: commands and options that exist, links that lead somewhere, pictures that stand for themselves."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import typer
from PIL import Image

from metadiff_cli import __version__
from metadiff_cli.app import app
from tests.benchmarks.__main__ import build_parser

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *(ROOT / "docs" / f"{name}.md" for name in ("adapt", "train", "evaluate", "results"))]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def options(command: Any) -> set[str]:
    """All options of a command and of those below it."""
    inner = getattr(command, "commands", {}).values()
    return {o for p in command.params for o in p.opts} | {"--help"} | {o for c in inner for o in options(c)}


def written(page: Path) -> Iterator[list[str]]:
    """The words of each `metadiff ...` line of a page, also behind a pipe or a path."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    for line in re.findall(r"^(?:.*(?:\||&&) |.*/bin/)?metadiff ([a-z].*)$", text, re.M):
        yield line.split()


@every_page
def test_commands_and_their_options_exist(page: Path) -> None:
    lines = list(written(page))
    assert lines or page.name == "results.md"
    for words in lines:
        command: Any = typer.main.get_command(app)
        while words and words[0] in getattr(command, "commands", {}):
            command = command.commands[words.pop(0)]
        assert not hasattr(command, "commands"), words
        assert {word for word in words if re.fullmatch(r"--[a-z-]+|-[a-zA-Z0-9]", word)} <= options(command), words


LAUNCHERS = {"--nnodes", "--nproc-per-node", "--rdzv-backend", "--rdzv-endpoint", "--ntasks-per-node"}  # torchrun, srun


@every_page
def test_options_that_are_mentioned_exist(page: Path) -> None:
    benchmarks = {o for action in build_parser()._actions for o in action.option_strings}
    known = options(typer.main.get_command(app)) | LAUNCHERS | benchmarks
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", page.read_text(encoding="utf-8"))) <= known


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        file, _, heading = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        assert there.is_file(), target
        titles = re.findall(r"^#+ (.*)$", there.read_text(encoding="utf-8"), re.M) if heading else []
        anchors = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
        assert not heading or heading in anchors, target


def test_every_page_is_linked_from_the_readme() -> None:
    text = README.read_text(encoding="utf-8")
    assert all(f"(docs/{page.name})" in text for page in (ROOT / "docs").glob("*.md"))


def test_the_citation_has_this_version() -> None:
    assert f"version = {{{__version__}}}" in README.read_text(encoding="utf-8")


@pytest.mark.parametrize("picture", sorted((ROOT / "docs" / "images").iterdir()), ids=lambda path: path.name)
def test_pictures_are_small_and_load_nothing(picture: Path) -> None:
    assert picture.stat().st_size < 300_000
    assert f"docs/images/{picture.name}" in README.read_text(encoding="utf-8")
    if picture.suffix == ".svg":
        text = picture.read_text(encoding="utf-8")
        ElementTree.fromstring(text)
        assert not re.search(r"url\((?!#)|href=\"(?!#)|<script", text)
    else:
        with Image.open(picture) as image:
            assert min(image.size) >= 640
