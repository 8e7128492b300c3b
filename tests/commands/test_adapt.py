"""`adapt`: what a person with a folder of photos meets."""

import csv
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import COLOURS, Result, paint

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
