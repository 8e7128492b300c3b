"""The page of `evaluate --report`, and the small plots in it."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from metadiff_cli.commands.evaluate.report import write_evaluation_report
from metadiff_cli.commands.pages.plots import (
    WIDTH,
    Axis,
    Bin,
    Interval,
    Way,
    curve,
    curves,
    intervals,
    reliability,
    standalone,
    travels,
)
from tests.worlds import HOSTILE, Page, Result

CALM = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a busy machine is no failure
NAMES = st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), min_size=1)
NUMBERS = st.floats(-1e6, 1e6, allow_nan=False)


@pytest.fixture(scope="module")
def document(small_run: Path) -> dict[str, Any]:
    """The result of a real run, without the bins of the diagram, which its own tests add."""
    loaded: dict[str, Any] = json.loads((small_run / "result.json").read_text())
    return {name: value for name, value in loaded.items() if name != "reliability"}


def places(svg: str) -> list[float]:
    """All coordinates of an SVG along x."""
    root = ElementTree.fromstring(svg)
    alone = [float(e.attrib[k]) for e in root.iter() for k in ("x", "cx", "x1", "x2") if k in e.attrib]
    paired = [float(p.split(",")[0]) for e in root.iter() for p in e.attrib.get("points", "").split()]
    return alone + paired


def test_a_real_run_gives_its_numbers_and_curves(small_run: Path, document: dict[str, Any], tmp_path: Path) -> None:
    with (small_run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    write_evaluation_report(tmp_path / "e.html", document, rows)
    page = Page(tmp_path / "e.html")
    own = document["methods"]["metadiff"]
    assert f"{own['accuracy']:.2f} ± {own['ci95']:.2f}" in page.text
    for name in document["methods"]:
        assert name in page.text
    for words in ("Difference to prototype", "Difference to analytic", "Training loss", "Gain over the analytic"):
        assert words in page.text
    assert len(page.all("svg")) == 5 and "Reliability" not in page.text


def test_the_diagram_is_drawn_where_there_are_bins(document: dict[str, Any], tmp_path: Path) -> None:
    bins = [{"confidence": 0.1 * i, "accuracy": 0.09 * i, "count": i} for i in range(10)]
    write_evaluation_report(tmp_path / "e.html", {**document, "reliability": bins})
    page = Page(tmp_path / "e.html")
    assert "Reliability" in page.text and len(page.all("rect", "column")) == 9  # the empty bin is left out


def test_the_bins_of_a_real_run_are_drawn(small_run: Path, tmp_path: Path) -> None:
    result = json.loads((small_run / "result.json").read_text())
    write_evaluation_report(tmp_path / "e.html", result)
    columns = Page(tmp_path / "e.html").all("rect", "column")
    assert len(columns) == sum(b["count"] > 0 for b in result["reliability"]) > 0


def test_the_only_method_and_hostile_names(document: dict[str, Any], tmp_path: Path) -> None:
    alone = {name: value for name, value in document["methods"]["metadiff"].items() if not name.startswith("paired")}
    write_evaluation_report(tmp_path / "e.html", {**document, "methods": {"metadiff": alone}})
    assert len(Page(tmp_path / "e.html").all("svg")) == 1
    methods = {"metadiff": alone, HOSTILE: alone}
    write_evaluation_report(tmp_path / "e.html", {**document, "methods": methods, "split": HOSTILE}, [{HOSTILE: 1}] * 2)
    page = Page(tmp_path / "e.html")
    assert not page.all("img") and not page.all("script") and HOSTILE.split("\u202e")[0] in page.source.replace(
        "&lt;", "<").replace("&gt;", ">").replace("&#34;", '"').replace("&#39;", "'").replace("&amp;", "&")  # fmt: skip


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


def test_perfect_calibration_lies_on_the_diagonal() -> None:
    root = ElementTree.fromstring(reliability([Bin(p, p, 5) for p in (0.2, 0.5, 0.9)], "reliability"))
    (diagonal,) = [e for e in root.iter("line") if e.attrib["class"] == "zero"]
    x1, y1, x2, y2 = (float(diagonal.attrib[k]) for k in ("x1", "y1", "x2", "y2"))
    for dot in root.iter("circle"):
        x, y = float(dot.attrib["cx"]), float(dot.attrib["cy"])
        assert y == pytest.approx(y1 + (x - x1) / (x2 - x1) * (y2 - y1), abs=0.02)


def test_cells_that_are_no_numbers_leave_gaps(document: dict[str, Any], tmp_path: Path) -> None:
    rows = [{"step": "1", "loss": "nan", "gain": ""}, {"step": "2", "loss": "1.5", "gain": "0.1"},
            {"step": "3", "loss": "1.2", "gain": ""}]  # fmt: skip
    write_evaluation_report(tmp_path / "e.html", document, rows)
    text = Page(tmp_path / "e.html").text
    assert "Training loss" in text and "Gain over the analytic" not in text  # one value is no curve


def test_table_and_page_show_the_same(cli: Callable[..., Result], checkpoint: Path, tmp_path: Path) -> None:
    arguments = ["evaluate", "--checkpoint", checkpoint, "--episodes", "10", "--query", "5"]
    table, document = cli(*arguments).out, json.loads(cli(*arguments, "--json").out)
    write_evaluation_report(tmp_path / "e.html", document)
    own = document["methods"]["metadiff"]
    cell = f"{own['accuracy']:.2f} ± {own['ci95']:.2f}"
    assert cell in table and cell in Page(tmp_path / "e.html").text


PLACES = st.floats(-1e4, 1e4)


@CALM
@given(st.lists(st.tuples(NAMES, st.lists(st.tuples(PLACES, PLACES), min_size=2, max_size=5)), min_size=1, max_size=7))
def test_ways_stay_inside_and_keep_their_proportions(ways: list[tuple[str, list[tuple[float, float]]]]) -> None:
    svg = travels([Way(name, points[0], [points]) for name, points in ways], "first", "second")
    assert all(-1e-6 <= place <= WIDTH + 1e-6 for place in places(svg))
    root = ElementTree.fromstring(svg)
    lines = [e for e in root.iter("polyline") if e.attrib["class"].startswith("way")]
    assert len(lines) == len(ways) == sum(e.attrib["class"].startswith("ring") for e in root.iter("circle"))
    drawn = [tuple(map(float, p.split(","))) for e in lines for p in e.attrib["points"].split()]
    real = [p for _, points in ways for p in points]
    across, up = (max(a) - min(a) for a in zip(*drawn, strict=True))
    wide, high = (max(a) - min(a) for a in zip(*real, strict=True))
    assert across * high == pytest.approx(up * wide, rel=0.05, abs=20 * max(wide, high) / 100 + 1e-6)


@CALM
@given(st.lists(st.tuples(NAMES, st.lists(st.tuples(st.floats(0, 1e4), st.floats(0, 1e6)), min_size=1)), min_size=1,
                max_size=3))  # fmt: skip
def test_several_curves_stay_inside(series: list[tuple[str, list[tuple[float, float]]]]) -> None:
    root = ElementTree.fromstring(curves(series, "steps", "MiB"))
    assert len(list(root.iter("polyline"))) == len(series)
    dots = [e for e in root.iter("circle") if e.attrib["r"] == "3.00"]
    assert all(-1e-6 <= float(e.attrib["cx"]) <= WIDTH for e in dots)


def test_a_plot_can_stand_alone() -> None:
    svg = standalone(curves([("a", [(1, 2), (3, 4)])], "steps", "MiB"))
    root = ElementTree.fromstring(svg)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    (style,) = root.iter("{http://www.w3.org/2000/svg}style")
    assert style.text is not None and "--s0:" in style.text and "svg .curve" in style.text
    assert "prefers-color-scheme: dark" in style.text and "url(" not in style.text
