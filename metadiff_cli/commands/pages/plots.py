"""Small plots as inline SVG: intervals, curves, a reliability diagram, trajectories in a plane.

Colours and fonts come from the page's style sheet through class names, so they follow dark mode. Lengths are in units
of the view box, about one pixel. ElementTree escapes the text.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

WIDTH = 400.0
ROW, LEFT, RIGHT, TOP, BOTTOM = 30.0, 46.0, 14.0, 12.0, 40.0
LETTER = 7.8  # width of an average letter at the style sheet's 13 px
LONGEST_NAME = 18
HUES = 5  # colours of the style sheet
MOST_DOTS = 30  # on a line: more would be one broad line
FAR = 15.0  # a row this far below the best is left off the axis, so that the other intervals stay visible


@dataclass(frozen=True)
class Interval:
    """A value and the half-width of its interval; `own` marks the measured method among its controls."""

    name: str
    value: float
    half: float
    own: bool = False


@dataclass(frozen=True)
class Bin:
    """A bin of a reliability diagram: mean confidence and accuracy (0..1) of `count` predictions."""

    confidence: float
    accuracy: float
    count: int


@dataclass(frozen=True)
class Trajectory:
    """The weights of one class and their `target`: for each draw its points (x, y), one after each step."""

    name: str
    target: tuple[float, float]
    draws: Sequence[Sequence[tuple[float, float]]]


@dataclass(frozen=True)
class Axis:
    """Maps the values low..high to the places start..end; start may be larger than end."""

    low: float
    high: float
    start: float
    end: float

    @classmethod
    def around(cls, values: Iterable[float], start: float, end: float) -> "Axis":
        """An axis that covers all values and ends on ticks."""
        values = list(values)
        low, high = min(values), max(values)
        if low == high:
            low, high = low - 0.5, high + 0.5
        step = _step(high - low)
        return cls(math.floor(low / step) * step, math.ceil(high / step) * step, start, end)

    def at(self, value: float) -> float:
        """The place of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """About five round values between the ends."""
        step = _step(self.high - self.low)
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def intervals(rows: Sequence[Interval], label: str, *, zero: bool = False) -> str:
    """A row per method: its name, its interval with a dot, and the numbers. `zero` adds the line of no difference.

    A row that is FAR below the best one is marked at the edge of the plot.
    """
    names = min(LONGEST_NAME, max(len(row.name) for row in rows)) * LETTER + 12
    best = max(row.value for row in rows)
    near = [row for row in rows if row.value > best - FAR]
    edges = [edge for row in near for edge in (row.value - row.half, row.value + row.half)]
    x = Axis.around([*edges, *([0.0] if zero else [])], names, WIDTH - 98)
    bottom = TOP + ROW * len(rows)
    svg = _canvas(bottom + BOTTOM, label)
    _ticks_across(svg, x, bottom)
    if zero:
        _line(svg, "zero", x.at(0), TOP, x.at(0), bottom)
    for i, row in enumerate(rows):
        y, own = TOP + ROW * (i + 0.5), " own" * row.own
        if row in near:
            _line(svg, f"range{own}", x.at(row.value - row.half), y, x.at(row.value + row.half), y)
            _add(svg, "circle", f"dot{own}", cx=x.at(row.value), cy=y, r=4)
        else:
            _text(svg, "◂ off the scale", x.start + 2, y + 4.5, "start", "tick")
        _text(svg, _short(row.name), names - 10, y + 4.5, "end")
        number = f"{row.value:+.2f}".replace("-", "−") if zero else f"{row.value:.2f}"
        _text(svg, f"{number} ± {row.half:.2f}", WIDTH, y + 4.5, "end")
    _text(svg, label, (x.start + x.end) / 2, bottom + 34, "middle", "tick")
    return _source(svg)


