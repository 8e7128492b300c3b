"""The pictures of `metadiff demo`, drawn anew: `python docs/drawings.py` writes metadiff_cli/demo/imgs and query.

`python docs/drawings.py DIR 30` draws 30 others of each kind into class folders, to measure with `metadiff evaluate`.

Cups, fish, keys and leaves of random colour, shape, size and angle lie on tables of wood, stone and cloth. A drawing is
a flat shape first; it is then inflated, lit from one side, and casts a shadow. Nothing in it is taken from a photo.
"""

import colorsys
import math
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

DEMO = Path(__file__).parent.parent / "metadiff_cli" / "demo"
SIDE, FINE = 224, 2  # pixels of a picture; what it is drawn larger, for smooth edges
LARGE = SIDE * FINE
SUPPORT, QUERIES = 3, 2  # pictures of each kind
Colour = tuple[int, int, int]
Point = tuple[float, float]


class Pen:
    """Draws on a transparent square in coordinates from -1 to 1, y downward."""

    def __init__(self) -> None:
        self.image = Image.new("RGBA", (LARGE, LARGE))
        self.draw = ImageDraw.Draw(self.image)

    def _pixels(self, points: Sequence[Point]) -> list[Point]:
        return [((x + 1) * LARGE / 2, (y + 1) * LARGE / 2) for x, y in points]

    def shape(self, points: Sequence[Point], fill: Colour | None) -> None:
        """A polygon; without a colour, a hole."""
        self.draw.polygon(self._pixels(points), fill=(0, 0, 0, 0) if fill is None else fill)

    def oval(self, x: float, y: float, a: float, b: float, fill: Colour | None) -> None:
        """An ellipse of half axes a and b."""
        turn = [2 * math.pi * i / 90 for i in range(90)]
        self.shape([(x + a * math.cos(t), y + b * math.sin(t)) for t in turn], fill)

    def line(self, points: Sequence[Point], width: float, fill: Colour) -> None:
        """A line with round corners."""
        self.draw.line(self._pixels(points), fill, round(width * LARGE / 2), joint="curve")


def colour(hue: float, light: float, strength: float) -> Colour:
    """A colour of hue, lightness and saturation in 0..1."""
    r, g, b = colorsys.hls_to_rgb(hue % 1, min(max(light, 0), 1), strength)
    return round(255 * r), round(255 * g), round(255 * b)


def cup(pen: Pen, rng: random.Random) -> float:
    """A cup from the side; returns how far it may be turned, in degrees, as the others do."""
    hue, light, strength = rng.random(), rng.uniform(0.4, 0.8), rng.uniform(0.1, 0.8)
    glaze, inside = colour(hue, light, strength), colour(hue, 0.45 * light, strength)
    top, bottom, tall = rng.uniform(0.36, 0.5), rng.uniform(0.24, 0.4), rng.uniform(0.4, 0.6)
    pen.oval(top, 0, 0.26, 0.7 * tall, glaze)
    pen.oval(top, 0, 0.15, 0.45 * tall, None)
    pen.shape([(-top, -tall), (top, -tall), (bottom, tall), (-bottom, tall)], glaze)
    pen.oval(0, tall, bottom, 0.09, glaze)
    if rng.random() < 0.5:
        y = rng.uniform(-0.2, 0.3) * tall
        pen.line([(-(top + bottom) / 2.1, y), ((top + bottom) / 2.1, y)], 0.1, colour(hue + 0.5, light, strength))
    pen.oval(0, -tall, top, 0.13, glaze)
    pen.oval(0, -tall, top - 0.05, 0.09, inside)
    return 20


def fish(pen: Pen, rng: random.Random) -> float:
    """A fish from the side."""
    hue, light, strength = rng.random(), rng.uniform(0.4, 0.65), rng.uniform(0.3, 0.9)
    skin, fins = colour(hue, light, strength), colour(hue + rng.uniform(-0.1, 0.1), 0.75 * light, strength)
    high, tail = rng.uniform(0.22, 0.38), rng.uniform(0.25, 0.4)
    pen.shape([(0.4, 0), (0.85, -tail), (0.76, 0), (0.85, tail)], fins)
    pen.shape([(-0.25, -0.7 * high), (0.05, -high - 0.2), (0.3, -0.5 * high)], fins)
    pen.shape([(-0.1, 0.7 * high), (0.15, high + 0.14), (0.2, 0.6 * high)], fins)
    back = [(x / 20 - 0.75, high * math.sin(math.pi * (x / 27) ** 0.75)) for x in range(28)]
    pen.shape([*back, *((x, -y) for x, y in reversed(back))], skin)
    for i in range(rng.choice((0, 0, 2, 3))):
        x = 0.3 * i - 0.25
        pen.line([(x, -0.6 * high), (x + 0.05, 0.6 * high)], 0.07, fins)
    pen.oval(-0.52, -0.2 * high, 0.055, 0.055, (240, 240, 235))
    pen.oval(-0.52, -0.2 * high, 0.03, 0.03, (15, 15, 20))
    return 180


