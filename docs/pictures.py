"""The pictures of the README, made anew: `python docs/pictures.py` writes docs/images/adapt.svg and report.png.

Draws a few boats, churches, houses and trees, runs the real commands on them, records the terminal with Rich and opens
the report in a headless Chromium (extra [browser]). No photo and no image of a data set is in either picture.
"""

import colorsys
import io
import os
import pty
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageDraw
from rich.console import Console
from rich.text import Text

IMAGES = Path(__file__).parent / "images"
COLUMNS, SIDE, FINE = 80, 160, 4  # of the terminal; pixels of a drawing; what it is drawn larger, for smooth edges
SUPPORT, QUERIES = 3, 3  # drawings of each kind
Pen = ImageDraw.ImageDraw
Colour = tuple[int, int, int]


def colour(rng: random.Random, hue: float, spread: float, light: float) -> Colour:
    """A colour near a hue (0..1)."""
    r, g, b = colorsys.hls_to_rgb((hue + rng.uniform(-spread, spread)) % 1, light, rng.uniform(0.45, 0.85))
    return round(255 * r), round(255 * g), round(255 * b)


def boat(pen: Pen, rng: random.Random) -> None:
    """A sail boat on water; lengths are in shares of the side, as in the others."""
    shape(pen, [(0, 0.68), (1, 0.68), (1, 1), (0, 1)], colour(rng, 0.58, 0.12, 0.45))
    x, tall = rng.uniform(0.42, 0.58), rng.uniform(0.14, 0.26)
    hull = [(x - 0.3, 0.62), (x + 0.3, 0.62), (x + 0.2, 0.78), (x - 0.2, 0.78)]
    shape(pen, hull, colour(rng, rng.random(), 0, 0.35))
    shape(pen, [(x - 0.01, tall), (x + 0.01, tall), (x + 0.01, 0.62), (x - 0.01, 0.62)], (90, 60, 40))
    shape(pen, [(x + 0.02, tall), (x + rng.uniform(0.22, 0.3), 0.58), (x + 0.02, 0.58)], (245, 245, 240))
    shape(pen, [(x - 0.02, tall + 0.08), (x - rng.uniform(0.14, 0.24), 0.58), (x - 0.02, 0.58)], (225, 225, 220))


def house(pen: Pen, rng: random.Random) -> None:
    """A house on a meadow."""
    shape(pen, [(0, 0.78), (1, 0.78), (1, 1), (0, 1)], colour(rng, 0.25, 0.08, rng.uniform(0.4, 0.7)))
    left, right, eaves = rng.uniform(0.14, 0.24), rng.uniform(0.76, 0.86), rng.uniform(0.42, 0.5)
    middle = (left + right) / 2
    shape(pen, [(left, eaves), (right, eaves), (right, 0.84), (left, 0.84)], colour(rng, 0.1, 0.08, 0.78))
    roof = [(left - 0.07, eaves), (middle, rng.uniform(0.14, 0.24)), (right + 0.07, eaves)]
    shape(pen, roof, colour(rng, 0.02, 0.08, 0.4))
    shape(
        pen, [(middle - 0.06, 0.62), (middle + 0.06, 0.62), (middle + 0.06, 0.84), (middle - 0.06, 0.84)], (95, 65, 45)
    )
    for x in (left + 0.12, right - 0.12):
        shape(pen, [(x - 0.06, 0.55), (x + 0.06, 0.55), (x + 0.06, 0.67), (x - 0.06, 0.67)], (120, 180, 220))


def tree(pen: Pen, rng: random.Random) -> None:
    """A broad-leaved tree on a meadow."""
    shape(pen, [(0, 0.8), (1, 0.8), (1, 1), (0, 1)], colour(rng, 0.25, 0.08, rng.uniform(0.4, 0.7)))
    x, leaves = rng.uniform(0.35, 0.65), colour(rng, 0.22, 0.18, 0.35)
    shape(pen, [(x - 0.05, 0.5), (x + 0.05, 0.5), (x + 0.07, 0.9), (x - 0.07, 0.9)], (100, 70, 45))
    for _ in range(9):
        dot(pen, x + rng.uniform(-0.2, 0.2), rng.uniform(0.22, 0.5), rng.uniform(0.08, 0.2), leaves)


