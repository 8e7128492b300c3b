"""`adapt --classifier FILE.onnx`: the same answers as the saved classifier, without torch."""

import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from metadiff_cli.classify import exported
from metadiff_cli.core.encoders import session
from tests.processes import HEAVY, loaded_by
from tests.worlds import COLOURS, Page, Result, paint, validate

CLI = Callable[..., Result]
Graph = tuple[Path, dict[str, Any]]


@pytest.fixture
def queries(saved_classifier: Path, tmp_path: Path) -> Path:
    """Class folders: an image of each class, a support image, and a file that is no image."""
    for c, (name, colour) in enumerate(COLOURS.items()):
        paint(tmp_path / "q" / f"{name} ß" / "1.png", colour, seed=200 + c)
    shutil.copy(saved_classifier.parent / "support" / "red ß" / "1.png", tmp_path / "q" / "red ß" / "twin.png")
    (tmp_path / "q" / "red ß" / "x.jpg").write_bytes(b"no image")
    return tmp_path / "q"


def test_the_answers_are_those_of_the_saved_classifier(
    cli: CLI, saved_classifier: Path, graph: Graph, queries: Path
) -> None:
    def answers(file: Path) -> dict[str, Any]:
        more = ("--reject", "auto", "--labelled", "--top-k", "2", "--json")
        return validate(cli("adapt", "--classifier", file, "-Q", queries, *more), "metadiff.adapt/1")

    ours, theirs = answers(saved_classifier), answers(graph[0])
    assert theirs.pop("checkpoint") == str(graph[0]) and ours.pop("checkpoint") == str(saved_classifier)
    for mine, other in zip(ours.pop("predictions"), theirs.pop("predictions"), strict=True):
        assert other.pop("margin") == pytest.approx(mine.pop("margin"), abs=1e-4)
        assert other.pop("confidence") == pytest.approx(mine.pop("confidence"), abs=1e-5)
        assert [top["label"] for top in other.pop("top")] == [top["label"] for top in mine.pop("top")]
        assert other == mine  # path, label, rejected, truth, twin
    assert theirs.pop("rejection") == pytest.approx(ours.pop("rejection"), abs=1e-4)
    assert theirs == ours and theirs["labelled"]["images"] == 5 and theirs["errors"]


def test_it_needs_no_torch_and_less_than_a_second(graph: Graph, tmp_path: Path) -> None:
    for i in range(10):
        paint(tmp_path / f"{i}.png", (25 * i, 100, 100), seed=i)
    times = []
    for _ in range(3):  # the machine may be busy
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        modules, out = loaded_by("adapt", "--classifier", graph[0], "-Q", tmp_path, "-f", "csv", "--reject", "auto")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert out.count("\n") == 11 and "onnxruntime" in modules
        assert not modules & (HEAVY | {"torch", "safetensors"})
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        if times[-1] < 1:
            return
    raise AssertionError(f"{times} seconds of processor time")


def test_what_follows_from_predictions_works(cli: CLI, graph: Graph, queries: Path, tmp_path: Path) -> None:
    page, sorted_to = tmp_path / "page.html", tmp_path / "sorted"
    given = ("adapt", "--classifier", graph[0], "-Q", queries, "--labelled", "--reject-below", "0.99")
    result = cli(*given, "--sort-into", sorted_to, "--move", "--report", page, "--strict", "-f", "jsonl")
    assert result.code == 3 and "--strict: 1 error" in result.err
    lines = [json.loads(line) for line in result.out.splitlines()]
    assert len(lines) == 6 and sum("error" in line for line in lines) == 1
    for line in lines:
        assert "error" in line or (Path(line["sorted_to"]).is_file() and not Path(line["path"]).exists())
        assert "error" in line or line["rejected"] == (line["confidence"] < 0.99)
    text = Page(page).text
    assert "mine.onnx" in text and "rejected below confidence" in text and "red ß" in text
    table = cli("adapt", "--classifier", graph[0], "-Q", sorted_to)
    assert table.code == 0 and "5 images, 4 classes" in table.out


