"""The pages of `--help`: usage, text, and options and commands in named groups.

Typer's own pages look the same, but load parsers of Markdown and of Python, for as long as all the rest takes.
"""

import inspect
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

# what stands out in texts and names
STYLES = {r"(?<![\w-])--[\w-]+": "bold cyan", r"(?<![\w-])-\w\b": "bold green", r"\[(default: .*|required)\]$": "dim"}
COMMAND = "bold cyan"


def show_help(command: Any, context: Any) -> None:
    """Print the page of a command or a group of commands on stdout."""
    console = Console(highlight=False)
    usage = command.get_usage(context).removeprefix("Usage: ")  # its brackets are no markup
    console.print(Padding(Text.assemble(("Usage: ", "yellow"), (usage, "bold")), 1))
    console.print(Padding(_styled(inspect.cleandoc(command.help or "")), (0, 1, 1, 1)))
    params = [param for param in command.get_params(context) if not getattr(param, "hidden", False)]
    arguments = [param for param in params if param.param_type_name == "argument"]
    _show(console, "Arguments", [_argument(param) for param in arguments])
    for panel, options in _panels((param for param in params if param not in arguments), "Options"):
        _show(console, panel, [_option(param) for param in options])
    commands = [command.get_command(context, name) for name in getattr(command, "commands", {})]
    width = max((len(inner.name) for inner in commands), default=0)
    for panel, inners in _panels(commands, "Commands"):
        _show(console, panel, [(Text(inner.name.ljust(width), COMMAND), _summary(inner)) for inner in inners])


def _panels(items: Iterable[Any], usual: str) -> Iterable[tuple[str, list[Any]]]:
    """The items by their group, `usual` where they have none, which comes first; else in the order of their groups."""
    named = [(getattr(item, "rich_help_panel", None) or usual, item) for item in items]
    order = list(dict.fromkeys([usual, *(panel for panel, _ in named)]))
    named.sort(key=lambda pair: order.index(pair[0]))
    return ((panel, [item for _, item in group]) for panel, group in groupby(named, key=lambda pair: pair[0]))


def _show(console: Console, title: str, rows: Sequence[Sequence[Text]]) -> None:
    """A group: the last column takes the room that the others leave, and columns without any text take none."""
    if not rows:
        return
    table = Table.grid(padding=(0, 2, 0, 0), expand=True)
    kept = [column for column in zip(*rows, strict=True) if any(cell.plain for cell in column)]
    for column in kept:
        table.add_column(ratio=1 if column is kept[-1] else None, no_wrap=column is not kept[-1])
    for row in zip(*kept, strict=True):
        table.add_row(*row)
    console.print(Panel(table, title=title, title_align="left", border_style="dim"))


def _argument(param: Any) -> list[Text]:
    name = (param.metavar or param.name) + ("" if param.nargs == 1 else "...")
    return [Text(name, "bold yellow"), _about(param)]


def _option(param: Any) -> list[Text]:
    """A star where it is required; its long names, short names, value and help."""
    names = [*param.opts, *param.secondary_opts]
    long, short = (",".join(n for n in names if n.startswith("--") is wanted) for wanted in (True, False))
    value = "" if param.is_flag else f"{param.metavar or param.name.upper()}{_range(param)}"
    star = Text("*" if param.required else "", "red")
    return [star, _styled(long), _styled(short), Text(value, "bold yellow"), _about(param)]


def _range(param: Any) -> str:
    low, high = getattr(param, "min", None), getattr(param, "max", None)
    if low is None:
        return "" if high is None else f" <={high}"
    return f" >={low}" if high is None else f" {low}..{high}"


def _about(param: Any) -> Text:
    """The help of a parameter, with the default that is not in it."""
    default = "" if isinstance(param.default, bool | None) or not param.show_default else param.default
    ends = [f"\\[default: {default}]"] if default not in ("", ()) else []
    return _styled(" ".join([param.help or "", *ends, *(["\\[required]"] if param.required else [])]))


def _summary(command: Any) -> Text:
    return _styled(inspect.cleandoc(command.help or "").partition("\n")[0])


def _styled(markup: str) -> Text:
    text = Text.from_markup(markup)
    for pattern, style in STYLES.items():
        text.highlight_regex(pattern, style)
    return text
