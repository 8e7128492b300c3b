"""`adapt`: what a person with a folder of photos meets."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from metadiff_cli.__main__ import main
from metadiff_cli.app import run
from metadiff_cli.core.checkpoints.file import load_checkpoint, save_checkpoint
from metadiff_cli.data import images
from tests.processes import settings
from tests.worlds import COLOURS, Result, paint

CLI = Callable[..., Result]


def adapt_json(cli: CLI, photos: Path, checkpoint: Path, *extra: str | Path) -> dict[str, Any]:
    result = cli("adapt", "--support", photos / "support", "--query", photos / "query", "--checkpoint", checkpoint,
                 "--json", *extra)  # fmt: skip
    assert result.code == 0, result.err
    document: dict[str, Any] = json.loads(result.out)
    return document


def labels(document: dict[str, Any]) -> dict[str, str]:
    return {p["path"]: p["label"] for p in document["predictions"]}


def test_json_has_the_fields_of_the_design(cli: CLI, photos: Path, checkpoint: Path) -> None:
    document = adapt_json(cli, photos, checkpoint, "--top-k", "2")
    assert document["schema"] == "metadiff.adapt/1"
    assert document["classes"] == sorted(COLOURS)
    assert document["support"] == {"blue": 3, "green": 2, "grey": 4, "red": 1}  # unequal counts, one image in a class
    assert document["errors"] == [] and document["seed"] == 0 and document["checkpoint"] == str(checkpoint)
    assert [p["path"] for p in document["predictions"]] == sorted(str(p) for p in (photos / "query").iterdir())
    for p in document["predictions"]:
        assert len(p["top"]) == 2 and p["top"][0]["label"] == p["label"] and not p["rejected"]
        assert 0 < p["confidence"] <= 1 and p["top"][0]["confidence"] >= p["top"][1]["confidence"]


def test_workers_and_batches_do_not_change_the_result(cli: CLI, photos: Path, checkpoint: Path) -> None:
    once = adapt_json(cli, photos, checkpoint, "--num-workers", "1")
    assert adapt_json(cli, photos, checkpoint, "--num-workers", "5") == once
    alone = adapt_json(cli, photos, checkpoint, "--batch-size", "1")
    assert labels(alone) == labels(once)
    for p, q in zip(once["predictions"], alone["predictions"], strict=True):
        assert p["confidence"] == pytest.approx(q["confidence"], abs=1e-4)


def test_an_encoder_that_gives_no_numbers_is_an_error(cli: CLI, photos: Path, checkpoint: Path, tmp_path: Path) -> None:
    kept = load_checkpoint(checkpoint)
    broken = {n: t * float("nan") if n == "encoder.blocks.0.conv.weight" else t for n, t in kept.tensors.items()}
    save_checkpoint(tmp_path / "broken.safetensors", kept.kind, broken, kept.header)
    result = cli("adapt", "--support", photos / "support", "--query", photos / "query", "--checkpoint",
                 tmp_path / "broken.safetensors", "--json")  # fmt: skip
    assert result.code == 3 and "not finite" in result.err and result.out == ""


def test_flat_colours_are_told_apart(cli: CLI, photos: Path, checkpoint: Path) -> None:
    found = labels(adapt_json(cli, photos, checkpoint))
    right = sum(Path(path).stem == label for path, label in found.items())
    assert right >= 3  # an encoder of glyphs, trained for seconds, sees noise and brightness at least


def test_query_images_do_not_change_one_another(cli: CLI, photos: Path, checkpoint: Path) -> None:
    together = adapt_json(cli, photos, checkpoint)["predictions"]
    alone = cli("adapt", "--support", photos / "support", "--query", photos / "query" / "red.png", "--checkpoint",
                checkpoint, "--json")  # fmt: skip
    (single,) = json.loads(alone.out)["predictions"]
    (same,) = [p for p in together if p["path"].endswith("red.png")]
    assert single["label"] == same["label"]
    assert single["confidence"] == pytest.approx(same["confidence"], abs=1e-4)


def test_names_of_classes_do_not_matter(cli: CLI, photos: Path, checkpoint: Path) -> None:
    """Renaming permutes the classes; with tau = 0 only the names change."""
    before = labels(adapt_json(cli, photos, checkpoint))
    renamed = {"blue": "z 🐟", "green": "ä", "grey": "лес", "red": "[bold]"}
    for old, new in renamed.items():
        (photos / "support" / old).rename(photos / "support" / new)
    after = labels(adapt_json(cli, photos, checkpoint))
    assert after == {path: renamed[label] for path, label in before.items()}


@pytest.mark.parametrize("extra", [["--steps", "1"], ["--steps", "1000"], ["--guidance", "4"],
                                   ["--samples", "3", "--temperature", "1", "--steps", "20"],
                                   ["--set", "sampler.method=ddpm", "--temperature", "1"]])  # fmt: skip
def test_samplers(cli: CLI, photos: Path, checkpoint: Path, extra: list[str]) -> None:
    assert len(adapt_json(cli, photos, checkpoint, *extra)["predictions"]) == 4


def test_draws_follow_the_seed(cli: CLI, photos: Path, checkpoint: Path) -> None:
    draw = ["--temperature", "1", "--samples", "2"]
    first, again = (adapt_json(cli, photos, checkpoint, *draw, "--seed", "3") for _ in range(2))
    other = adapt_json(cli, photos, checkpoint, *draw, "--seed", "4")
    assert first["predictions"] == again["predictions"]
    assert first["predictions"] != other["predictions"]


def test_csv_and_jsonl(cli: CLI, photos: Path, checkpoint: Path) -> None:
    (photos / "query" / "broken.png").write_bytes(b"no image")
    common = ["adapt", "-S", photos / "support", "-Q", photos / "query", "-c", checkpoint]
    rows = list(csv.reader(io.StringIO(cli(*common, "--format", "csv").out)))
    assert rows[0] == ["path", "label", "confidence", "rejected", "error"] and len(rows) == 6
    broken = next(row for row in rows if row[0].endswith("broken.png"))
    assert broken[1:4] == ["", "", ""] and broken[4]
    lines = [json.loads(line) for line in cli(*common, "--format", "jsonl").out.splitlines()]
    assert len(lines) == 5 and sum("error" in line for line in lines) == 1


def test_table_shows_odd_names_as_they_are(cli: CLI, photos: Path, checkpoint: Path) -> None:
    (photos / "query" / "red.png").rename(photos / "query" / "[red] x.png")
    result = cli("adapt", "-S", photos / "support", "-Q", photos / "query", "-c", checkpoint)
    assert result.code == 0 and "[red] x.png" in result.out and "\x1b" not in result.out


def test_rejection(cli: CLI, photos: Path, checkpoint: Path) -> None:
    document = adapt_json(cli, photos, checkpoint, "--reject-below", "1")
    assert all(p["rejected"] and p["label"] is None for p in document["predictions"])
    table = cli("adapt", "-S", photos / "support", "-Q", photos / "query", "-c", checkpoint, "--reject-below", "1")
    (row,) = [line for line in table.out.splitlines() if "red.png" in line]
    assert "(rejected)" in row and "red " in row.partition("%")[2]  # what it would have been comes first


def test_broken_and_missing_queries_are_listed(cli: CLI, photos: Path, checkpoint: Path) -> None:
    (photos / "query" / "broken.jpg").write_bytes(b"\xff\xd8\xff nothing")
    (photos / "query" / "notes.txt").write_text("not an image")
    document = adapt_json(cli, photos, checkpoint, "--query", photos / "absent.png")
    assert len(document["predictions"]) == 4
    assert {Path(e["path"]).name for e in document["errors"]} == {"broken.jpg", "absent.png"}
    assert all(e["reason"] for e in document["errors"])


def test_a_broken_support_image_is_left_out_and_listed(cli: CLI, photos: Path, checkpoint: Path) -> None:
    (photos / "support" / "blue" / "broken.png").write_bytes(b"no image")
    document = adapt_json(cli, photos, checkpoint)
    assert document["support"]["blue"] == 3
    assert [Path(e["path"]).name for e in document["errors"]] == ["broken.png"]


def test_nothing_predicted_is_exit_code_3(cli: CLI, photos: Path, checkpoint: Path) -> None:
    bad = photos / "bad.png"
    bad.write_bytes(b"no image")
    result = cli("adapt", "-S", photos / "support", "-Q", bad, "-c", checkpoint, "--json")
    assert result.code == 3 and json.loads(result.out)["errors"][0]["path"] == str(bad)


def test_query_from_stdin_and_glob(cli: CLI, photos: Path, checkpoint: Path) -> None:
    common = ["adapt", "-S", photos / "support", "-c", checkpoint, "--json", "-Q"]
    paths = "".join(f"{p}\n" for p in sorted((photos / "query").iterdir()))
    from_stdin = json.loads(cli(*common, "-", stdin=paths).out)
    from_glob = json.loads(cli(*common, photos / "query" / "*.png").out)
    assert from_stdin["predictions"] == from_glob["predictions"] and len(from_glob["predictions"]) == 4


def test_a_query_that_is_in_the_support_is_named(cli: CLI, photos: Path, checkpoint: Path) -> None:
    shutil.copy(photos / "support" / "red" / "0.png", photos / "query" / "twin.png")
    result = cli("adapt", "-S", photos / "support", "-Q", photos / "query", "-c", checkpoint, "--json")
    assert result.code == 0 and "twin.png is also in the support" in result.err


def test_save_and_use_a_classifier(cli: CLI, photos: Path, checkpoint: Path) -> None:
    file = photos / "colours.safetensors"
    direct = adapt_json(cli, photos, checkpoint, "--save", file)
    common = ["adapt", "--classifier", file, "--query", photos / "query", "--json"]
    loaded = json.loads(cli(*common).out)
    assert loaded["predictions"] == direct["predictions"]
    refused = cli("adapt", "-S", photos / "support", "-Q", photos / "query", "-c", checkpoint, "--save", file)
    assert refused.code == 2 and "--overwrite" in refused.err


@pytest.mark.parametrize("flag", ["--transductive", "--unlabeled"])
def test_unlabelled_images_guide_and_it_is_said(cli: CLI, photos: Path, checkpoint: Path, flag: str) -> None:
    extra = [flag] if flag == "--transductive" else [flag, photos / "query"]
    document = adapt_json(cli, photos, checkpoint, *extra)
    assert document["protocol"] == "transductive" and len(document["predictions"]) == 4


def test_two_classes_with_one_image_each(cli: CLI, tmp_path: Path, checkpoint: Path) -> None:
    for name in ("red", "blue"):
        paint(tmp_path / "support" / name / "1.png", COLOURS[name], seed=1)
    paint(tmp_path / "query" / "q.png", COLOURS["red"], seed=2)
    assert len(adapt_json(cli, tmp_path, checkpoint)["predictions"]) == 1


def run_adapt(cli: CLI, *arguments: str | Path) -> dict[str, Any]:
    """`adapt --json`, which must succeed."""
    result = cli("adapt", "--json", *arguments)
    assert result.code == 0, result.err
    document: dict[str, Any] = json.loads(result.out)
    return document


def class_folders(photos: Path) -> Path:
    """The query images, two of each colour, in nested folders of their class."""
    for c, (name, colour) in enumerate(COLOURS.items()):
        for i in range(2):
            paint(photos / "labelled" / name / "deep" / f"{i}.png", colour, seed=2000 + 10 * c + i)
    return photos / "labelled"


def close(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """The same labels in the same order, and confidences that differ by rounding at most."""
    pairs = list(zip(first["predictions"], second["predictions"], strict=True))
    return all(a["path"] == b["path"] and a["label"] == b["label"] for a, b in pairs) and all(
        a["confidence"] == pytest.approx(b["confidence"], abs=1e-4) for a, b in pairs
    )


@pytest.mark.parametrize("pooled", [False, True])
def test_a_saved_classifier_grows_as_if_all_had_been_given_at_once(
    cli: CLI, photos: Path, checkpoint: Path, pooled: bool
) -> None:
    """A class comes as a whole, another one in two parts; the pool stays, without what is labelled by now."""
    query = photos / "query"
    extra = ["--unlabeled", query] if pooled else []
    at_once = run_adapt(cli, "-S", photos / "support", "-Q", query, "-c", checkpoint, *extra)
    for name in ("later/grey", "later/blue"):
        (photos / name).mkdir(parents=True)
    (photos / "support" / "grey").rename(photos / "later" / "grey")
    (photos / "support" / "blue" / "1.png").rename(photos / "later" / "blue" / "1.png")
    first, second = photos / "1.safetensors", photos / "2.safetensors"
    run_adapt(cli, "-S", photos / "support", "-Q", query, "-c", checkpoint, "--save", first, *extra)
    grown = run_adapt(cli, "--classifier", first, "-S", photos / "later", "-Q", query, "--save", second)
    assert grown["support"] == at_once["support"] and grown["classes"] == at_once["classes"]
    assert close(grown, at_once) and grown["protocol"] == at_once["protocol"]
    assert close(run_adapt(cli, "--classifier", second, "-Q", query), at_once)


def test_one_more_class_is_enough_to_add(cli: CLI, photos: Path, checkpoint: Path) -> None:
    file = photos / "c.safetensors"
    run_adapt(cli, "-S", photos / "support", "-Q", photos / "query", "-c", checkpoint, "--save", file)
    paint(photos / "more" / "white" / "1.png", (250, 250, 250), seed=1)
    shutil.copytree(photos / "support" / "red", photos / "more" / "red")  # known by their pixels, and counted once
    document = run_adapt(cli, "--classifier", file, "-S", photos / "more", "-Q", photos / "query")
    assert document["support"] == {"blue": 3, "green": 2, "grey": 4, "red": 1, "white": 1}


def test_a_saved_classifier_tells_no_places(cli: CLI, photos: Path, checkpoint: Path) -> None:
    file = photos / "c.safetensors"
    run_adapt(cli, "-S", photos / "support", "-Q", photos / "query", "-c", checkpoint, "--save", file)
    assert str(photos).encode() not in file.read_bytes()


def test_a_damaged_classifier_is_refused(cli: CLI, photos: Path, checkpoint: Path) -> None:
    file = photos / "c.safetensors"
    run_adapt(cli, "-S", photos / "support", "-Q", photos / "query", "-c", checkpoint, "--save", file)
    whole = load_checkpoint(file)
    tensors = {**whole.tensors, "support.labels": whole.tensors["support.labels"] * 0}
    save_checkpoint(file, "classifier", tensors, whole.header)
    result = cli("adapt", "--classifier", file, "-Q", photos / "query")
    assert result.code == 4 and "c.safetensors" in result.err and "labels" in result.err


def test_labelled_queries_are_scored(cli: CLI, photos: Path, checkpoint: Path) -> None:
    folder = class_folders(photos)
    paint(folder / "stranger" / "1.png", (255, 255, 0), seed=5)
    common = ["adapt", "-S", photos / "support", "-Q", folder, "-c", checkpoint, "--labelled"]
    document = json.loads(cli(*common, "--json").out)
    score, predictions = document["labelled"], document["predictions"]
    correct = sum(p["label"] == p["truth"] for p in predictions)
    assert {p["truth"] for p in predictions} == {*COLOURS, "stranger"}
    assert (score["images"], score["correct"], score["accuracy"]) == (8, correct, round(100 * correct / 8, 4))
    assert score["other_classes"]["classes"] == ["stranger"] and sum(map(sum, score["confusion"]["matrix"])) == 9
    table = cli(*common)
    assert "confusion matrix" in table.out and "of 8 images" in table.err and "stranger" in table.err


def test_labelled_without_labels_is_refused(cli: CLI, photos: Path, checkpoint: Path) -> None:
    result = cli("adapt", "-S", photos / "support", "-Q", photos / "query", "-c", checkpoint, "--labelled")
    assert result.code == 3 and "class folders" in result.err
    gone = cli("adapt", "-S", photos / "support", "-Q", photos / "nosuch", "-c", checkpoint, "--labelled")
    assert gone.code == 3 and "nosuch does not exist" in gone.err


def test_what_cannot_be_done_is_said_before_anything_is_read(cli: CLI, photos: Path, checkpoint: Path) -> None:
    common = ["adapt", "-S", photos / "support", "-Q", photos / "query", "-c", checkpoint]
    (photos / "file").touch()
    for extra, code, words in (
        (["--save", photos / "file" / "x.safetensors"], 2, "file is not a folder"),
        (["--save", "/"], 2, "exists already"),
        (["-0"], 2, "--query -"),
        (["--unlabeled", photos / "nosuch"], 3, "nosuch does not exist"),
    ):
        result = cli(*common, *extra)
        assert result.code == code and words in result.err and result.out == ""


def test_a_class_of_photos_that_nothing_here_decodes_says_what_is_missing(
    cli: CLI, photos: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "_formats", lambda: ["PNG", "JPEG"])
    for path in (photos / "support" / "red").iterdir():
        path.write_bytes(b"\x00\x00\x00\x1cftypheic" + bytes(100))
    result = cli("adapt", "-S", photos / "support", "-Q", photos / "query", "-c", checkpoint)
    assert result.code == 3 and "class 'red'" in result.err and "pip install pillow-heif" in result.err


def test_support_and_query_as_listings(cli: CLI, photos: Path, checkpoint: Path) -> None:
    folder = class_folders(photos)
    for name, root in (("s.csv", photos / "support"), ("q.csv", folder)):
        lines = [f"{p.relative_to(photos)},{p.relative_to(root).parts[0]}" for p in sorted(root.rglob("*.png"))]
        (photos / name).write_text("\n".join(["path,label", *lines]))
    plain = run_adapt(cli, "-S", photos / "support", "-Q", folder, "-c", checkpoint, "--labelled")
    listed = run_adapt(cli, "-S", photos / "s.csv", "-Q", photos / "q.csv", "-c", checkpoint, "--labelled")
    assert listed["support"] == plain["support"] and listed["labelled"] == plain["labelled"] and close(listed, plain)


def test_sort_into_copies_by_label_and_rejects_apart(cli: CLI, photos: Path, checkpoint: Path) -> None:
    out = photos / "out"
    common = ["-S", photos / "support", "-Q", photos / "query", "-c", checkpoint, "--sort-into", out]
    document = run_adapt(cli, *common)
    for p in document["predictions"]:
        assert Path(p["sorted_to"]) == out / p["label"] / Path(p["path"]).name
        assert Path(p["sorted_to"]).read_bytes() == Path(p["path"]).read_bytes()
    again = cli("adapt", *common)
    assert again.code == 0 and "0 images copied" in again.err and "a copy was there already: 4 images" in again.err
    run_adapt(cli, *common, "--reject-below", "1", "--move")
    assert len(list((out / "_rejected").iterdir())) == 4 and not list((photos / "query").iterdir())


@pytest.mark.parametrize(
    ("extra", "word"), [(["--move"], "--sort-into"), (["--sort-into", "support/red"], "inside the support")]
)
def test_sorting_that_makes_no_sense_is_refused(
    cli: CLI, photos: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, extra: list[str], word: str
) -> None:
    monkeypatch.chdir(photos)
    result = cli("adapt", "-S", "support", "-Q", "query", "-c", checkpoint, *extra)
    assert result.code == 2 and word in result.err and "try:" in result.err


def test_strict_turns_any_error_into_exit_code_3(cli: CLI, photos: Path, checkpoint: Path) -> None:
    (photos / "query" / "broken.png").write_bytes(b"no image")
    common = ["adapt", "-S", photos / "support", "-Q", photos / "query", "-c", checkpoint, "--format", "csv"]
    lenient, strict = cli(*common), cli(*common, "--strict")
    assert (lenient.code, strict.code) == (0, 3) and strict.out == lenient.out
    assert lenient.err.rstrip().splitlines()[-1].startswith("warning: ") and "broken.png" in lenient.err


def test_a_picture_that_is_twice_in_the_support(cli: CLI, photos: Path, checkpoint: Path) -> None:
    shutil.copy(photos / "support" / "blue" / "0.png", photos / "support" / "blue" / "copy.png")
    common = ["adapt", "-S", photos / "support", "-Q", photos / "query", "-c", checkpoint, "--json"]
    result = cli(*common)
    assert json.loads(result.out)["support"]["blue"] == 3 and "copy.png is the same picture" in result.err
    shutil.copy(photos / "support" / "blue" / "0.png", photos / "support" / "red" / "copy.png")
    torn = cli(*common)
    assert torn.code == 3 and "two classes" in torn.err and "red/copy.png" in torn.err


def test_the_support_is_checked(cli: CLI, photos: Path, checkpoint: Path) -> None:
    (photos / "support" / "green" / "1.png").unlink()
    result = cli("adapt", "-S", photos / "support", "-Q", photos / "query", "-c", checkpoint, "--json")
    check = json.loads(result.out)["support_check"]
    assert check["images"] == 7 and 0 <= check["accuracy"] <= 100  # red and green have one image each
    assert f"estimated accuracy {check['accuracy']:.0f} %" in result.err
    for name in ("blue", "grey"):
        for path in sorted((photos / "support" / name).iterdir())[1:]:
            path.unlink()
    assert adapt_json(cli, photos, checkpoint)["support_check"] is None


def test_transductive_with_nothing_to_read_is_a_plain_failure(cli: CLI, photos: Path, checkpoint: Path) -> None:
    bad = photos / "bad.png"
    bad.write_bytes(b"no image")
    result = cli("adapt", "-S", photos / "support", "-Q", bad, "-c", checkpoint, "--json", "--transductive")
    assert result.code == 3 and json.loads(result.out)["protocol"] == "inductive"


def test_a_bar_on_stderr_takes_nothing_from_stdout(
    photos: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rich's bars redirect stdout unless they are told not to."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out, err = io.StringIO(), Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    arguments = ["adapt", "-S", photos / "support", "-Q", photos / "query", "-c", checkpoint, "--format", "csv",
                 "--batch-size", "1"]  # fmt: skip
    assert run([str(a) for a in arguments]) == 0
    assert len(out.getvalue().splitlines()) == 5 and "predicting" in err.getvalue()


def test_names_that_are_no_text(photos: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stdout escapes what has no encoding, which JSON reads back to the same name."""
    odd = os.fsencode(photos / "query") + b"/caf\xe9.png"
    try:
        os.rename(photos / "query" / "red.png", odd)
    except OSError:
        pytest.skip("this file system takes names in UTF-8 only")
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding="utf-8")
    arguments = ["adapt", "-S", photos / "support", "-Q", photos / "query", "-c", checkpoint, "--json",
                 "--sort-into", photos / "out"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["metadiff", *(str(a) for a in arguments)])
    monkeypatch.setattr(sys, "stdout", out)
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 0
    out.flush()
    found = json.loads(raw.getvalue().decode("utf-8"))["predictions"]
    assert odd in [os.fsencode(p["path"]) for p in found]


