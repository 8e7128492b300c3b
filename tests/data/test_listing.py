"""CSV files of paths and labels."""

from pathlib import Path

import pytest

from metadiff_cli.data.listing import is_listing, open_labelled, read_listing
from metadiff_cli.data.scan import Scan
from metadiff_cli.errors import DataError


def written(folder: Path, text: str, name: str = "list.csv") -> Path:
    file = folder / name
    file.write_bytes(text.encode())
    return file


@pytest.mark.parametrize(
    "text",
    [
        'path,label\nx/1.jpg,cat\n"y, 2.jpg",dog\n',
        '\ufeffPath;Label\r\nx/1.jpg;cat\r\n"y, 2.jpg";dog\r\n\r\n',
        "label\tpath\ncat\tx/1.jpg\ndog\ty, 2.jpg\n",
        "sep=;\r\npath;label\r\nx/1.jpg;cat\r\ny, 2.jpg;dog\r\n",
        'label, path\ncat, x/1.jpg\ndog, "y, 2.jpg"\n',
    ],
    ids=["plain", "from a spreadsheet", "tabs, other order", "with Excel's separator", "blanks after commas"],
)
def test_paths_are_relative_to_the_file(tmp_path: Path, text: str) -> None:
    split = open_labelled(written(tmp_path, text))
    assert split.classes == ("cat", "dog") and split.labels == (0, 1)
    assert split.paths == (str(tmp_path / "x" / "1.jpg"), str(tmp_path / "y, 2.jpg"))


def test_absolute_paths_stay_and_labels_may_be_missing(tmp_path: Path) -> None:
    rows = read_listing(written(tmp_path, "path\n/photos/1.jpg\n2.jpg\n"))
    assert [(row.path, row.label) for row in rows] == [("/photos/1.jpg", None), (str(tmp_path / "2.jpg"), None)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ("file,class\n1.jpg,cat\n", "no column 'path'; it has 'file', 'class'"),
        ("path,label\n", "lists no images"),
        ("path,label\n1.jpg,cat\n2.jpg,\n", "line 3: no label"),
        ("path,label\n,cat\n", "line 2: no path"),
        ("sep=,\npath,label\n1.jpg,cat\n2.jpg,\n", "line 4: no label"),
    ],
)
def test_what_is_wrong_is_said_with_the_line(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        open_labelled(written(tmp_path, text))
    assert "list.csv" in caught.value.message and caught.value.hint


def test_utf_16_has_a_mark_and_is_read(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_bytes("path,label\nä.jpg,für\n".encode("utf-16"))
    (row,) = read_listing(tmp_path / "list.csv")
    assert (row.path, row.label) == (str(tmp_path / "ä.jpg"), "für")


def test_other_encodings_are_refused(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_bytes("path,label\nä.jpg,für\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"list\.csv cannot be read"):
        read_listing(tmp_path / "list.csv")


def test_a_folder_is_no_listing(tmp_path: Path) -> None:
    (tmp_path / "photos.csv").mkdir()
    assert not is_listing(tmp_path / "photos.csv") and is_listing(written(tmp_path, "path\n", "a.CSV"))


def test_a_folder_with_split_folders_says_which_one_is_taken(tmp_path: Path) -> None:
    for name in ("train/cat/1.png", "test/cat/2.png", "train/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    scan = Scan()
    assert open_labelled(tmp_path, scan).paths == (str(tmp_path / "train" / "cat" / "1.png"),)
    assert "the classes of train are taken" in scan.notes[0]


@pytest.mark.parametrize("name", ["x" * 300, "gone", "photos.zip"])
def test_a_source_that_is_neither_is_an_error_with_the_next_step(tmp_path: Path, name: str) -> None:
    (tmp_path / "photos.zip").touch()
    with pytest.raises(DataError) as caught:
        open_labelled(tmp_path / name)
    assert name in caught.value.message and caught.value.hint
