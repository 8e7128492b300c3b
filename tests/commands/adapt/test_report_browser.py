"""The report pages in a real headless Chromium: no errors, no requests, filters that work, at any width."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from metadiff_cli.commands.adapt.output import Outcome
from metadiff_cli.commands.adapt.report import AdaptReport, write_report
from metadiff_cli.data.listing import open_labelled
from tests.worlds import COLOURS, HOSTILE, outcome, paint, report

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed; it is the extra [browser]")

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium on the PATH")

FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
SCREENS: dict[str, dict[str, Any]] = {
    "desktop": {"viewport": {"width": 1280, "height": 900}},
    "phone": {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True},
    "dark": {"viewport": {"width": 1280, "height": 900}, "color_scheme": "dark"},
}
STILL = {"still": {"java_script_enabled": False}}
MANY, PAGE = 2000, 120


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """Open a page file in a new browser profile; leaving the block checks that nothing went wrong or was asked for."""
    with playwright.sync_playwright() as driver:

        @contextmanager
        def opened(file: Path, screen: str = "desktop") -> Iterator[Any]:
            profile = tmp_path_factory.mktemp("profile")
            context = driver.chromium.launch_persistent_context(
                profile, executable_path=CHROMIUM, args=FLAGS, **(SCREENS | STILL)[screen]
            )
            wrong: list[str] = []
            page = context.new_page()
            page.on("console", lambda message: wrong.append(f"{message.type}: {message.text}"))
            page.on("pageerror", lambda error: wrong.append(str(error)))
            page.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
            page.on("request", lambda r: wrong.append(r.url) if not r.url.startswith(("file:", "data:")) else None)
            page.goto(file.as_uri())
            yield page
            context.close()
            assert not wrong, wrong

        yield opened


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2,000 query images of few files: class k % 4, confidence rising with k; the first hundred are rejected."""
    folder = tmp_path_factory.mktemp("photos")
    for c, (name, colour) in enumerate(COLOURS.items()):
        paint(folder / "support" / name / "0.png", colour, seed=c)
        paint(folder / "query" / f"{name}.png", colour, seed=10 + c)
    names = [HOSTILE, *list(COLOURS)[1:]]
    files = [str(folder / "query" / f"{c}.png") for c in COLOURS]
    outcomes = []
    for k in range(MANY):
        p = 0.25 + 0.7 * k / MANY
        rest = [(1 - p) / 3] * 4
        rest[k % 4] = p
        truth = names[0] if k % 401 == 0 else None
        outcomes.append(outcome(files[k % 4], names, rest, rejected=k < 100, truth=truth))
    outcomes.append(Outcome(f"{HOSTILE}.png", reason="not an image, or damaged"))
    data: AdaptReport = report(folder, names, outcomes=outcomes, confusion=[[1, 0, 2, 0]] * 4)
    write_report(folder / "report.html", data)
    return folder / "report.html"


def eventually(page: Any, condition: Callable[[], bool]) -> None:
    """Wait for what the page does after an event; the page's policy forbids the driver's own waiting."""
    for _ in range(300):
        if condition():
            return
        page.wait_for_timeout(100)
    pytest.fail("nothing happened within 30 seconds")


def visible(page: Any) -> int:
    """Cards that are laid out."""
    return int(page.evaluate("() => [...document.querySelectorAll('.card')].filter(c => c.offsetParent).length"))


def shown(page: Any) -> int:
    """Cards that fit the filters, checked against the number that the page tells; a first part of them is laid out."""
    count = int(page.locator(".card:not([hidden])").count())
    assert min(count, PAGE) <= visible(page) <= count
    assert page.inner_text("#shown") == (f"{MANY} images" if count == MANY else f"{count} of {MANY} images")
    return count


def test_filters(launch: Callable[..., Any], page_file: Path) -> None:
    with launch(page_file) as page:
        assert shown(page) == MANY
        page.select_option("#class", "1")
        assert shown(page) == (MANY - 100) // 4
        labels = page.eval_on_selector_all(
            ".card:not([hidden])", "cards => [...new Set(cards.map(c => c.dataset.label))]"
        )
        assert labels == ["1"]
        page.evaluate("() => { const e = document.getElementById('most'); e.value = 60;"
                      "e.dispatchEvent(new Event('input', {bubbles: true})); }")  # fmt: skip
        assert shown(page) == 225 and page.inner_text("#most-value") == "60 %"  # k = 101, 105, ... up to 1000
        page.click("button[type=reset]")
        eventually(page, lambda: page.inner_text("#shown") == f"{MANY} images")
        page.select_option("#class", "-1")
        assert shown(page) == 100
        page.select_option("#class", "")
        page.check("#wrong")
        assert shown(page) == 3  # of five known ones the first is rejected and the last is right
        page.uncheck("#wrong")
        page.fill("#text", "no such file")
        assert shown(page) == 0 and page.is_visible("#nothing")
        page.fill("#text", "RED.png")
        assert shown(page) == MANY // 4


