"""The package as people get it: the wheel, lazy help, README and commands that agree."""

import re
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

from metadiff_cli import __version__, errors
from metadiff_cli.config.load import preset_names, read_preset
from tests.worlds import invoke

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the checkout with the build backend that is installed."""
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = out.glob("*.whl")
    return file


def test_wheel_and_sdist_pass_twine(wheel: Path, tmp_path: Path) -> None:
    pytest.importorskip("twine", reason="twine is not installed; it is in the extra [dev]")
    command = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (sdist,) = tmp_path.glob("*.tar.gz")
    checked = [sys.executable, "-m", "twine", "check", "--strict", str(wheel), str(sdist)]
    done = subprocess.run(checked, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("PASSED") == 2, done.stdout + done.stderr
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"tests/worlds.py", "docs/start.md", "NOTICE", "presets/photos.yaml"} <= names


def test_the_metadata_of_the_wheel(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
    about = message_from_bytes(archive.read(name))
    assert about["Name"] == "metadiff" and about["Version"] == __version__ and about["Author"] and about["Keywords"]
    kinds = about.get_all("Classifier") or []
    assert all(f"Programming Language :: Python :: 3.{minor}" in kinds for minor in (11, 12, 13, 14))
    assert set(about.get_all("Provides-Extra") or []) >= {"docs", "hub", "fast", "heic", "onnx", "timm", "dev"}
    assert set(about.get_all("License-File") or []) == {"LICENSE", "NOTICE"}


def test_presets_come_from_the_installed_wheel(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    code = (
        f"import sys; sys.path.insert(0, {str(target)!r})\n"
        "from metadiff_cli.config import load as settings\n"
        "settings.resolve('glyphs-5w1s', environ={})\n"
        "print(settings.preset_folder()); print(*settings.preset_names())"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    folder, names = done.stdout.splitlines()
    assert folder == str(target / "metadiff_cli" / "presets")
    assert names.split() == preset_names() and "mini-5w5s" in names


def test_the_wheel_holds_splits_types_and_no_images_but_those_of_the_demo(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    demo = [n for n in names if n.startswith("metadiff_cli/demo/")]
    assert len(demo) == 21 and "metadiff_cli/demo/LICENCE.txt" in demo
    assert "metadiff_cli/py.typed" in names and "metadiff_cli/data/splits/omniglot.json" in names
    assert "metadiff_cli/schemas/evaluate-1.json" in names
    others = sorted(set(names) - set(demo))
    assert not [n for n in others if n.endswith((".png", ".webp", ".jpg", ".npz")) or n.startswith("tests")]


def test_help_loads_nothing_heavy() -> None:
    """Of any command: neither torch nor what Typer and Rich alone do not need."""
    code = (
        "import sys, typer\nfrom metadiff_cli.app import app, run\n"
        "def lines(command, words):\n"
        "    yield words\n"
        "    for name, inner in getattr(command, 'commands', {}).items():\n"
        "        yield from lines(inner, [*words, name])\n"
        "for words in lines(typer.main.get_command(app), []):\n"
        "    assert run([*words, '--help']) == 0\n"
        "    heavy = {'torch', 'numpy', 'PIL', 'pydantic', 'yaml', 'jinja2', 'markdown_it', 'pygments'}\n"
        "    heavy &= set(sys.modules)\n"
        "    assert not heavy, (words, heavy)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Usage") > 20 and done.stderr == ""


def test_the_package_itself_loads_next_to_nothing() -> None:
    code = (
        "import sys, metadiff_cli\nassert metadiff_cli.__version__\n"
        "heavy = {'torch', 'numpy', 'PIL', 'pydantic', 'typer', 'rich'} & set(sys.modules)\nassert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_python_class_is_there_when_it_is_asked_for() -> None:
    import metadiff_cli

    assert metadiff_cli.FewShotClassifier.__module__ == "metadiff_cli.api"
    with pytest.raises(AttributeError, match="Nonsense"):
        metadiff_cli.Nonsense  # noqa: B018


def test_the_table_of_exit_codes_is_that_of_the_errors_and_of_the_readme() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and hasattr(kind, "exit_code")]
    assert len(kinds) >= 6 and {kind.exit_code for kind in kinds} <= set(errors.EXIT_CODES)
    assert {errors.Stopped(number).exit_code for number in (2, 15)} == {130, 143}
    written = ", ".join(f"{code} {what}" for code, what in errors.EXIT_CODES.items())
    assert written in " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())


def test_version() -> None:
    assert invoke("--version").out.strip() == f"metadiff {__version__}"
    done = subprocess.run([sys.executable, "-m", "metadiff_cli", "--version"], capture_output=True, text=True)
    assert done.stdout.strip() == f"metadiff {__version__}"


def test_presets_list_show_copy(tmp_path: Path) -> None:
    listed = invoke("presets", "list")
    assert listed.code == 0 and all(name in listed.out for name in preset_names())
    shown = invoke("presets", "show", "glyphs-5w1s")
    assert shown.out.startswith("# metadiff metatrain --preset glyphs-5w1s")
    copy = tmp_path / "mine.yaml"
    assert invoke("presets", "copy", "glyphs-5w1s", copy).code == 0
    assert copy.read_text() == shown.out
    assert invoke("presets", "copy", "glyphs-5w1s", copy).code == 2
    assert invoke("presets", "show", "nonsense").code == 2


def test_the_changelog_knows_this_version() -> None:
    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_no_cells_of_the_core_draw() -> None:
    for path in [*(ROOT / "metadiff_cli" / "core").rglob("*.py"), *(ROOT / "metadiff_cli" / "data").rglob("*.py")]:
        assert not re.search(
            r"^\s*(print\(|import (rich|typer)|from (rich|typer))", path.read_text(encoding="utf-8"), re.M
        ), path


def test_the_table_of_presets_is_current() -> None:
    text = (ROOT / "docs" / "train.md").read_text(encoding="utf-8")
    for name in preset_names():
        values = read_preset(name)
        assert f"| `{name}` | {values['kind']} | {values['summary']} | {values['expect']} |" in text