def church(pen: Pen, rng: random.Random) -> None:
    """A house with a tower."""
    house(pen, rng)
    left, wall = rng.uniform(0.15, 0.55), colour(rng, 0.1, 0.08, 0.7)
    shape(pen, [(left, 0.3), (left + 0.2, 0.3), (left + 0.2, 0.84), (left, 0.84)], wall)
    shape(pen, [(left - 0.03, 0.3), (left + 0.1, 0.02), (left + 0.23, 0.3)], colour(rng, 0.6, 0.08, 0.3))


KINDS: dict[str, Callable[[Pen, random.Random], None]] = {"boat": boat, "church": church, "house": house, "tree": tree}


def shape(pen: Pen, points: list[tuple[float, float]], fill: Colour) -> None:
    """A polygon."""
    pen.polygon([(x * SIDE * FINE, y * SIDE * FINE) for x, y in points], fill=fill)


def dot(pen: Pen, x: float, y: float, radius: float, fill: Colour) -> None:
    """A disc."""
    pen.ellipse([s * SIDE * FINE for s in (x - radius, y - radius, x + radius, y + radius)], fill=fill)


def draw(path: Path, kind: str, seed: int) -> None:
    """One drawing of a kind, before a sky of its own."""
    rng = random.Random(f"{kind} {seed}")
    image = Image.new("RGB", (SIDE * FINE, SIDE * FINE), colour(rng, 0.56, 0.08, rng.uniform(0.65, 0.9)))
    KINDS[kind](ImageDraw.Draw(image), rng)
    image = image.rotate(rng.uniform(-8, 8), Image.Resampling.BICUBIC, fillcolor=image.getpixel((0, 0)))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.resize((SIDE, SIDE), Image.Resampling.LANCZOS).save(path, quality=92)


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


def record_terminal(arguments: list[str], folder: Path) -> None:
    """docs/images/adapt.svg: the command, what it says and the table, in the order in which they appear."""
    shown, told = run(arguments, folder)
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    console.print(Text.assemble(("$ ", "bold green"), " ".join(["metadiff", *arguments])))
    console.print(told.rstrip(), markup=False, highlight=False)
    console.print(Text.from_ansi(shown.replace("\r\n", "\n").rstrip()))
    svg = console.export_svg(title="metadiff", unique_id="metadiff")
    svg = re.sub(r"\s*@font-face \{.*?\}", "", svg, flags=re.S)  # nothing is loaded from elsewhere
    (IMAGES / "adapt.svg").write_text(svg, encoding="utf-8")


def photograph_report(page: Path) -> None:
    """docs/images/report.png: the first screen of the page in Chromium."""
    from playwright.sync_api import sync_playwright

    browser = next(found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name)))
    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=browser, args=["--no-sandbox", "--disable-gpu"])
        window = chromium.new_page(viewport={"width": 1000, "height": 1080})
        window.goto(page.as_uri())
        window.wait_for_timeout(1000)
        window.screenshot(path=page.with_suffix(".png"))
        chromium.close()
    with Image.open(page.with_suffix(".png")) as image:
        image.convert("RGB").save(IMAGES / "report.png", optimize=True)


def main() -> None:
    """Draw, run, record."""
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for kind in KINDS:
            for i in range(1, SUPPORT + 1):
                draw(folder / "imgs" / kind / f"{i}.jpg", kind, i)
            for i in range(1, QUERIES + 1):
                draw(folder / "q" / f"{kind}-{i}.jpg", kind, 100 + i)
        record_terminal(["adapt", "--support", "./imgs", "--query", "./q"], folder)
        run(["adapt", "--support", "./imgs", "--query", "./q", "--report", "report.html"], folder)
        photograph_report(folder / "report.html")


if __name__ == "__main__":
    main()