def curve(points: Sequence[tuple[float, float, float]], across: str, label: str, *, zero: bool = False) -> str:
    """A line through points (x, y, half-width), with a band if a half-width is above 0; `across` names the x axis."""
    height = 240.0
    bottom = height - BOTTOM
    edges = [edge for _, value, half in points for edge in (value - half, value + half)]
    y = Axis.around([*edges, *([0.0] if zero else [])], bottom, TOP)
    left = max(LEFT, 14 + LETTER * max(len(_number(tick)) for tick in y.ticks()))
    x = Axis(points[0][0], max(points[-1][0], points[0][0] + 1), left, WIDTH - RIGHT)
    svg = _canvas(height, label)
    _ticks_up(svg, y, x)
    for tick in x.ticks():
        _text(svg, _number(tick), x.at(tick), bottom + 18, "middle", "tick")
    if zero:
        _line(svg, "zero", x.start, y.at(0), x.end, y.at(0))
    if any(half > 0 for _, _, half in points):
        band = [(p, value + half) for p, value, half in points]
        band += [(p, value - half) for p, value, half in reversed(points)]
        _add(svg, "polygon", "band", points=_path(x, y, band))
    _add(svg, "polyline", "curve", points=_path(x, y, [(p, value) for p, value, _ in points]))
    _text(svg, across, (x.start + x.end) / 2, height - 6, "middle", "tick")
    return _source(svg)


def two_curves(first: Sequence[float], second: Sequence[float], across: str, names: tuple[str, str]) -> str:
    """Two lines over the steps 1, 2, ..: the first by the axis on the left, the second by the one on the right."""
    height, top = 260.0, TOP + 22
    bottom = height - BOTTOM
    left, right = (Axis.around(values, bottom, top) for values in (first, second))
    margins = [14 + LETTER * max(len(_number(tick)) for tick in axis.ticks()) for axis in (left, right)]
    x = Axis(1, max(len(first), 2), max(LEFT, margins[0]), WIDTH - margins[1])
    svg = _canvas(height, ", ".join(names))
    _ticks_up(svg, left, x)
    for tick in right.ticks():
        _text(svg, _number(tick), x.end + 7, right.at(tick) + 4.5, "start", "tick")
    for tick in x.ticks():
        if tick == round(tick):
            _text(svg, _number(tick), x.at(tick), bottom + 18, "middle", "tick")
    for hue, y, values, name in (("s0", left, first, names[0]), ("s1", right, second, names[1])):
        points = list(enumerate(values, start=1))
        _add(svg, "polyline", f"curve {hue}", points=_path(x, y, points))
        for step, value in points if len(points) <= MOST_DOTS else points[-1:]:
            _add(svg, "circle", f"dot {hue}", cx=x.at(step), cy=y.at(value), r=3)
        on_left = hue == "s0"
        edge = x.start if on_left else x.end
        _add(svg, "circle", f"dot {hue}", cx=edge, cy=TOP, r=4)
        _text(svg, name, edge + 9 if on_left else edge - 9, TOP + 4.5, "start" if on_left else "end", "tick")
    _text(svg, across, (x.start + x.end) / 2, height - 6, "middle", "tick")
    return _source(svg)


def trajectories(paths: Sequence[Trajectory], across: str, up: str) -> str:
    """Trajectories in a plane of equal scales: a dot per step, a larger one at the end; the rings are the targets."""
    height = WIDTH
    points = [p for path in paths for p in (path.target, *(p for draw in path.draws for p in draw))]
    start, end = LEFT + 8, WIDTH - RIGHT
    x, y = _square(points, (start, end), (height - BOTTOM, height - BOTTOM - (end - start)))
    svg = _canvas(height, f"{across}; {up}")
    _ticks_up(svg, y, x)
    for tick in x.ticks():
        _text(svg, _number(tick), x.at(tick), height - BOTTOM + 18, "middle", "tick")
    for i, path in enumerate(paths):
        hue = f"s{i % HUES}"
        for draw in path.draws:
            _add(svg, "polyline", f"trace {hue}", points=_path(x, y, draw))
            for step, (a, b) in enumerate(draw, start=1):
                _add(svg, "circle", f"dot {hue}", cx=x.at(a), cy=y.at(b), r=3.6 if step == len(draw) else 1.6)
    for i, path in enumerate(paths):  # drawn last, above the lines
        a, b = x.at(path.target[0]), y.at(path.target[1])
        _add(svg, "circle", f"ring s{i % HUES}", cx=a, cy=b, r=6)
        right = a > (start + end) / 2
        _text(svg, _short(path.name), a - 11 if right else a + 11, b + 4.5, "end" if right else "start", "text name")
    _text(svg, across, (start + end) / 2, height - 6, "middle", "tick")
    _text(svg, up, start, TOP + 2, "start", "tick")
    return _source(svg)


