"""The page of `adapt --report` as a document: complete, closed to the network, and deaf to hostile names."""

import base64
import io
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from metadiff_cli.commands.adapt.offenders import SUSPECTS
from metadiff_cli.commands.adapt.output import Outcome
from metadiff_cli.commands.adapt.report import REJECTED, THUMBNAIL, AdaptReport, write_report
from metadiff_cli.core.evaluation.support_check import Mistake
from metadiff_cli.errors import MetaDiffError
from tests.worlds import COLOURS, HOSTILE, Page, outcome, report

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def page_of(photos: Path, data: AdaptReport) -> Page:
    write_report(photos / "report.html", data)
    return Page(photos / "report.html")


def test_everything_is_there_in_the_given_order(photos: Path) -> None:
    page = page_of(photos, report(photos, facts={"Seed": 7}, notes=["Mind this."], support_check=["Looks good."]))
    cards = page.all("article", "card")
    assert [c["data-label"] for c in cards] == ["0", "1", "2", "3"]
    assert all(float(c["data-confidence"] or 0) == 0.7 for c in cards)
    assert len(page.all("article", "class")) == 4 and len(page.all("img")) == 4 + 10  # 1 + 2 + 3 + 4 support images
    paths = [a["title"] for a in page.all("p", "path")]
    assert paths == [str(photos / "query" / f"{c}.png") for c in COLOURS]
    for words in ("Seed 7", "Mind this.", "Looks good.", "Could not be read", str(photos / "broken.png"), "70 %"):
        assert words in page.text


def test_pictures_are_small_and_show_the_image(photos: Path) -> None:
    page = page_of(photos, report(photos))
    source = page.all("img")[-1]["src"] or ""
    head, data = source.split(",", 1)
    assert head in ("data:image/webp;base64", "data:image/jpeg;base64")
    image = Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")
    assert image.size == (THUMBNAIL, THUMBNAIL)
    last = Image.open(photos / "query" / f"{list(COLOURS)[-1]}.png").resize((1, 1), Image.Resampling.BOX)
    mean, wanted = image.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0)), last.getpixel((0, 0))
    assert mean == pytest.approx(wanted, abs=12)


