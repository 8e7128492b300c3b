"""Commands that look at folders of the user, for one without a home folder, as in many containers."""

import pwd
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.worlds import Result

CLI = Callable[..., Result]


def unknown(uid: int) -> pwd.struct_passwd:
    """Look up a user who is not in the list of users."""
    raise KeyError(uid)


@pytest.mark.parametrize("line", ["doctor", "cache list", "cache clear --yes", "data list", "config show"])
def test_a_user_without_a_home_folder(cli: CLI, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("HOME", "METADIFF_CACHE_DIR", "METADIFF_DATA_DIR", "XDG_CACHE_HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    result = cli(*line.split())
    assert result.code == 0, result.err
    assert "there is no home folder (set HOME)" in result.err