def _square(
    points: Sequence[tuple[float, float]], across: tuple[float, float], up: tuple[float, float]
) -> tuple[Axis, Axis]:
    """Two axes of equal scale that cover all points with some room around them."""
    middles, spans = [], []
    for values in zip(*points, strict=True):
        middles.append((min(values) + max(values)) / 2)
        spans.append(max(values) - min(values))
    half = 0.53 * max(*spans, 1e-6)
    return (
        Axis(middles[0] - half, middles[0] + half, *across),
        Axis(middles[1] - half, middles[1] + half, *up),
    )


def reliability(bins: Sequence[Bin], label: str) -> str:
    """Accuracy against confidence with the diagonal of perfect calibration; columns below count the predictions."""
    height, bottom, counts = 340.0, 238.0, 40.0
    x, y = Axis(0, 1, LEFT + 6, WIDTH - RIGHT), Axis(0, 1, bottom, TOP)
    svg = _canvas(height, label)
    _ticks_up(svg, y, x)
    _line(svg, "zero", x.at(0), y.at(0), x.at(1), y.at(1))
    filled = sorted((b for b in bins if b.count), key=lambda b: b.confidence)
    _add(svg, "polyline", "curve", points=_path(x, y, [(b.confidence, b.accuracy) for b in filled]))
    most = max((b.count for b in filled), default=1)
    base = bottom + 12 + counts
    for b in filled:
        _add(svg, "circle", "dot own", cx=x.at(b.confidence), cy=y.at(b.accuracy), r=4.5)
        size = counts * b.count / most
        column = _add(svg, "rect", "column", x=x.at(b.confidence) - 7, y=base - size, width=14, height=size)
        ElementTree.SubElement(
            column, "title"
        ).text = f"confidence {b.confidence:.2f}, accuracy {b.accuracy:.2f}, {b.count} predictions"
    _line(svg, "grid", x.start, base, x.end, base)
    for tick in x.ticks():
        _text(svg, _number(tick), x.at(tick), base + 18, "middle", "tick")
    _text(svg, "confidence (columns: predictions)", (x.start + x.end) / 2, height - 6, "middle", "tick")
    return _source(svg)


def _step(span: float) -> float:
    """1, 2 or 5 times a power of ten, about one fifth of the span."""
    rough = max(span / 5, 1e-300)  # smaller floats have few digits, and 0 has no logarithm
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)


def _short(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"


def _number(value: float) -> str:
    return f"{value:.6g}".replace("-", "−")


def _canvas(height: float, label: str) -> ElementTree.Element:
    attributes = {"viewBox": f"0 0 {WIDTH:g} {height:g}", "role": "img", "aria-label": label}
    return ElementTree.Element("svg", attributes)


def _add(svg: ElementTree.Element, tag: str, kind: str, **attributes: float | str) -> ElementTree.Element:
    plain = {k.replace("_", "-"): v if isinstance(v, str) else f"{v:.2f}" for k, v in attributes.items()}
    return ElementTree.SubElement(svg, tag, {"class": kind, **plain})


def _line(svg: ElementTree.Element, kind: str, x1: float, y1: float, x2: float, y2: float) -> None:
    _add(svg, "line", kind, x1=x1, y1=y1, x2=x2, y2=y2)


def _text(svg: ElementTree.Element, text: str, x: float, y: float, anchor: str, kind: str = "text") -> None:
    _add(svg, "text", kind, x=x, y=y, text_anchor=anchor).text = text


def _ticks_across(svg: ElementTree.Element, x: Axis, bottom: float) -> None:
    for tick in x.ticks():
        _line(svg, "grid", x.at(tick), TOP, x.at(tick), bottom)
        _text(svg, _number(tick), x.at(tick), bottom + 17, "middle", "tick")


def _ticks_up(svg: ElementTree.Element, y: Axis, x: Axis) -> None:
    for tick in y.ticks():
        _line(svg, "grid", x.start, y.at(tick), x.end, y.at(tick))
        _text(svg, _number(tick), x.start - 7, y.at(tick) + 4.5, "end", "tick")


def _path(x: Axis, y: Axis, points: Iterable[tuple[float, float]]) -> str:
    return " ".join(f"{x.at(a):.2f},{y.at(b):.2f}" for a, b in points)


def _source(svg: ElementTree.Element) -> str:
    return ElementTree.tostring(svg, encoding="unicode", short_empty_elements=False)
