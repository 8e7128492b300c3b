"""The small plots of the report pages."""

from xml.etree import ElementTree

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from metadiff_cli.commands.pages.plots import (
    WIDTH,
    Axis,
    Bin,
    Interval,
    Trajectory,
    curve,
    intervals,
    reliability,
    trajectories,
    two_curves,
)

CALM = settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])  # a busy machine is fine
NAMES = st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), min_size=1)
NUMBERS = st.floats(-1e6, 1e6, allow_nan=False)


def places(svg: str) -> list[float]:
    """All coordinates of an SVG along x."""
    root = ElementTree.fromstring(svg)
    alone = [float(e.attrib[k]) for e in root.iter() for k in ("x", "cx", "x1", "x2") if k in e.attrib]
    paired = [float(p.split(",")[0]) for e in root.iter() for p in e.attrib.get("points", "").split()]
    return alone + paired


@CALM
@given(st.lists(NUMBERS, min_size=1, max_size=20))
def test_axes_hold_their_values_and_end_on_ticks(values: list[float]) -> None:
    axis = Axis.around(values, 10, 200)
    assert all(10 - 1e-6 <= axis.at(v) <= 200 + 1e-6 for v in values)
    ticks = axis.ticks()
    assert 2 <= len(ticks) <= 9 and ticks == sorted(ticks)
    assert all(axis.low - 1e-6 <= t <= axis.high + 1e-6 for t in ticks)


@CALM
@given(st.lists(st.tuples(NAMES, st.floats(0, 100), st.floats(0, 20)), min_size=1, max_size=8), st.booleans())
def test_intervals_stay_inside(rows: list[tuple[str, float, float]], zero: bool) -> None:
    svg = intervals([Interval(*row) for row in rows], "accuracy", zero=zero)
    assert all(-1e-6 <= place <= WIDTH + 1e-6 for place in places(svg))
    assert svg.count("<circle") + svg.count("off the scale") == len(rows)


def test_a_method_far_below_does_not_hide_the_intervals() -> None:
    rows = [Interval("metadiff", 62.0, 0.4, True), Interval("prototype", 61.0, 0.4), Interval("untrained", 20.0, 1.0)]
    root = ElementTree.fromstring(intervals(rows, "accuracy"))
    (own,) = [e for e in root.iter("line") if e.attrib["class"] == "range own"]
    assert float(own.attrib["x2"]) - float(own.attrib["x1"]) > 20
    assert "20.00 ± 1.00" in [e.text for e in root.iter("text")]


@CALM
@given(st.lists(st.tuples(NUMBERS, st.floats(0, 1e3)), min_size=2, max_size=20))
def test_curves_stay_inside_and_bands_are_drawn(values: list[tuple[float, float]]) -> None:
    svg = curve([(i, y, half) for i, (y, half) in enumerate(values)], "step", "loss", zero=True)
    assert all(-1e-6 <= place <= WIDTH + 1e-6 for place in places(svg))
    assert ("polygon" in svg) == any(half > 0 for _, half in values)


@CALM
@given(st.lists(st.tuples(st.floats(0, 100), NUMBERS), min_size=1, max_size=40))
def test_two_curves_stay_inside_with_an_axis_each(values: list[tuple[float, float]]) -> None:
    first, second = ([pair[i] for pair in values] for i in (0, 1))
    svg = two_curves(first, second, "step", ("accuracy", "loss"))
    assert all(-1e-6 <= place <= WIDTH + 1e-6 for place in places(svg))
    lines = list(ElementTree.fromstring(svg).iter("polyline"))
    assert [len(e.attrib["points"].split()) for e in lines] == [len(values)] * 2


def test_perfect_calibration_lies_on_the_diagonal() -> None:
    root = ElementTree.fromstring(reliability([Bin(p, p, 5) for p in (0.2, 0.5, 0.9)], "reliability"))
    (diagonal,) = [e for e in root.iter("line") if e.attrib["class"] == "zero"]
    x1, y1, x2, y2 = (float(diagonal.attrib[k]) for k in ("x1", "y1", "x2", "y2"))
    for dot in root.iter("circle"):
        x, y = float(dot.attrib["cx"]), float(dot.attrib["cy"])
        assert y == pytest.approx(y1 + (x - x1) / (x2 - x1) * (y2 - y1), abs=0.02)


PLACES = st.floats(-1e4, 1e4)


@CALM
@given(st.lists(st.tuples(NAMES, st.lists(st.tuples(PLACES, PLACES), min_size=2, max_size=5)), min_size=1, max_size=7))
def test_trajectories_keep_inside_and_in_proportion(paths: list[tuple[str, list[tuple[float, float]]]]) -> None:
    svg = trajectories([Trajectory(name, points[0], [points]) for name, points in paths], "first", "second")
    assert all(-1e-6 <= place <= WIDTH + 1e-6 for place in places(svg))
    root = ElementTree.fromstring(svg)
    lines = [e for e in root.iter("polyline") if e.attrib["class"].startswith("trace")]
    assert len(lines) == len(paths) == sum(e.attrib["class"].startswith("ring") for e in root.iter("circle"))
    drawn = [tuple(map(float, p.split(","))) for e in lines for p in e.attrib["points"].split()]
    real = [p for _, points in paths for p in points]
    across, up = (max(a) - min(a) for a in zip(*drawn, strict=True))
    wide, high = (max(a) - min(a) for a in zip(*real, strict=True))
    assert across * high == pytest.approx(up * wide, rel=0.05, abs=20 * max(wide, high) / 100 + 1e-6)
