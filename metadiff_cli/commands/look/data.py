"""`metadiff data`: the known data sets, getting one, and a close look at any."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from metadiff_cli.console import Screen, counted
from metadiff_cli.data.benchmarks import KNOWN, known, open_dataset
from metadiff_cli.data.download import prepare as prepare_files
from metadiff_cli.data.folders import Dataset
from metadiff_cli.data.scan import left_out
from metadiff_cli.data.verify import Report
from metadiff_cli.data.verify import verify as verify_files
from metadiff_cli.errors import ConfigError, DataError
from metadiff_cli.files import data_dir

SHOWN = 10  # findings of one kind that are printed; --json has all of them


def show_known(screen: Screen, *, as_json: bool) -> None:
    """Print the known data sets and how to get each."""
    rows = [{**vars(data), "folder": str(data_dir(data.name)), "here": _is_here(data.name)} for data in KNOWN.values()]
    if as_json:
        screen.json({"schema": "metadiff.data-list/1", "data": rows})
        return
    cells = [(r["name"], f"{r['what']}\nlicence: {r['licence']}\n{r['home']}", _how(r)) for r in rows]
    screen.table("Data sets", ("name", "what, licence and source", "how to get it"), cells, left=3)
    screen.note("A folder of your own needs no name: give it with --data DIR. `metadiff data verify DIR` checks it.")


def prepare(name: str, root: Path | None, archives: Sequence[Path], screen: Screen, *, as_json: bool) -> None:
    """Put the data set `name` into `root`, else into the data folder.

    Raises ConfigError for an unknown name, and DataError when the data set cannot be had.
    """
    data = known(name)
    if name == "glyphs":
        return _glyphs(root, archives, screen, as_json=as_json)
    folder = root or data_dir(name).parent
    place = folder / name
    for archive in archives:
        if not archive.is_file():
            reason = "is not a file" if archive.exists() else "does not exist"
            raise DataError(f"archive {archive} {reason}", hint=f"give {data.archives}")
    if archives and place.is_dir() and any(place.iterdir()):
        raise ConfigError(
            f"{place} is there already, so --from-archive has no effect",
            hint="leave out --from-archive to check what is there, or give another --root",
        )
    if not archives and data.download:
        screen.note(f"getting {name} from {data.home}, unless it is there already (licence: {data.licence})")
    with screen.progress(f"unpacking {name}") as advance:
        dataset = prepare_files(data, folder, archives, advance)
    for note in dataset.notes:
        screen.warn(note)
    splits = {n: {"classes": len(s.classes), "images": len(s.labels)} for n, s in dataset.splits.items()}
    if as_json:
        screen.json({"schema": "metadiff.data-prepare/1", "name": name, "folder": str(place), "splits": splits})
        return
    counts = ", ".join(f"{n} {s['classes']} classes and {s['images']} images" for n, s in splits.items())
    screen.text(f"{name}: {place} ({counts})")


def _glyphs(root: Path | None, archives: Sequence[Path], screen: Screen, *, as_json: bool) -> None:
    """Say that glyphs need no preparation. Raises ConfigError for options that could only matter for other data."""
    if root is not None or archives:
        raise ConfigError("glyphs are drawn when they are needed", hint="leave out --root and --from-archive")
    if as_json:
        screen.json({"schema": "metadiff.data-prepare/1", "name": "glyphs", "folder": None, "splits": {}})
    else:
        screen.text("glyphs are drawn when they are needed: there is nothing to prepare")


def verify(folder: Path, layout: str, workers: int | None, screen: Screen, *, as_json: bool) -> None:
    """Print what is wrong with a data set. Raises DataError when an image or a whole class cannot be used."""
    with screen.progress("finding images") as advance:
        dataset = open_dataset(folder, layout=layout, keep_empty=True, progress=advance)
    with screen.progress("reading images") as advance:
        report = verify_files(dataset, workers=workers, progress=advance)
    if as_json:
        screen.json(_document(folder, dataset, report))
    else:
        _show(dataset, report, screen)
    if report.corrupt or report.empty:
        bad = [f"{counted(len(report.corrupt), 'image')} cannot be read"] if report.corrupt else []
        bad += [f"{counted(len(report.empty), 'class', 'classes')} without a readable image"] if report.empty else []
        raise DataError(f"{folder}: {', '.join(bad)}", hint="replace or remove the files and folders named above")


def _is_here(name: str) -> bool:
    return name == "glyphs" or data_dir(name).is_dir()


def _how(row: dict[str, Any]) -> str:
    if row["here"]:
        return "here" if row["name"] != "glyphs" else "drawn"
    return f"metadiff data prepare {row['name']}" + ("" if row["download"] else " --from-archive FILE")


def _document(folder: Path, dataset: Dataset, report: Report) -> dict[str, Any]:
    return {
        "schema": "metadiff.data-verify/1",
        "folder": str(folder),
        "layout": dataset.name,
        "notes": list(dataset.notes),
        "skipped_files": sum(dataset.skipped.values()),
        "skipped_extensions": dataset.skipped,
        "splits": report.counts,
        "corrupt": [{"path": path, "reason": reason} for path, reason in report.corrupt],
        "empty_classes": report.empty,
        "duplicates": {
            "within_class": report.within_class,
            "across_classes": report.across_classes,
            "across_splits": report.across_splits,
        },
        "odd": [{"path": path, "what": what} for path, what in report.odd],
    }


def _show(dataset: Dataset, report: Report, screen: Screen) -> None:
    for note in dataset.notes:
        screen.note(note)
    _show_counts(report, screen)
    _list("images that cannot be read", [f"{path}: {reason}" for path, reason in report.corrupt], screen)
    _list("classes without a readable image", report.empty, screen)
    _list("pictures in several splits (accuracies would be too good)", _groups(report.across_splits), screen)
    _list("pictures in several classes (their labels contradict)", _groups(report.across_classes), screen)
    _list("pictures that one class has more than once", _groups(report.within_class), screen)
    _list("odd images", [f"{path}: {what}" for path, what in report.odd], screen)
    if dataset.skipped:
        screen.text(left_out(dataset.skipped))


def _show_counts(report: Report, screen: Screen) -> None:
    """The numbers of images of each split, and the smallest classes."""
    rows = []
    for split, classes in report.counts.items():
        n = sorted(classes.values())
        rows.append((split, str(len(n)), str(sum(n)), str(n[0]), str(n[len(n) // 2]), str(n[-1])))
    columns = ("split", "classes", "images", "fewest per class", "median", "most")
    screen.table(f"{report.images} readable images", columns, rows)
    smallest = sorted((n, f"{split}/{cls}") for split, classes in report.counts.items() for cls, n in classes.items())
    if smallest[0][0] < smallest[-1][0]:
        screen.text("fewest images: " + ", ".join(f"{cls} {n}" for n, cls in smallest[:SHOWN]))


def _groups(groups: Iterable[Sequence[str]]) -> list[str]:
    return [" = ".join(group) for group in groups]


def _list(title: str, lines: Sequence[str], screen: Screen) -> None:
    """A title with the number of findings, and the first of them."""
    if not lines:
        return
    screen.text(f"{title}: {len(lines)}")
    for line in lines[:SHOWN]:
        screen.text(f"  {line}")
    if len(lines) > SHOWN:
        screen.text(f"  ... and {len(lines) - SHOWN} more (--json lists all)")
