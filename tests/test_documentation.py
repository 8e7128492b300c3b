"""README and docs/: commands that parse, links that lead somewhere, pictures that stand alone, and the site."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import typer
from PIL import Image

from metadiff_cli import FewShotClassifier, __version__
from metadiff_cli.app import app
from metadiff_cli.config.load import flat
from metadiff_cli.config.schema import Config
from tests.benchmarks.__main__ import build_parser
from tests.written import DOCS, PAGES, README, ROOT, commands_of

WITH_COMMANDS = {"README.md", "index.md", "start.md", "adapt.md", "train.md", "evaluate.md", "share.md", "pipelines.md"}
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def options(command: Any) -> set[str]:
    """All options of a command and of those below it."""
    inner = getattr(command, "commands", {}).values()
    return {o for p in command.params for o in p.opts} | {"--help"} | {o for c in inner for o in options(c)}


@every_page
def test_commands_parse(page: Path) -> None:
    """Typer takes each command line with all its options and values; nothing is run."""
    lines = [command.words for command in commands_of(page)]
    assert lines or page.name not in WITH_COMMANDS
    for words in lines:
        command: Any = typer.main.get_command(app)
        while words and words[0] in getattr(command, "commands", {}):
            command = command.commands[words.pop(0)]
        assert not hasattr(command, "commands"), words
        command.make_context("metadiff", list(words))


LAUNCHERS = {  # options of torchrun and srun, pip and uvx, docker, mkdocs, ruff
    "--nnodes", "--nproc-per-node", "--rdzv-backend", "--rdzv-endpoint", "--ntasks-per-node", "--index-url", "--from",
    "--tag", "--rm", "--volume", "--strict", "--check",
}  # fmt: skip


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


def test_every_page_is_in_the_navigation_and_on_the_first_page() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    named = set(re.findall(r": ([\w/-]+\.md)$", text, re.M))
    assert named == {page.name for page in DOCS} | set(hooks().generated())
    first = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert all(f"({page.name})" in first for page in DOCS if page.name not in ("index.md", "architecture.md"))


def hooks() -> Any:
    """docs/hooks.py, which MkDocs loads by its path."""
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module


def test_the_reference_has_every_command_option_and_setting() -> None:
    pages = hooks().generated()
    commands, root = pages["reference/commands.md"], typer.main.get_command(app)
    assert all(f"`{option}" in commands for option in options(root) if option.startswith("-") and option != "--help")
    for name, command in hooks().commands(root, "metadiff"):
        assert f"\n## {name}\n" in commands and (command.help or "").split("\n")[0].replace("\\[", "[") in commands
    settings = pages["reference/settings.md"]
    assert all(f"| `{key}` |" in settings for key in flat(Config().model_dump()))
    assert "number from 0 to 1" in settings and "`one-cycle`, `cosine`" in settings and "above 0 or null" in settings
    assert "averaged: 1 the whole image" in settings  # a comment above its field


def test_the_python_page_has_every_public_method() -> None:
    text = hooks().on_page_markdown((ROOT / "docs" / "python.md").read_text(encoding="utf-8"))
    public = [name for name in vars(FewShotClassifier) if not name.startswith("_")]
    assert "predict_proba" in public and all(f"\n### {name}\n" in text for name in public)
    assert all(f"- `{name}`: " in text for name in FewShotClassifier().get_params())


def test_the_site_builds_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="mkdocs-material is not installed; it is the extra [docs]")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > len(DOCS)
    for page in pages:
        loaded = re.findall(
            r"<(?:script|link|img|iframe|source)[^>]*(?:src|href)=[\"']?([^\"' >]+)", page.read_text("utf-8")
        )
        assert not [target for target in loaded if re.match(r"(https?:)?//", target)], page


def test_the_citation_has_this_version() -> None:
    assert f"version = {{{__version__}}}" in README.read_text(encoding="utf-8")


@pytest.mark.parametrize("picture", sorted((ROOT / "docs" / "images").iterdir()), ids=lambda path: path.name)
def test_pictures_are_small_and_load_nothing(picture: Path) -> None:
    assert picture.stat().st_size < 300_000
    assert any(f"images/{picture.name}" in page.read_text(encoding="utf-8") for page in PAGES)
    if picture.suffix == ".svg":
        text = picture.read_text(encoding="utf-8")
        ElementTree.fromstring(text)
        assert not re.search(r"url\((?!#)|href=\"(?!#)|<script", text)
    else:
        with Image.open(picture) as image:
            assert min(image.size) >= 640
