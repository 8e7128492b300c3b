"""Accuracy and confusions of labelled queries."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metadiff_cli.commands.adapt.labelled import REJECTED, Score, wilson
from metadiff_cli.commands.adapt.output import Outcome
from metadiff_cli.console import Screen


def outcome(truth: str | None, label: str | None) -> Outcome:
    return Outcome("x", ((label or "a", 0.5),), rejected=label is None, truth=truth)


def test_counts() -> None:
    score = Score(["a", "b"])
    pairs = [("a", "a"), ("a", "b"), ("b", "b"), ("b", None), ("c", "a"), ("c", None), (None, "a")]
    for truth, label in pairs:
        score.add(outcome(truth, label))
    document = score.document()
    assert (document["images"], document["correct"], document["rejected"]) == (4, 2, 1)
    assert document["accuracy"] == 50 and document["unlabelled"] == 1
    assert document["other_classes"] == {"images": 2, "rejected": 1, "classes": ["c"]}
    assert document["confusion"] == {
        "rows": ["a", "b", "c"],
        "columns": ["a", "b", REJECTED],
        "matrix": [[1, 1, 0], [0, 1, 1], [1, 0, 1]],
    }


def test_every_column_of_the_matrix_has_a_name(capsys: pytest.CaptureFixture[str]) -> None:
    score = Score(["hen", "goose", "owl"])
    for pair in (("hen", "goose"), ("owl", "owl")):
        score.add(outcome(*pair))
    score.show(Screen(), matrix=True)
    assert "columns of classes without images here: 2 goose\n" in capsys.readouterr().out
    score.show(Screen(), matrix=False)
    shown = capsys.readouterr()
    assert shown.out == "" and "most frequent confusions: hen taken for goose 1\n" in shown.err


@pytest.mark.parametrize("matrix", [True, False])
def test_what_a_person_asked_for_is_shown_to_the_quiet_as_well(
    capsys: pytest.CaptureFixture[str], matrix: bool
) -> None:
    score = Score(["hen", "owl"])
    for pair in (("hen", "owl"), ("owl", "owl"), ("cat", "owl"), (None, "owl")):
        score.add(outcome(*pair))
    score.show(Screen(quiet=True), matrix=matrix)
    shown = capsys.readouterr()
    assert (
        "accuracy 50.0 %" in shown.err and "of classes that the support lacks (cat): 1 image, 0 rejected" in shown.err
    )
    assert ("confusion matrix" in shown.out) == matrix and ("hen taken for owl 1" in shown.err) != matrix


@pytest.mark.parametrize(
    ("classes", "width", "whole"), [(11, 80, True), (14, 80, False), (20, 160, True), (21, 999, False)]
)
def test_a_matrix_that_does_not_fit_is_a_list_of_confusions(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, classes: int, width: int, whole: bool
) -> None:
    monkeypatch.setattr("metadiff_cli.console.WIDE", width)
    names = [f"a long name of class {i}" for i in range(classes)]
    score = Score(names)
    for i, name in enumerate(names):
        for _ in range(12):
            score.add(outcome(name, names[i - 1]))
    score.show(Screen(), matrix=True)
    shown = capsys.readouterr()
    assert ("confusion matrix" in shown.out) == whole and ("most frequent confusions" in shown.out) != whole
    assert shown.out.count("12") >= (classes if whole else 15)  # no number is cut
    assert ("--json holds it" in shown.err) != whole


def test_only_classes_that_the_support_lacks() -> None:
    score = Score(["a", "b"])
    score.add(outcome("c", "a"))
    assert score.document()["accuracy"] is None and score.document()["ci95"] is None


@settings(deadline=None)
@given(st.integers(1, 500), st.data())
def test_the_interval_holds_the_accuracy_and_stays_in_range(images: int, data: st.DataObject) -> None:
    correct = data.draw(st.integers(0, images))
    low, high = wilson(correct, images)
    assert 0 <= low <= 100 * correct / images + 1e-3 and 100 * correct / images - 1e-3 <= high <= 100


def test_the_interval_of_a_known_case() -> None:
    assert wilson(8, 10) == pytest.approx(
        [49.016, 94.332], abs=1e-2
    )  # scipy's binomtest(8, 10).proportion_ci(method="wilson")
