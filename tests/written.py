"""The commands that README and docs/ tell their readers to run."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *DOCS]
LAUNCHERS = r"(?P<before>.*(?:\||&&) |.*/bin/|uvx --from \S+ |docker run .* |torchrun .*-m )?"


@dataclass(frozen=True)
class Command:
    """A line that runs metadiff: its words, what stands before it in the line, and the file that takes its output."""

    words: list[str]
    before: str = ""
    output: str = ""


def commands_of(page: Path) -> Iterator[Command]:
    """Each line of code that runs metadiff, also behind a pipe, a path or a launcher."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    # an odd number of fences before a piece means that it is code, after the name of its language
    code = "\n".join(block for block in text.split("\n```")[1::2] if block.startswith("sh\n"))
    for found in re.finditer(rf"^{LAUNCHERS}metadiff(?:_cli)? (?P<rest>[a-z].*)$", code, re.M):
        line, _, output = found["rest"].partition(" > ")
        yield Command(shlex.split(line, comments=True), found["before"] or "", output.strip())
