"""What is drawn, and by whom."""

import pytest

from metadiff_cli.console import Screen


def test_a_screen_that_does_not_draw_shows_errors_alone(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen(verbose=True, draws=False)
    screen.text("result")
    screen.json({"a": 1})
    screen.table("title", ["a"], [["b"]])
    screen.note("note")
    screen.warn("warning")
    screen.detail("detail")
    with screen.progress("bar") as advance, screen.status("bar") as update:
        advance(1, 2)
        update(1, 2, "text")
    assert capsys.readouterr() == ("", "")
    screen.error("wrong", "right")
    assert capsys.readouterr().err == "error: wrong\n  try: right\n"
