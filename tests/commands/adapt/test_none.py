"""`adapt --none`, or a class folder `_none`: none of the classes as an answer, in every format, and in Python."""

import csv
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from metadiff_cli import FewShotClassifier
from metadiff_cli.commands.adapt.labelled import Score, is_right
from metadiff_cli.commands.adapt.output import Outcome, shown
from metadiff_cli.commands.adapt.report import write_report
from metadiff_cli.console import Screen
from metadiff_cli.core.checkpoints.facts import NONE
from tests.worlds import Page, Result, outcome, paint, report, validate

CLI = Callable[..., Result]
WHITE, BLACK = (250, 250, 250), (5, 5, 5)


@pytest.fixture
def others(photos: Path) -> Path:
    """White and black pictures, which are no class; further ones are among the queries."""
    for i in range(6):
        paint(photos / "others" / f"{i}.png", (WHITE, BLACK)[i % 2], seed=500 + i)
    for i in range(4):
        paint(photos / "query" / f"other-{i}.png", (WHITE, BLACK)[i % 2], seed=600 + i)
    return photos / "others"


def adapted(cli: CLI, photos: Path, *more: str | Path) -> dict[str, Any]:
    return validate(cli("adapt", "-Q", photos / "query", "--json", "--top-k", "9", *more), "metadiff.adapt/1")


def test_none_is_an_answer_whose_label_no_class_has(cli: CLI, photos: Path, others: Path, checkpoint: Path) -> None:
    document = adapted(cli, photos, "-S", photos / "support", "-c", checkpoint, "--none", others)
    assert document["classes"] == [NONE, "blue", "green", "grey", "red"] and document["support"][NONE] == 6
    assert document["support_check"]["images"] == 6 + 9  # red has one image, which is not held out
    for p in document["predictions"]:
        assert sum(c["confidence"] for c in p["top"]) == pytest.approx(1, abs=1e-5)
        assert p["label"] == p["top"][0]["label"] and not p["rejected"]
    found = {Path(p["path"]).stem for p in document["predictions"] if p["label"] == NONE}
    assert {"other-0", "other-1", "other-2", "other-3"} <= found and len(found) < 8


def test_a_class_folder_and_a_listing_say_the_same(cli: CLI, photos: Path, others: Path, checkpoint: Path) -> None:
    wanted = adapted(cli, photos, "-S", photos / "support", "-c", checkpoint, "--none", others)["predictions"]
    listing = photos / "list.csv"
    rows = [f"{path},{path.parent.name}" for path in (photos / "support").glob("*/*")]
    listing.write_text("\n".join(["path,label", *rows, *(f"{path},{NONE}" for path in others.iterdir())]))
    assert adapted(cli, photos, "-S", listing, "-c", checkpoint)["predictions"] == wanted
    (photos / "support" / NONE).mkdir()
    for path in sorted(others.iterdir())[:2]:  # some here, and the others by the option
        shutil.move(path, photos / "support" / NONE)
    assert adapted(cli, photos, "-S", photos / "support", "-c", checkpoint, "--none", others)["predictions"] == wanted


def test_table_lines_and_csv(cli: CLI, photos: Path, others: Path, checkpoint: Path) -> None:
    given = ("adapt", "-S", photos / "support", "--none", others, "-c", checkpoint, "-Q", photos / "query")
    table = cli(*given).out
    assert "8 images, 4 classes or none" in table and NONE not in table
    assert all("(none)" in line for line in table.splitlines() if "other-" in line)
    lines = [json.loads(line) for line in cli(*given, "--format", "jsonl").out.splitlines()]
    rows = list(csv.DictReader(io.StringIO(cli(*given, "--format", "csv").out)))
    for line, row in zip(lines, rows, strict=True):
        assert (row["label"], row["rejected"]) == (line["label"], "false")
    assert [row["label"] for row in rows if "other-" in row["path"]] == [NONE] * 4


def test_a_saved_classifier_keeps_it(cli: CLI, photos: Path, others: Path, checkpoint: Path) -> None:
    support, new, saved = photos / "support", photos / "new", photos / "saved.safetensors"
    everything = adapted(cli, photos, "-S", support, "-c", checkpoint, "--none", others)["predictions"]
    new.mkdir()
    shutil.move(support / "grey", new / "grey")
    first = adapted(cli, photos, "-S", support, "-c", checkpoint, "--none", others, "--save", saved)
    assert adapted(cli, photos, "--classifier", saved)["predictions"] == first["predictions"]
    assert json.loads(cli("inspect", saved, "--json").out)["classes"] == [NONE, "blue", "green", "red"]
    assert adapted(cli, photos, "--classifier", saved, "-S", new)["predictions"] == everything
    without = photos / "without.safetensors"
    adapted(cli, photos, "-S", support, "-c", checkpoint, "--save", without)
    assert adapted(cli, photos, "--classifier", without, "--none", others)["predictions"] == first["predictions"]


def test_python_gives_the_same_answers(cli: CLI, photos: Path, others: Path, checkpoint: Path) -> None:
    more = ("-S", photos / "support", "-c", checkpoint, "--none", others, "--reject", "auto")
    predictions = adapted(cli, photos, *more)["predictions"]
    images = [*sorted((photos / "support").glob("*/*")), *sorted(others.iterdir())]
    labels = [NONE if path.parent == others else path.parent.name for path in images]
    classifier = FewShotClassifier(checkpoint).fit(images, labels)
    queries = [p["path"] for p in predictions]
    assert classifier.predict(queries).tolist() == [p["top"][0]["label"] for p in predictions]
    assert NONE in classifier.predict(queries) and classifier.score(images, labels) > 0.5
    np.testing.assert_allclose(classifier.known_margin(queries), [p["margin"] for p in predictions], atol=1e-3)