def test_memory_holds_a_batch(cli: CLI, graph: Graph, queries: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    run = exported.ExportedClassifier.__call__

    def counted(self: exported.ExportedClassifier, pixels: np.ndarray) -> Any:
        seen.append(len(pixels))
        return run(self, pixels)

    monkeypatch.setattr(exported.ExportedClassifier, "__call__", counted)
    given = ("adapt", "--classifier", graph[0], "-Q", queries, "-f", "csv")
    assert cli(*given, "--batch-size", "2").out == cli(*given).out
    assert seen == [2, 2, 1, 5]
    assert exported.ExportedClassifier(graph[0], threads=1).batch == exported.BATCH


@pytest.mark.parametrize(
    "more",
    [
        ("--support", "q"), ("--save", "new.safetensors"), ("--transductive",), ("--unlabeled", "q"),
        ("--guidance", "2"), ("--steps", "3"), ("--seed", "1"), ("--temperature", "1"),
        ("--set", "sampler.method=ddpm"), ("--set", "seed=2"), ("--device", "cuda"), ("--backend", "torch"),
    ],
)  # fmt: skip
def test_what_a_graph_cannot_do(cli: CLI, graph: Graph, queries: Path, more: tuple[str, ...]) -> None:
    result = cli("adapt", "--classifier", graph[0], "-Q", queries, *more)
    assert result.code == 2 and more[0] in result.err and "give the .safetensors classifier" in result.err
    assert result.out == ""


@pytest.mark.parametrize("more", [("--encoder", "lite0"), ("--views", "2"), ("--checkpoint", "x.safetensors")])
def test_what_no_classifier_takes(cli: CLI, graph: Graph, queries: Path, more: tuple[str, str]) -> None:
    result = cli("adapt", "--classifier", graph[0], "-Q", queries, *more)
    assert result.code == 2 and f"{more[0]} has no effect" in result.err


def changed(graph: Path, path: Path, facts: dict[str, Any] | None, *, margins: bool = True) -> Path:
    """A copy of a graph with other facts in its metadata, or with no metadata of ours."""
    onnx = pytest.importorskip("onnx")
    model = onnx.load(graph)
    kept = {entry.key: entry.value for entry in model.metadata_props}
    del model.metadata_props[:]
    if facts is not None:
        about = {**json.loads(kept["metadiff"]), **facts}
        onnx.helper.set_model_props(model, {**kept, "metadiff": json.dumps(about)})
    if not margins:
        del model.graph.output[1]
    onnx.save(model, path)
    return path


def test_other_files_are_refused(cli: CLI, graph: Graph, queries: Path, tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("no graph")
    (tmp_path / "half.onnx").write_bytes(graph[0].read_bytes()[:5000])
    squashed = {"pixels": {"size": 16, "fit": "squash"}}
    for file, reason in (
        (tmp_path / "gone.onnx", "does not exist"),
        (tmp_path, "is not an ONNX graph"),
        (tmp_path / "text.onnx", "is not an ONNX graph, or damaged"),
        (tmp_path / "half.onnx", "is not an ONNX graph, or damaged"),
        (changed(graph[0], tmp_path / "other.onnx", None), "of another program"),
        (changed(graph[0], tmp_path / "later.onnx", squashed), "by another version of metadiff"),
        (changed(graph[0], tmp_path / "margins.onnx", {"rejection": None}), "by another version of metadiff"),
    ):
        name = file if file.suffix else file.rename(file.with_name(f"{file.name}.onnx"))
        result = cli("adapt", "--classifier", name, "-Q", name / "q" if name.is_dir() else queries)
        if name is not file:
            name.rename(file)
        assert result.code == 4 and reason in result.err, (file, result.err)


def test_a_graph_without_a_threshold_rejects_by_confidence_alone(
    cli: CLI, graph: Graph, queries: Path, tmp_path: Path
) -> None:
    plain = changed(graph[0], tmp_path / "plain.onnx", {"rejection": None}, margins=False)
    given = ("adapt", "--classifier", plain, "-Q", queries, "-f", "csv")
    assert cli(*given).out == cli("adapt", "--classifier", graph[0], "-Q", queries, "-f", "csv").out
    refused = cli(*given, "--reject", "auto")
    assert refused.code == 4 and "no threshold" in refused.err and "--reject-below" in refused.err


def test_without_onnxruntime(cli: CLI, graph: Graph, queries: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "RUNTIME", "a_package_that_is_not_installed")
    result = cli("adapt", "--classifier", graph[0], "-Q", queries)
    assert result.code == 2 and "pip install 'metadiff[fast]'" in result.err
