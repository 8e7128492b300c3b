"""Progress bars, tables and messages. Results go to stdout, everything else to stderr. Only `--help` also uses Rich.

Off a terminal nothing moves: a line of text now and then takes the place of a bar. Names of files come from anywhere,
so they are shown as they are: no markup, no emoji, and control characters escaped.
"""

import json
import re
import sys
import time
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

PLAIN_EVERY = 10.0  # seconds between two progress lines where no bar can be drawn
WIDE = 160  # columns of a table that goes to a file or a pipe
# what changes a terminal or the order of letters: control characters but tab and newline, and marks of direction
UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")

Advance = Callable[[int, int | None], None]  # done, and of how many where that is known


def counted(number: int, one: str, many: str = "") -> str:
    """A number with its noun: "1 image", "2 images"; `many` is the plural where it is not formed by an s."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def visible(text: str) -> str:
    """The text with control characters as escapes such as \\x1b."""
    return UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def _plain(text: str) -> str:
    """The text as Rich's markup that shows it as it is."""
    return escape(visible(text))


class _Messages(Console):
    """A console for messages: when nobody reads them any more, the work goes on without them."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


class Screen:
    """What a command draws on. `quiet` leaves errors and results, `verbose` adds details.

    A screen that does not draw, as in all processes of a group but rank 0, still shows errors.
    """

    def __init__(self, *, quiet: bool = False, verbose: bool = False, draws: bool = True) -> None:
        self.mute = not draws
        self.quiet, self.verbose = quiet or self.mute, verbose and not self.mute
        self.moves = sys.stderr.isatty()  # FORCE_COLOR lets Rich take a file for a terminal
        self.out = self._console(Console, sys.stdout, self.mute)
        self.err = self._console(_Messages, sys.stderr, self.mute)

    def _console(self, kind: type[Console], file: TextIO, mute: bool) -> Console:
        return kind(file=file, highlight=False, emoji=False, width=None if file.isatty() else WIDE, quiet=mute)

    def note(self, text: str) -> None:
        """A line for the person, on stderr."""
        if not self.quiet:
            self.err.print(_plain(text), soft_wrap=True)

    def result(self, text: str) -> None:
        """A result that goes to stderr, because stdout holds rows for a program; shown even when quiet."""
        if not self.mute:
            self.err.print(escape(text), soft_wrap=True)

    def detail(self, text: str) -> None:
        """A line that only `--verbose` shows."""
        if self.verbose:
            self.err.print(_plain(text), style="dim", soft_wrap=True)

    def warn(self, text: str) -> None:
        """Something that a person should know even when it does not stop the run."""
        self.err.print(f"[yellow]warning:[/yellow] {_plain(text)}", soft_wrap=True)

    def ask(self, question: str) -> None:
        """A question that the person answers on the same line; shown even when quiet."""
        self.err.print(_plain(question), end=" ", soft_wrap=True)

    def error(self, message: str, hint: str | None) -> None:
        """What went wrong, and the next step."""
        err = self._console(_Messages, sys.stderr, mute=False)
        err.print(f"[bold red]error:[/bold red] {_plain(message)}", soft_wrap=True)
        if hint:
            err.print(f"  try: {_plain(hint)}", soft_wrap=True)

    def text(self, text: str) -> None:
        """A plain result line on stdout; off a terminal untouched."""
        if self.mute:
            return
        sys.stdout.write((visible(text) if sys.stdout.isatty() else text) + "\n")
        sys.stdout.flush()

    def json(self, document: dict[str, Any]) -> None:
        """One JSON document on stdout, and nothing else."""
        self.text(json.dumps(document, ensure_ascii=False, indent=2, allow_nan=False))

    def table(
        self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1, dim: Container[int] = ()
    ) -> None:
        """A table on stdout; the first `left` columns are text, the others numbers set to the right.

        The rows with the numbers `dim` are shown dim.
        """
        table = Table(title=_plain(title), title_justify="left", title_style="bold")
        for i, column in enumerate(columns):
            table.add_column(_plain(column), justify="left" if i < left else "right", overflow="fold")
        for number, row in enumerate(rows):
            table.add_row(*(_plain(cell) for cell in row), style="dim" if number in dim else None)
        self.out.print(table)

    @contextmanager
    def progress(self, label: str, *, shown: bool = True) -> Iterator[Advance]:
        """Yield `advance(done, total)`: a bar on a terminal, sparse lines elsewhere, nothing when quiet."""
        if self.quiet or not shown:
            yield lambda done, total: None
        elif self.moves:
            with self._bar() as bar:
                task = bar.add_task(visible(label), total=None)
                yield lambda done, total: bar.update(task, completed=done, total=total)
        else:
            yield self._sparse(label)

    @contextmanager
    def status(self, label: str) -> Iterator[Callable[[int, int, str], None]]:
        """Like `progress`, with a changing text beside the bar: `update(done, total, text)`."""
        if self.quiet:
            yield lambda done, total, text: None
        elif self.moves:
            with self._bar(TextColumn("{task.fields[text]}", markup=False)) as bar:
                task = bar.add_task(visible(label), total=None, text="")
                yield lambda done, total, text: bar.update(task, completed=done, total=total, text=visible(text))
        else:
            sparse = self._sparse(label)
            yield lambda done, total, text: sparse(done, total, text)

    def _bar(self, *extra: TextColumn) -> Progress:
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), *extra)
        timing = (TimeElapsedColumn(), TimeRemainingColumn())
        # Rich would send what is written to stdout meanwhile to the bar's console, which is stderr
        return Progress(*columns, *timing, console=self.err, transient=True, redirect_stdout=False)

    def _sparse(self, label: str) -> "SparseLines":
        return SparseLines(self, label)


class SparseLines:
    """Progress as a line every PLAIN_EVERY seconds, for logs."""

    def __init__(self, screen: Screen, label: str) -> None:
        self.screen, self.label, self.last = screen, label, time.monotonic()

    def __call__(self, done: int, total: int | None, text: str = "") -> None:
        if time.monotonic() - self.last >= PLAIN_EVERY:
            self.last = time.monotonic()
            of = "" if total is None else f"/{total}"
            self.screen.note(f"{self.label}: {done}{of} {text}".rstrip())