def test_order(launch: Callable[..., Any], page_file: Path) -> None:
    with launch(page_file) as page:
        read = "() => [...document.querySelectorAll('.card')].map(c => Number(c.dataset.confidence))"
        given = page.evaluate(read)
        page.select_option("#order", "high")
        assert page.evaluate(read) == sorted(given, reverse=True)
        page.select_option("#order", "given")
        assert page.evaluate(read) == given


def test_cards_appear_as_they_are_scrolled_to(launch: Callable[..., Any], page_file: Path) -> None:
    with launch(page_file) as page:
        assert visible(page) < MANY / 2
        for _ in range(3):
            before = visible(page)
            page.eval_on_selector("#more", "e => e.scrollIntoView()")
            eventually(page, lambda before=before: visible(page) > before)
        page.select_option("#class", "-1")
        assert visible(page) == 100 and not page.is_visible("#more")
        page.emulate_media(media="print")
        page.select_option("#class", "", force=True)
        assert visible(page) == MANY


def test_the_keyboard_suffices(launch: Callable[..., Any], page_file: Path) -> None:
    with launch(page_file) as page:
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        for _ in range(20):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.dataset.class") == "2":
                break
        page.keyboard.press("Enter")  # "Show" of the third class
        assert page.input_value("#class") == "2" and shown(page) == (MANY - 100) // 4
        assert page.evaluate("document.activeElement.id") == "class"
        page.keyboard.press("ArrowDown")
        assert page.input_value("#class") == "3"


@pytest.mark.parametrize("screen", SCREENS)
def test_legible_at_any_width_and_in_the_dark(launch: Callable[..., Any], page_file: Path, screen: str) -> None:
    with launch(page_file, screen) as page:
        width = SCREENS[screen]["viewport"]["width"]
        assert page.evaluate("document.documentElement.scrollWidth") <= width  # nothing to scroll sideways
        light = "(c => c.match(/[0-9]+/g).slice(0, 3).reduce((a, b) => a + Number(b), 0))(getComputedStyle({}).{})"
        back = page.evaluate(light.replace("{}", "document.body", 1).replace("{}", "backgroundColor", 1))
        text = page.evaluate(light.replace("{}", "document.querySelector('.label')", 1).replace("{}", "color", 1))
        assert abs(back - text) > 450 and (back < text) == (screen == "dark")
        loaded = "() => [...document.images].filter(i => i.complete && i.naturalWidth > 0).length"
        eventually(page, lambda: page.evaluate(loaded) >= 4)
        assert page.eval_on_selector("h3", "e => e.textContent") == HOSTILE


def test_without_scripts_everything_is_shown(launch: Callable[..., Any], page_file: Path) -> None:
    with launch(page_file, "still") as page:
        assert page.locator(".card").count() == MANY and page.locator(".card").last.is_visible()
        assert not page.is_visible("#filters") and not page.locator("button.show").first.is_visible()


@pytest.mark.parametrize("screen", ["desktop", "phone"])
def test_labels_are_saved_as_a_support(
    launch: Callable[..., Any], photos: Path, tmp_path_factory: pytest.TempPathFactory, screen: str
) -> None:
    odd = photos / "query" / 'an "odd", name\'s.png'
    (photos / "query" / "red.png").rename(odd)
    images = [outcome(str(path), list(COLOURS), [0.4, 0.3, 0.2, 0.1]) for path in sorted((photos / "query").iterdir())]
    data = report(photos, outcomes=images, suggested=images)
    write_report(photos / "report.html", data)
    file = tmp_path_factory.mktemp("downloads") / "labels.csv"  # not where the images are
    with launch(photos / "report.html", screen) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= SCREENS[screen]["viewport"]["width"]
        fields = page.locator("#suggested input")
        assert page.is_disabled("#save") and page.inner_text("#labelled") == "0 of 4 labelled"
        fields.nth(0).fill(HOSTILE)
        fields.nth(1).fill("  blue ")
        fields.nth(2).fill("   ")
        assert page.inner_text("#labelled") == "2 of 4 labelled"
        with page.expect_download() as download:
            page.click("#save")
        assert download.value.suggested_filename == "labels.csv"
        download.value.save_as(file)
    split = open_labelled(file)
    found = [(path, split.classes[label]) for path, label in zip(split.paths, split.labels, strict=True)]
    support = [(path, name) for name, paths in data.support.items() for path in paths]
    assert found == [*support, (images[0].path, HOSTILE), (images[1].path, "blue")]
    assert images[0].path == str(odd) and all(Path(path).is_file() for path, _ in found)