def key(pen: Pen, rng: random.Random) -> float:
    """A key with two to four teeth."""
    metal = colour(rng.uniform(0.05, 0.16), rng.uniform(0.4, 0.7), rng.choice((0.08, 0.25, 0.6)))
    ring, thick = rng.uniform(0.22, 0.32), rng.uniform(0.045, 0.075)
    pen.oval(-0.5, 0, ring, ring * rng.uniform(0.8, 1.2), metal)
    pen.shape([(-0.4, -thick), (0.8, -thick), (0.8, thick), (-0.4, thick)], metal)
    pen.oval(-0.5, 0, 0.55 * ring, 0.55 * ring, None)
    for i in range(rng.randint(2, 4)):
        x, deep = 0.72 - 0.13 * i, rng.uniform(0.12, 0.26)
        pen.shape([(x - 0.045, 0), (x + 0.045, 0), (x + 0.045, thick + deep), (x - 0.045, thick + deep)], metal)
    return 180


def leaf(pen: Pen, rng: random.Random) -> float:
    """A leaf with a stalk and veins, smooth or toothed."""
    hue, light = rng.choice((0.03, 0.09, 0.15, 0.22, 0.28, 0.33)), rng.uniform(0.28, 0.5)
    blade, veins = colour(hue, light, rng.uniform(0.45, 0.8)), colour(hue, light + 0.18, 0.45)
    wide, teeth, low = rng.uniform(0.22, 0.42), rng.choice((0, 0, 0.05)), rng.uniform(0.7, 1.1)
    edge = []
    for i in range(61):
        t = i / 60
        edge.append((1.4 * t - 0.6, wide * math.sin(math.pi * t**low) ** 0.9 * (1 + teeth * (-1) ** i)))
    pen.line([(-0.95, rng.uniform(-0.1, 0.1)), (-0.55, 0)], 0.05, veins)
    pen.shape([*edge, *((x, -y) for x, y in reversed(edge))], blade)
    pen.line([(-0.6, 0), (0.74, 0)], 0.03, veins)
    for i in range(1, 6):
        x = 0.22 * i - 0.62
        reach = 0.75 * wide * math.sin(math.pi * ((x + 0.75) / 1.4) ** low)
        for side in (-1, 1):
            pen.line([(x, 0), (x + 0.15, side * reach)], 0.015, veins)
    return 180


KINDS: dict[str, Callable[[Pen, random.Random], float]] = {"cup": cup, "fish": fish, "key": key, "leaf": leaf}


def noise(g: np.random.Generator, across: float, down: float) -> np.ndarray:
    """Smooth noise (LARGE, LARGE) of mean 0 and deviation 1, whose spots are so many pixels wide and high."""
    cells = (max(2, round(LARGE / across)), max(2, round(LARGE / down)))
    small = Image.fromarray(g.normal(size=cells[::-1]).astype(np.float32))
    wide = np.asarray(small.resize((LARGE, LARGE), Image.Resampling.BICUBIC))
    return (wide - wide.mean()) / wide.std()


def table(rng: random.Random, g: np.random.Generator) -> np.ndarray:
    """A surface (LARGE, LARGE, 3) with values in 0..1: wood, stone or cloth."""
    kind = rng.choice(("wood", "stone", "cloth"))
    if kind == "wood":
        base, grain = colour(rng.uniform(0.05, 0.1), rng.uniform(0.3, 0.65), 0.4), noise(g, 300, 8) + noise(g, 200, 40)
        grain = 0.06 * grain if rng.random() < 0.5 else 0.06 * grain.T
    elif kind == "stone":
        base, grain = colour(rng.random(), rng.uniform(0.35, 0.75), 0.06), 0.05 * (noise(g, 6, 6) + noise(g, 60, 60))
    else:
        y, x = np.mgrid[:LARGE, :LARGE]
        base, grain = colour(rng.random(), rng.uniform(0.3, 0.8), 0.35), 0.04 * (np.sin(x / 1.6) * np.sin(y / 1.6))
        grain = grain + 0.05 * noise(g, 120, 120)
    return np.asarray(base) / 255 * (1 + grain[..., None])


