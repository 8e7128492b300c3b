"""`metadiff data`: the known data sets, getting one, and looking closely at any."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from metadiff_cli.commands import completions, options
from metadiff_cli.console import Screen, counted
from metadiff_cli.errors import DataError
from metadiff_cli.files import data_dir

if TYPE_CHECKING:
    from metadiff_cli.data.folders import Dataset
    from metadiff_cli.data.verify import Report

GETTING, READING = "Getting it", "Reading"
app = typer.Typer(
    help="""List, prepare and verify data sets.

    A folder of your own needs no preparation: give it with --data DIR.

    Examples:

      metadiff data list

      metadiff data verify ./photos
    """,
    no_args_is_help=True,
)

SHOWN = 10  # findings of one kind that the table names; --json has all


@app.command("list")
def list_data(as_json: options.AsJson = False) -> None:
    """Show the known data sets.

    What they are, their licence, where they come from, what is here already.

    Examples:

      metadiff data list

      metadiff data list --json
    """
    from metadiff_cli.data.benchmarks import KNOWN

    screen = Screen()
    rows = [{**vars(data), "folder": str(data_dir(data.name)), "here": _is_here(data.name)} for data in KNOWN.values()]
    if as_json:
        screen.json({"schema": "metadiff.data-list/1", "data": rows})
        return
    cells = [(r["name"], r["what"], r["licence"], r["home"], _how(r)) for r in rows]
    screen.table("Data sets", ("name", "what", "licence", "from", "how to get it"), cells, left=5)
    screen.note("A folder of your own needs no name: give it with --data DIR; `metadiff data verify DIR` looks at it.")


@app.command("prepare")
def prepare(
    name: Annotated[
        str, typer.Argument(help="Name of the data set, as in `metadiff data list`.", autocompletion=completions.data)
    ],
    root: Annotated[
        Path | None,
        typer.Option(
            "--root",
            help=options.shown("Folder to put it in, as ROOT/NAME.", "$METADIFF_DATA_DIR"),
            metavar="ROOT",
            rich_help_panel=GETTING,
        ),
    ] = None,
    from_archive: Annotated[
        list[Path] | None,
        typer.Option(
            "--from-archive",
            help="Zip or tar file that you have, instead of a download; repeatable.",
            metavar="FILE",
            rich_help_panel=GETTING,
        ),
    ] = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Put a known data set where `--preset` finds it.

    By download where there is one, else from an archive that you have. What is
    there already is only checked.

    Examples:

      metadiff data prepare omniglot

      metadiff data prepare cub --root ~/data --from-archive CUB_200_2011.tgz
    """
    from metadiff_cli.data.benchmarks import known

    screen, data = Screen(quiet=quiet), known(name)
    if name == "glyphs":
        screen.note("glyphs are drawn when they are needed: nothing to prepare")
        return
    from metadiff_cli.data.download import prepare as prepare_data

    folder = (root or data_dir(name).parent).expanduser()
    archives = from_archive or []
    for archive in archives:
        if not archive.is_file():
            raise DataError(f"archive {archive} does not exist", hint=f"expected {data.archives}")
    if not archives and data.download:
        screen.note(f"getting {name} from {data.home}, unless it is there already (licence: {data.licence})")
    with screen.progress(f"unpacking {name}") as advance:
        dataset = prepare_data(data, folder, archives, advance)
    _tell(screen, name, folder / name, dataset, as_json)


@app.command("verify")
def verify(
    folder: Annotated[Path, typer.Argument(help="Folder of a data set.")],
    layout: Annotated[
        str,
        typer.Option("--layout", metavar="NAME", help="auto, folder, or a known data set.", rich_help_panel=READING),
    ] = "auto",
    num_workers: options.NumWorkers = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Read every image of a folder, and tell what is wrong.

    Counts per class and split, corrupt images, the same picture twice, tiny and
    odd ones. Leaves with 3 when an image or a whole class cannot be used;
    repeated and odd images are only reported.

    Examples:

      metadiff data verify ./photos

      metadiff data verify ./mini-imagenet --layout mini-imagenet --json
    """
    from metadiff_cli.data.benchmarks import open_dataset
    from metadiff_cli.data.verify import verify as verify_data

    screen = Screen(quiet=quiet)
    with screen.progress("finding images") as advance:
        dataset = open_dataset(folder, layout=layout, keep_empty=True, progress=advance)
    with screen.progress("reading images") as advance:
        report = verify_data(dataset, workers=num_workers, progress=advance)
    if as_json:
        screen.json(_document(folder, dataset, report))
    else:
        _show(screen, dataset, report)
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


def _tell(screen: Screen, name: str, place: Path, dataset: "Dataset", as_json: bool) -> None:
    splits = {n: {"classes": len(s.classes), "images": len(s.labels)} for n, s in dataset.splits.items()}
    for note in dataset.notes:
        screen.warn(note)
    if as_json:
        screen.json({"schema": "metadiff.data-prepare/1", "name": name, "folder": str(place), "splits": splits})
        return
    counts = ", ".join(f"{n} {s['classes']} classes and {s['images']} images" for n, s in splits.items())
    screen.text(f"{name}: {place} ({counts})")


def _document(folder: Path, dataset: "Dataset", report: "Report") -> dict[str, Any]:
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


def _show(screen: Screen, dataset: "Dataset", report: "Report") -> None:
    for note in dataset.notes:
        screen.note(note)
    rows = []
    for split, classes in report.counts.items():
        n = sorted(classes.values())
        rows.append((split, str(len(n)), str(sum(n)), str(n[0]), str(n[len(n) // 2]), str(n[-1])))
    title = f"{report.images} images that can be read"
    screen.table(title, ("split", "classes", "images", "fewest", "median", "most of a class"), rows)
    smallest = sorted((n, f"{split}/{cls}") for split, classes in report.counts.items() for cls, n in classes.items())
    if smallest[0][0] < smallest[-1][0]:
        screen.text("fewest images: " + ", ".join(f"{cls} {n}" for n, cls in smallest[:SHOWN]))
    _list(screen, "cannot be read", [f"{path}: {reason}" for path, reason in report.corrupt])
    _list(screen, "classes without a readable image", report.empty)
    _list(screen, "pictures in more than one split (accuracies would be too good)", _groups(report.across_splits))
    _list(screen, "pictures in more than one class (the labels contradict)", _groups(report.across_classes))
    _list(screen, "pictures more than once in a class", _groups(report.within_class))
    _list(screen, "odd images", [f"{path}: {what}" for path, what in report.odd])
    if dataset.skipped:
        from metadiff_cli.data.scan import left_out

        screen.text(left_out(dataset.skipped))


def _groups(groups: list[list[str]]) -> list[str]:
    return [" = ".join(group) for group in groups]


def _list(screen: Screen, title: str, lines: list[str]) -> None:
    if lines:
        screen.text(f"{title}: {len(lines)}")
        for line in lines[:SHOWN]:
            screen.text(f"  {line}")
        if len(lines) > SHOWN:
            screen.text(f"  ... and {len(lines) - SHOWN} more (--json names all)")
