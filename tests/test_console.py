"""What is drawn, and by whom."""

import io
import sys

import pytest

from metadiff_cli import console
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


HOSTILE = "12:100:5.jpg \x1b[31m\x07[bold]\u202egpj.exe"
SHOWN = "12:100:5.jpg \\x1b[31m\\x07[bold]\\u202egpj.exe"


def test_names_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen(verbose=True)
    for say in (screen.note, screen.warn, screen.detail, screen.ask):
        say(HOSTILE)
    screen.error(HOSTILE, HOSTILE)
    screen.table(HOSTILE, [HOSTILE], [[HOSTILE]])
    out, err = capsys.readouterr()
    assert err.count(SHOWN) == 6 and out.count(SHOWN) == 3
    assert not set("\x1b\x07\u202e") & set(out + err)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_names_in_bars_are_shown_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "stderr", Terminal())
    screen = Screen()
    with screen.status(HOSTILE) as update:
        update(1, 2, HOSTILE)
    with screen.progress(HOSTILE) as advance:
        advance(1, 2)
    drawn = sys.stderr.getvalue()
    assert SHOWN in drawn and "\x07" not in drawn and "\u202e" not in drawn and "\x1b[31m\\x07" not in drawn


def test_a_terminal_gets_no_control_characters_of_results(monkeypatch: pytest.MonkeyPatch) -> None:
    for stdout, expected in ((Terminal(), SHOWN), (io.StringIO(), HOSTILE)):
        monkeypatch.setattr(sys, "stdout", stdout)
        Screen().text(HOSTILE)
        assert stdout.getvalue() == expected + "\n"


def test_some_rows_of_a_table_are_dim(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", stdout := Terminal())
    Screen().table("answers", ("image", "label"), [("1.png", "cat"), ("2.png", "(none)")], left=2, dim={1})
    cat, none = [line for line in stdout.getvalue().splitlines() if ".png" in line]
    assert "\x1b[2m2.png" in none and "\x1b[2m" not in cat


def test_nothing_moves_off_a_terminal_whatever_the_colours(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(console, "PLAIN_EVERY", 0.0)
    screen = Screen()
    with screen.progress("reading") as advance, screen.status("training") as update:
        for i in range(3):
            advance(i, 3)
            update(i, 3, "loss")
    err = capsys.readouterr().err
    assert err.count("\n") == 6 and "\r" not in err and "\x1b[2K" not in err and "?25l" not in err


def test_messages_that_nobody_reads_stop_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", Broken())
    screen = Screen()
    screen.note("one")
    screen.warn("two")