def blurred(values: np.ndarray, radius: float) -> np.ndarray:
    """Values (LARGE, LARGE) in 0..1, smoothed."""
    image = Image.fromarray((255 * values).astype(np.uint8)).filter(ImageFilter.GaussianBlur(radius))
    return np.asarray(image, dtype=np.float64) / 255


def lit(mask: np.ndarray, angle: float) -> tuple[np.ndarray, np.ndarray]:
    """How light an inflated shape is under a lamp at `angle`, and its highlights, both (LARGE, LARGE)."""
    height = sum(radius * blurred(mask, radius) for radius in (3, 6, 12, 24)) * 1.1
    dy, dx = np.gradient(height)
    normal = np.stack([-dx, -dy, np.ones_like(dx)]) / np.sqrt(dx**2 + dy**2 + 1)
    lamp = np.array([0.6 * math.cos(angle), 0.6 * math.sin(angle), 0.8])
    facing = np.tensordot(lamp, normal, 1).clip(0)
    between = lamp + np.array([0, 0, 1])  # the lamp and the eye, which looks from above
    return 0.35 + 0.8 * facing, 0.45 * np.tensordot(between / np.linalg.norm(between), normal, 1).clip(0) ** 40


def draw(kind: str, seed: int) -> Image.Image:
    """One picture of a kind."""
    rng, g = random.Random(f"{kind} {seed}"), np.random.default_rng([list(KINDS).index(kind), seed])
    pen = Pen()
    turn, large = KINDS[kind](pen, rng), rng.uniform(0.75, 1.0)
    thing = pen.image.rotate(rng.uniform(-turn, turn), Image.Resampling.BICUBIC)
    thing = thing.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else thing
    side = round(large * LARGE)
    place = [round(rng.uniform(0, 1) * (LARGE - side)) for _ in range(2)]
    layer = Image.new("RGBA", (LARGE, LARGE))
    layer.paste(thing.resize((side, side), Image.Resampling.LANCZOS), (place[0], place[1]))
    pixels = np.asarray(layer, dtype=np.float64) / 255
    mask, angle = pixels[..., 3], rng.uniform(-2.8, -0.4)
    light, shine = lit(mask, angle)
    skin = pixels[..., :3] * (1 + 0.05 * noise(g, 25, 25))[..., None] * light[..., None] + shine[..., None]
    far = rng.uniform(8, 18)
    shadow = np.roll(blurred(mask, 9), (round(-far * math.sin(angle)), round(-far * math.cos(angle))), (0, 1))
    ground = table(rng, g) * (1 - 0.55 * shadow)[..., None]
    y, x = np.mgrid[-1 : 1 : LARGE * 1j, -1 : 1 : LARGE * 1j]
    lamp = 1 + 0.12 * (x * math.cos(angle) + y * math.sin(angle)) - 0.08 * (x**2 + y**2)
    whole = (ground * (1 - mask[..., None]) + skin * mask[..., None]) * lamp[..., None]
    picture = Image.fromarray((255 * whole.clip(0, 1)).astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    grained = np.asarray(picture, dtype=np.float64) + g.normal(0, 2.5, (SIDE, SIDE, 1))
    return Image.fromarray(grained.clip(0, 255).astype(np.uint8))


def draw_demo() -> None:
    """Draw the support and the queries of the demo."""
    for kind in KINDS:
        for i in range(1, SUPPORT + 1):
            save(draw(kind, i), DEMO / "imgs" / kind / f"{i}.jpg")
        for i in range(1, QUERIES + 1):
            save(draw(kind, 100 + i), DEMO / "query" / f"{kind}-{i}.jpg")


def draw_others(folder: Path, count: int) -> None:
    """Draw `count` others of each kind."""
    for kind in KINDS:
        for i in range(count):
            save(draw(kind, 1000 + i), folder / kind / f"{i}.jpg")


def save(picture: Image.Image, path: Path) -> None:
    """Write a picture as JPEG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, quality=85, optimize=True)


if __name__ == "__main__":
    draw_others(Path(sys.argv[1]), int(sys.argv[2])) if sys.argv[1:] else draw_demo()
