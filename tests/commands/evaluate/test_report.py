"""The page of `evaluate --report`."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from metadiff_cli.commands.evaluate.measure import PICTURES
from metadiff_cli.commands.evaluate.report import write_evaluation_report
from tests.worlds import HOSTILE, Page, Result


@pytest.fixture(scope="module")
def document(small_run: Path) -> dict[str, Any]:
    """The result of a real run, without the bins of the diagram, which its own tests add."""
    loaded: dict[str, Any] = json.loads((small_run / "result.json").read_text())
    return {name: value for name, value in loaded.items() if name != "reliability"}


def test_the_descent_is_drawn_as_two_curves(document: dict[str, Any], tmp_path: Path) -> None:
    path = {"accuracy": [50.0, 61.5, 62.0], "loss": [3.0, 2.0, 1.5]}
    write_evaluation_report(tmp_path / "e.html", {**document, "path": path})
    page = Page(tmp_path / "e.html")
    assert "Along the descent" in page.text and "support loss, nats" in page.text and "path.accuracy" not in page.text
    assert [line["class"] for line in page.all("polyline", "curve")][:2] == ["curve s0", "curve s1"]


def test_a_method_without_a_calibration_error_has_a_dash(document: dict[str, Any], tmp_path: Path) -> None:
    methods = {name: {**m, "ece": None} for name, m in document["methods"].items()}
    write_evaluation_report(tmp_path / "e.html", {**document, "methods": methods})
    assert " - " in Page(tmp_path / "e.html").text and "ECE %" in Page(tmp_path / "e.html").text


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
    assert len(page.all("svg")) == 6 and "Reliability" not in page.text


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
    assert len(Page(tmp_path / "e.html").all("svg")) == 2  # the accuracy, and the descent
    methods = {"metadiff": alone, HOSTILE: alone}
    write_evaluation_report(tmp_path / "e.html", {**document, "methods": methods, "split": HOSTILE}, [{HOSTILE: 1}] * 2)
    page = Page(tmp_path / "e.html")
    assert not page.all("img") and not page.all("script") and HOSTILE.split("\u202e")[0] in page.source.replace(
        "&lt;", "<").replace("&gt;", ">").replace("&#34;", '"').replace("&#39;", "'").replace("&amp;", "&")  # fmt: skip


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


def test_trajectories_are_drawn_where_there_are_some(document: dict[str, Any], tmp_path: Path) -> None:
    pictures = {
        "classes": ["a", "b"], "targets": [[0.0, 0.0], [1.0, 1.0]], "shares": [0.7, 0.2],
        "weights": [[[[0.1, 0.2], [0.3, 0.4]]], [[[0.0, 0.1], [0.9, 1.0]]]],
    }  # fmt: skip
    write_evaluation_report(tmp_path / "e.html", {**document, PICTURES: pictures})
    page = Page(tmp_path / "e.html")
    assert "Weights on their way" in page.text and "70 % of their variance" in page.text
    assert "after each of 2 steps, for 1 draws" in page.text
    assert len(page.all("polyline", "trace")) == 2 and PICTURES not in page.text