def test_the_report_is_a_page_that_loads_nothing(photos: Path, checkpoint: Path, cli: CLI) -> None:
    page = photos / "report.html"
    result = cli(
        "adapt", "-S", photos / "support", "-Q", photos / "query", "-c", checkpoint, "--report", page, "--json"
    )
    assert result.code == 0 and f"report written: {page}" in result.err
    text = page.read_text(encoding="utf-8")
    assert "Content-Security-Policy" in text and "http://" not in text and "https://" not in text
    assert text.count("data:image/") == 10 + 4  # every support and query image once
    assert all(p["path"].rsplit("/")[-1] in text for p in json.loads(result.out)["predictions"])


def test_the_report_finds_pictures_that_were_moved(photos: Path, checkpoint: Path, cli: CLI) -> None:
    page, out = photos / "report.html", photos / "out"
    result = cli("adapt", "-S", photos / "support", "-Q", photos / "query", "-c", checkpoint, "--report", page,
                 "--sort-into", out, "--move")  # fmt: skip
    assert result.code == 0 and len(list(out.rglob("*.png"))) == 4
    assert page.read_text(encoding="utf-8").count("data:image/") == 10 + 4


@pytest.mark.parametrize(
    ("streams", "query", "code", "out", "err"),
    [
        ("<&-", "-", 3, "", "standard input is closed"),
        (">&-", "query", 1, "", "standard output is closed"),
        ("2>&-", "query", 0, "path,label", ""),
        (">/dev/full", "query", 1, "", "No space left on device"),
    ],
)
def test_streams_that_are_closed_or_full(
    photos: Path, checkpoint: Path, streams: str, query: str, code: int, out: str, err: str
) -> None:
    line = f'"$0" -m metadiff_cli adapt -S support -c "$1" -f csv -Q {query} {streams}'
    done = subprocess.run(
        ["bash", "-c", line, sys.executable, str(checkpoint)], cwd=photos, text=True, capture_output=True,
        env={**os.environ, **settings()},
    )  # fmt: skip
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    assert done.stdout.startswith(out) and bool(done.stdout) == bool(out) and err in done.stderr


def test_the_signature_loads_nothing_heavy() -> None:
    code = (
        "import sys, metadiff_cli.commands.adapt.command\n"
        "found = {'torch', 'numpy', 'PIL', 'pydantic', 'yaml', 'jinja2', 'platformdirs'} & set(sys.modules)\n"
        "assert not found, found"
    )
    environ = {**os.environ, **settings()}
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, env=environ)
    assert done.returncode == 0, done.stderr
