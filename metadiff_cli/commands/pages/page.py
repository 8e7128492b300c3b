"""Report pages: a template of this folder rendered to one self-contained HTML file."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from metadiff_cli import __version__
from metadiff_cli.errors import MetaDiffError
from metadiff_cli.files import atomic


def write_page(path: Path, template: str, **context: Any) -> None:
    """Render a template to the file `path`, atomically and piece by piece.

    Raises MetaDiffError when the file cannot be written.
    """
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