def test_rejection_is_about_the_classes(cli: CLI, photos: Path, others: Path, checkpoint: Path) -> None:
    more = ("-S", photos / "support", "-c", checkpoint, "--none", others, "--reject", "auto")
    for p in adapted(cli, photos, *more)["predictions"]:
        best = p["top"][0]["label"]
        assert p["rejected"] == (p["margin"] < 0 and best != NONE)
        assert p["label"] == (None if p["rejected"] else best)


def test_one_class_against_none(cli: CLI, photos: Path, others: Path, checkpoint: Path) -> None:
    support = photos / "support"
    for name in ("red", "green", "blue"):
        shutil.rmtree(support / name)
    document = adapted(cli, photos, "-S", support, "-c", checkpoint, "--none", others, "--reject", "auto")
    assert document["classes"] == [NONE, "grey"]
    by_name = {Path(p["path"]).stem: p["top"][0]["label"] for p in document["predictions"]}
    assert by_name["grey"] == "grey" and by_name["other-0"] == by_name["other-1"] == NONE
    alone = cli("adapt", "-S", support, "-c", checkpoint, "-Q", photos / "query")
    assert alone.code == 3 and "one class only, 'grey'" in alone.err and NONE in alone.err
    for path in sorted((support / "grey").iterdir())[1:]:
        path.unlink()
    few = cli("adapt", "-S", support, "-c", checkpoint, "-Q", photos / "query", "--none", others, "--reject", "auto")
    assert few.code == 3 and "two images" in few.err


def test_images_of_none_have_to_be_there(cli: CLI, photos: Path, checkpoint: Path) -> None:
    given = ("adapt", "-S", photos / "support", "-Q", photos / "query", "-c", checkpoint, "--none")
    gone = cli(*given, photos / "gone")
    assert gone.code == 3 and f"--none {photos / 'gone'} does not exist" in gone.err
    (photos / "empty").mkdir()
    assert (empty := cli(*given, photos / "empty")).code == 3 and "there are no images" in empty.err
    (photos / "empty" / "1.png").write_bytes(b"no image")
    assert (broken := cli(*given, photos / "empty")).code == 3 and "1.png" in broken.err
    listing = photos / "list.csv"
    listing.write_text(f"path,label\n{photos / 'query' / 'red.png'},{NONE}")
    only = cli("adapt", "-S", listing, "-Q", photos / "query", "-c", checkpoint)
    assert only.code == 3 and "no class, only images of none" in only.err


def test_sorted_images_are_a_support_again(cli: CLI, photos: Path, others: Path, checkpoint: Path) -> None:
    support, into = photos / "support", photos / "sorted"
    given = ("-S", support, "-c", checkpoint, "--none", others, "--sort-into", into)
    for p in adapted(cli, photos, *given)["predictions"]:
        assert Path(p["sorted_to"]).parent == into / p["label"]
    again = adapted(cli, photos, "-S", into, "-c", checkpoint)
    assert NONE in again["classes"] and again["support"][NONE] >= 4
    inside = cli("adapt", "-Q", photos / "query", *given[:-1], others / "sorted")
    assert inside.code == 2 and "--none folder" in inside.err


def test_no_class_is_right_for_images_of_none_and_of_classes_that_the_support_lacks() -> None:
    classes = [NONE, "a", "b"]
    assert is_right("a", "a", classes) and not is_right("a", NONE, classes) and not is_right("a", None, classes)
    for truth in (NONE, "cat"):
        assert is_right(truth, NONE, classes) and is_right(truth, None, classes) and not is_right(truth, "a", classes)


def test_score(capsys: pytest.CaptureFixture[str]) -> None:
    score = Score([NONE, "a", "b"])
    pairs = [("a", "a"), ("b", NONE), (NONE, NONE), (NONE, "a"), ("cat", NONE), ("cat", "b"), ("cat", None)]
    for truth, label in pairs:
        score.add(Outcome("x", ((label or "a", 0.5),), rejected=label is None, truth=truth))
    document = score.document()
    assert (document["images"], document["correct"], document["rejected"]) == (7, 4, 1)
    assert document["other_classes"] == {"images": 3, "rejected": 1, "none": 1, "classes": ["cat"]}
    assert score.counts() == [[2, 1, 1], [0, 1, 0], [1, 0, 0]]  # cats are in the row of none
    score.show(Screen(), matrix=False)
    err = capsys.readouterr().err
    assert "3 images, 1 none, 1 rejected, in the accuracy as none" in err
    assert "(none) taken for a 1, b taken for (none) 1, cat taken for b 1" in err


def test_report(photos: Path) -> None:
    names = ["a", "b", "c", NONE]
    query = str(photos / "query" / "red.png")
    outcomes = [
        outcome(query, names, [0.1, 0.1, 0.1, 0.7], truth="cat"),
        outcome(query, names, [0.7, 0.1, 0.05, 0.15], truth=NONE),
    ]
    data = report(photos, names, outcomes=outcomes)
    write_report(photos / "r.html", data)
    page = Page(photos / "r.html")
    none, wrong = page.all("article", "card")
    assert (none["class"] or "").split() == ["card", "none"] and "data-wrong" not in none and none["data-label"] == "3"
    assert wrong["data-wrong"] == "1" and "shows (none)" in page.text
    assert "Classes 3" in page.text and "Labelled 1" in page.text and "None 1" in page.text
    assert NONE not in page.text and "Accuracy 50.0 %" in page.text and shown(NONE) in page.text
