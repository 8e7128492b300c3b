"""Where a report page may be written."""

from pathlib import Path

import pytest

from metadiff_cli.commands.pages.page import check_page, write_page
from metadiff_cli.errors import ConfigError, MetaDiffError

EMPTY = {"title": "t", "about": "", "tiles_facts": [], "facts": [], "figures": [], "columns": ["a"], "rows": [],
         "open_set": None}  # fmt: skip


def test_a_page_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    page = tmp_path / "new" / "e.html"
    check_page(page)
    write_page(page, "evaluate.html", **EMPTY)
    check_page(page)
    for name, content in {"photo.jpg": b"\xff\xd8" * 2000, "notes.html": b"<p>mine</p>"}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match="not a page of metadiff"):
            check_page(tmp_path / name)
    (tmp_path / "empty.html").touch()
    check_page(tmp_path / "empty.html")


def test_a_place_where_no_page_can_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "e.html"):
        with pytest.raises(ConfigError):
            check_page(path)
        with pytest.raises(MetaDiffError, match="cannot be written"):
            write_page(path, "evaluate.html", **EMPTY)
