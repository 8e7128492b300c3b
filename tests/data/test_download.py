"""Known data sets into their places."""

from collections.abc import Callable
from pathlib import Path
from urllib.error import URLError

import pytest

from metadiff_cli.data import download as module
from metadiff_cli.data.benchmarks import split_lists
from metadiff_cli.data.download import prepare
from metadiff_cli.data.known import KNOWN, known
from metadiff_cli.errors import ConfigError, DataError
from tests.worlds import Result, paint, tar_of, zip_of

CLI = Callable[..., Result]


@pytest.fixture
def birds(tmp_path: Path) -> Path:
    """An archive as the one of CUB, with two classes of each split."""
    paint(tmp_path / "bird.jpg", (200, 30, 90), seed=1)
    picture = (tmp_path / "bird.jpg").read_bytes()
    names = [name for split in split_lists("cub").values() for name in split[:2]]
    files = {f"CUB_200_2011/images/{name}/1.jpg": picture for name in names}
    return tar_of(tmp_path / "CUB_200_2011.tgz", {**files, "attributes.txt": b"x"})


def test_every_known_layout_can_be_opened_and_the_reverse() -> None:
    from metadiff_cli.data.benchmarks import LAYOUTS

    assert set(KNOWN) == {*LAYOUTS, "glyphs"}
    assert all(data.licence and data.home and (data.archives or data.name == "glyphs") for data in KNOWN.values())


def test_from_an_archive(tmp_path: Path, birds: Path) -> None:
    dataset = prepare(known("cub"), tmp_path / "root", [birds])
    assert {name: len(split.classes) for name, split in dataset.splits.items()} == {"train": 2, "val": 2, "test": 2}
    assert [p.name for p in (tmp_path / "root").iterdir()] == ["cub"]  # nothing temporary is left
    again = prepare(known("cub"), tmp_path / "root", [])
    assert again.splits.keys() == dataset.splits.keys()


def test_a_folder_around_the_data_set_is_taken_off(tmp_path: Path) -> None:
    names = [name for split in split_lists("mini-imagenet").values() for name in split[:2]]
    archive = zip_of(tmp_path / "x.zip", {f"download/mini/{name}/1.png": b"x" for name in names})
    prepare(known("mini-imagenet"), tmp_path, [archive])
    assert {p.name for p in (tmp_path / "mini-imagenet").iterdir()} == set(names)


def test_the_wrong_archive_leaves_nothing(tmp_path: Path) -> None:
    archive = zip_of(tmp_path / "x.zip", {"a/1.png": b"x", "b/1.png": b"x"})
    with pytest.raises(DataError, match="not cub"):
        prepare(known("cub"), tmp_path / "root", [archive])
    assert list((tmp_path / "root").iterdir()) == []


def test_other_things_in_the_place_are_kept(tmp_path: Path, birds: Path) -> None:
    (tmp_path / "cub").mkdir()
    (tmp_path / "cub" / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="something else"):
        prepare(known("cub"), tmp_path, [birds])
    assert (tmp_path / "cub" / "mine.txt").read_text() == "mine"


FAILURES = [URLError("no network"), RuntimeError("File not found or corrupted."), OSError(28, "No space left")]


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("name", ["omniglot", "cifar-fs"])
def test_a_failed_download_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, failure: Exception
) -> None:
    def fail(work: Path) -> None:
        (work / "half.zip").write_bytes(b"x")
        print("noise")
        raise failure

    urls, _ = module.DOWNLOADS[name]
    monkeypatch.setitem(module.DOWNLOADS, name, (urls, fail))
    with pytest.raises(DataError, match="could not be downloaded") as caught:
        prepare(known(name), tmp_path, [])
    hint = str(caught.value.hint)
    assert "https://" in hint and f"metadiff data prepare {name} --root {tmp_path} --from-archive" in hint
    assert list(tmp_path.iterdir()) == []


def test_a_download_is_checked_and_laid_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = split_lists("omniglot")["train"]["background"]
    alphabet, characters = next(iter(parts.items()))

    def fetch(work: Path) -> None:
        paint(work / "omniglot-py" / "images_background" / alphabet / characters[0] / "1.png", (0, 0, 0), seed=1)
        (work / "omniglot-py" / "images_background.zip").write_bytes(b"x")

    urls, _ = module.DOWNLOADS["omniglot"]
    monkeypatch.setitem(module.DOWNLOADS, "omniglot", (urls, fetch))
    dataset = prepare(known("omniglot"), tmp_path, [])
    assert dataset.splits["train"].classes == (f"{alphabet}/{characters[0]}",)
    assert not list(tmp_path.rglob("*.zip"))


def test_what_cannot_be_downloaded_says_where_to_ask(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"image-net\.org") as caught:
        prepare(known("tiered-imagenet"), tmp_path, [])
    assert "--from-archive" in str(caught.value.hint)


@pytest.mark.parametrize(("name", "word"), [("omniglt", "did you mean 'omniglot'"), ("cifar-100", "cifar-fs or fc100")])
def test_unknown_names_have_a_suggestion(name: str, word: str) -> None:
    with pytest.raises(ConfigError) as caught:
        known(name)
    assert word in str(caught.value.hint)


def test_a_root_that_cannot_be_made(tmp_path: Path, birds: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="cannot be written to"):
        prepare(known("cub"), tmp_path / "file", [birds])


def test_the_command(cli: CLI, tmp_path: Path, birds: Path) -> None:
    result = cli("data", "prepare", "cub", "--root", tmp_path / "r", "--from-archive", birds)
    assert result.code == 0, result.err
    assert "cub" in result.out and "train 2 classes and 2 images" in result.out
    assert "194 of the 200 classes" in result.err
    assert cli("data", "prepare", "glyphs").code == 0
    missing = cli("data", "prepare", "cub", "--from-archive", tmp_path / "no.tgz")
    assert missing.code == 3 and "no.tgz" in missing.err