def test_nothing_is_loaded_from_anywhere(photos: Path) -> None:
    page = page_of(photos, report(photos, (HOSTILE, "a", "b", "c")))
    policy = next(a for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert (policy["content"] or "").startswith(POLICY)
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href"):
                assert (value or "").startswith(("data:", "#")), (tag, value)


def test_rejected_twins_and_wrong_ones_are_marked(photos: Path) -> None:
    path = str(photos / "query" / "red.png")
    names = list(COLOURS)
    outcomes = [
        outcome(path, names, [0.4, 0.3, 0.2, 0.1], rejected=True),
        outcome(path, names, [0.7, 0.1, 0.1, 0.1], twin="support/red/0.png", truth="red"),
        outcome(path, names, [0.7, 0.1, 0.1, 0.1], truth="green"),
    ]
    page = page_of(photos, report(photos, outcomes=outcomes))
    rejected, right, wrong = page.all("article", "card")
    assert rejected["data-label"] == str(REJECTED) and "rejected" in (rejected["class"] or "")
    assert "data-wrong" not in right and wrong["data-wrong"] == "1"
    assert "also in the support" in page.text and "shows green" in page.text and "Accuracy 50.0 %" in page.text


def test_the_confusion_table(photos: Path) -> None:
    counts = [[5, 1, 0, 0], [0, 6, 0, 0], [0, 0, 0, 6], [0, 0, 0, 0]]
    page = page_of(photos, report(photos, confusion=counts))
    cells = page.all("td")
    assert [c["style"] for c in cells if c.get("style")][:4] == [
        f"--share:{s}" for s in ("0.833", "0.167", *2 * ["0.000"])
    ]
    assert "Of the labelled query images" in page.text
    assert "Confusion" not in page_of(photos, report(photos)).text


def test_mistakes_stand_beside_an_image_of_the_class_that_they_look_like(photos: Path) -> None:
    query, support = photos / "query", photos / "support"
    suspects = [Mistake(str(support / "blue" / f"{i}.png"), "blue", "grey", 0.9) for i in range(SUSPECTS + 2)]
    mistakes = [
        Mistake(str(query / "red.png"), "red", "green", 0.6),
        Mistake(str(query / "green.png"), "green", "red", 0.995),
        Mistake(str(query / "grey.png"), "grey", "blue", 0.5),
    ]
    data = report(photos, suspects=suspects, mistakes=mistakes)
    page = page_of(photos, data)
    assert len(page.all("figure", "offender")) == SUSPECTS + 3
    assert "blue , looks like grey 90 %" in page.text and "2 more: see the output of --json" in page.text
    assert page.text.index("green / red 2 images") < page.text.index("blue / grey 1 image")
    assert page.text.index("green , taken for red > 99 %") < page.text.index("red , taken for green 60 %")
    assert page.source.count('alt="Support image of ') == SUSPECTS + 3
    assert "held out in turn" in page.text
    alone = page_of(photos, report(photos, mistakes=mistakes, support={}))  # of a saved classifier
    assert len(alone.all("figure", "offender")) == 3 and "Support image of" not in alone.source
    assert "Look at these first" not in page_of(photos, report(photos)).text


def test_suggested_images_have_a_field_for_their_class(photos: Path) -> None:
    images = [outcome(str(photos / "query" / f"{c}.png"), list(COLOURS), [0.4, 0.3, 0.2, 0.1]) for c in COLOURS]
    page = page_of(photos, report(photos, suggested=images[:2]))
    fields = [a for a in page.all("input") if a.get("list") == "names"]
    assert [json.loads(a["data-path"] or "") for a in fields] == [image.path for image in images[:2]]
    assert sum(a["value"] in COLOURS for a in page.all("option")) == len(COLOURS)
    assert "red 40 %, green 30 %" in page.text.replace("\xa0", " ") and "--support labels.csv" in page.text
    saved = page_of(photos, report(photos, suggested=images[:2], support={}))
    assert "--classifier FILE --support labels.csv" in saved.text
    named = page_of(photos, report(photos, suggested=[outcome("a/\udcff.png", list(COLOURS), [0.4, 0.3, 0.2, 0.1])]))
    assert not any("data-path" in a for a in named.all("input")) and "rename the file to label it" in named.text
    for nothing in (None, []):
        assert "Worth labelling" not in page_of(photos, report(photos, suggested=nothing)).text


@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(st.text(min_size=1, max_size=40))
def test_text_never_becomes_markup(photos: Path, text: str) -> None:
    def filled(word: str) -> AdaptReport:
        names = (word, "aa", "bb", "cc")
        outcomes = [
            outcome(f"{word}x.png", names, [0.4, 0.3, 0.2, 0.1], twin=word, truth=word),
            Outcome(f"{word}y.png", reason=word),
        ]
        return report(photos, names, outcomes=outcomes, support={}, facts={word: word}, notes=[word],
                      suspects=[Mistake(word, word, word, 0.5)], mistakes=[Mistake(word, word, word, 0.5)],
                      suggested=outcomes[:1],
                      support_check=[word], broken_support=[(word, word)], confusion=[[1] * 4] * 4)  # fmt: skip

    plain = [(tag, sorted(a)) for tag, a in page_of(photos, filled("word")).tags]
    for word in (text, HOSTILE, f"{HOSTILE}{text}"):
        assert [(tag, sorted(a)) for tag, a in page_of(photos, filled(word)).tags] == plain


def test_odd_files_keep_their_place(photos: Path) -> None:
    """A name that is not UTF-8, and a file that has gone since it was predicted."""
    files, names = ("gone/\udcff.png", str(photos / "query/red.png")), list(COLOURS)
    outcomes = [outcome(file, names, [1.0, 0, 0, 0]) for file in files]
    page = page_of(photos, report(photos, outcomes=outcomes, support={}))
    assert len(page.all("article", "card")) == 2 and len(page.all("img")) == 1 and len(page.all("span", "noimage")) == 1
    assert "\\udcff.png" in page.text and "the classifier was loaded from a file" in page.text


def test_no_prediction_at_all(photos: Path) -> None:
    page = page_of(photos, report(photos, outcomes=[Outcome("x.png", reason="does not exist")]))
    assert not page.all("article", "card") and "does not exist" in page.text


def test_the_same_results_give_the_same_bytes(photos: Path) -> None:
    first = page_of(photos, report(photos)).source
    assert page_of(photos, report(photos)).source == first


def test_progress_counts_every_picture(photos: Path) -> None:
    seen: list[tuple[int, int]] = []
    write_report(photos / "r.html", report(photos), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i, 14) for i in range(1, 15)]


def test_a_failure_keeps_the_old_page(photos: Path) -> None:
    target = photos / "report.html"
    target.write_text("old")
    with pytest.raises(ValueError):
        write_report(target, report(photos, confusion=[[1]]))
    assert target.read_text() == "old" and not list(photos.glob(".report*"))
    (photos / "file").write_text("")
    with pytest.raises(MetaDiffError, match="cannot be written"):
        write_report(photos / "file" / "report.html", report(photos))
