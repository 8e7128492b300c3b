"""The pictures of the README and of docs/, made anew: `python docs/pictures.py` writes docs/images.

Runs the real commands on the pictures of `metadiff demo`, records the terminal with Rich (demo.svg), and
opens the report in a headless Chromium (report.png; extra [browser]).
"""

import io
import os
import pty
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.text import Text

from metadiff_cli.files import DEMO

IMAGES = Path(__file__).parent / "images"
COLUMNS = 80  # of the terminal


def run(arguments: list[str], folder: Path) -> tuple[str, str]:
    """What the command writes to a terminal of COLUMNS, and what to stderr. Raises where it fails."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "metadiff_cli", *arguments]
    environment = {**os.environ, "COLUMNS": str(COLUMNS), "TERM": "xterm-256color", "COLORTERM": "truecolor"}
    with subprocess.Popen(command, cwd=folder, env=environment, stdout=theirs, stderr=subprocess.PIPE) as process:
        os.close(theirs)
        shown = b""
        try:
            while part := os.read(ours, 65536):
                shown += part
        except OSError:  # the other end is closed
            pass
        told = process.stderr.read().decode() if process.stderr else ""
    if process.returncode:
        raise SystemExit(told)
    return shown.decode(), told


def record_terminal(name: str, arguments: list[str], folder: Path) -> None:
    """docs/images/NAME.svg: the command, what it says and the table, in the order in which they appear."""
    shown, told = run(arguments, folder)
    told = re.sub(r"^.*: \d+/\d+ *\n", "", told, flags=re.M)  # lines of progress, on a slow computer
    before, between, after = told.rstrip().partition("\nreport written")  # what is told after the table
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    console.print(Text.assemble(("$ ", "bold green"), " ".join(["metadiff", *arguments])))
    console.print(before, markup=False, highlight=False)
    console.print(Text.from_ansi(shown.replace("\r\n", "\n").rstrip()))
    console.print((between + after).strip(), markup=False, highlight=False, end="")
    svg = console.export_svg(title="metadiff", unique_id="metadiff")
    svg = re.sub(r"\s*@font-face \{.*?\}", "", svg, flags=re.S)  # nothing is loaded from elsewhere
    (IMAGES / f"{name}.svg").write_text(svg, encoding="utf-8")


def photograph_report(page: Path) -> None:
    """docs/images/report.png: the first screen of the page in Chromium."""
    from playwright.sync_api import sync_playwright

    browser = next(found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name)))
    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=browser, args=["--no-sandbox", "--disable-gpu"])
        window = chromium.new_page(viewport={"width": 1000, "height": 1060})
        window.goto(page.as_uri())
        window.wait_for_timeout(1000)
        window.screenshot(path=page.with_suffix(".png"))
        chromium.close()
    with Image.open(page.with_suffix(".png")) as image:
        image.convert("RGB").save(IMAGES / "report.png", optimize=True)


def main() -> None:
    """Run and record."""
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        record_terminal("demo", ["demo"], folder)
        photograph_report(folder / "metadiff-demo" / "report.html")
        shutil.copytree(DEMO / "imgs", folder / "imgs")
        shutil.copytree(DEMO / "query", folder / "q")


if __name__ == "__main__":
    main()
