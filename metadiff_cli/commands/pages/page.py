"""Report pages: a template of this folder rendered to one self-contained HTML file."""

from pathlib import Path
from typing import Any

from metadiff_cli import __version__
from metadiff_cli.commands.settings import check_new
from metadiff_cli.errors import ConfigError, MetaDiffError
from metadiff_cli.files import atomic

MARK = b'<meta name="generator" content="metadiff '  # in the head of every page


def check_page(path: Path) -> None:
    """Raise ConfigError when there can be no page at `path`, or would be one in the place of a file of another kind.

    For commands to call before their long part.
    """
    check_new(path, overwrite=True)
    if path.exists() and (not path.is_file() or (path.stat().st_size > 0 and MARK not in _head(path))):
        raise ConfigError(
            f"--report {path} would replace a file that is not a page of metadiff", hint="give a new name"
        )


def write_page(path: Path, template: str, **context: Any) -> None:
    """Render a template to the file `path`, atomically and piece by piece.

    Raises MetaDiffError when the file cannot be written.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # `check_page` need not wait for it

    pages = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    pieces = pages.get_template(template).generate(version=__version__, **context)
    try:
        # a file name that is not UTF-8 has lone surrogates, which are written as escapes
        with (
            atomic(path) as temporary,
            temporary.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file,
        ):
            file.writelines(pieces)
    except OSError as error:
        raise MetaDiffError(
            f"report {path} cannot be written ({error.strerror})", hint="give another --report"
        ) from error


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(2048)
