"""`evaluate` over several data sets: what each one's images allow, the table, and the mean."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from metadiff_cli.commands.evaluate.domains import check_different, domains_document, fitted_to, known_classes
from metadiff_cli.commands.evaluate.table import show_result
from metadiff_cli.config.schema import Config, DataConfig
from metadiff_cli.console import Screen
from metadiff_cli.core.evaluation.evaluate import Protocol
from metadiff_cli.data.open import open_source
from metadiff_cli.errors import ConfigError
from tests.worlds import Result, paint, validate

CLI = Callable[..., Result]
FEW = ["--episodes", "3", "--controls", "prototype"]


@pytest.mark.parametrize(
    ("counts", "way", "query"),
    [
        ([20] * 6, 5, 15),
        ([20] * 5 + [3], 5, 15),  # the sixth class is left out
        ([20, 20, 20, 20, 9, 9, 2], 5, 8),  # five ways come before many queries
        ([20, 20, 4], 3, 3),
        ([20, 2, 1], 2, 1),
        ([20, 1, 1], None, None),
        ([20], None, None),
    ],
)
def test_ways_then_queries_as_the_images_allow(counts: list[int], way: int | None, query: int | None) -> None:
    found = fitted_to(Protocol(shot=1), counts)
    assert (way, query) == (None, None) if found is None else (found.way, found.query) == (way, query)


def test_an_unbalanced_class_may_get_twice_as_many_queries() -> None:
    found = fitted_to(Protocol(imbalance=1.0, shot=2), [22] * 5)
    assert found is not None and found.query == 10
    assert fitted_to(Protocol(imbalance=1.0, shot=2), [3] * 5) is None


def test_classes_of_a_training_on_several_sets_are_known_again(photos: Path) -> None:
    data = DataConfig(layout="folder")
    source = open_source(Config(data=data), photos / "support", Screen(quiet=True))
    name = source.dataset.name
    assert known_classes(source, ["red", "dog"]) == {"red"}
    assert known_classes(source, [f"{name}/red", f"{name}/blue", "other/grey"]) == {"red", "blue"}


def document(accuracy: float, ci95: float, ece: float | None, difference: float) -> dict[str, object]:
    paired = {"difference": difference, "ci95": ci95}
    return {
        "schema": "metadiff.evaluate/1", "protocol": "inductive", "imbalance": None, "name": f"d{accuracy:g}",
        "denoiser": "analytic",
        "methods": {
            "metadiff": {"accuracy": accuracy, "ci95": ci95, "ece": ece, "paired_to_prototype": paired},
            "prototype": {"accuracy": accuracy - difference, "ci95": ci95, "ece": 2.0},
        },
    }  # fmt: skip


def test_the_mean_over_data_sets_and_its_interval(capsys: pytest.CaptureFixture[str]) -> None:
    found = domains_document([document(60, 3, 1.0, 2), document(80, 4, 5.0, -1)], Protocol())
    own = found["mean"]["metadiff"]
    assert own["accuracy"] == 70 and own["ece"] == 3 and own["paired_to_prototype"]["difference"] == 0.5
    assert own["ci95"] == own["paired_to_prototype"]["ci95"] == math.sqrt(3**2 + 4**2) / 2
    assert "paired_to_prototype" not in found["mean"]["prototype"]
    without = domains_document([document(60, 3, None, 2), document(80, 4, 5.0, -1)], Protocol())
    assert without["mean"]["metadiff"]["ece"] is None and without["mean"]["prototype"]["ece"] == 2
    show_result(found, Screen())
    lines = [
        [cell.strip() for cell in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines() if "│" in line
    ]
    assert lines == [
        ["d60", "60.00 ± 3.00", "58.00 ± 3.00", "+2.00 ± 3.00"],
        ["d80", "80.00 ± 4.00", "81.00 ± 4.00", "-1.00 ± 4.00"],
        ["mean", "70.00 ± 2.50", "69.50 ± 2.50", "+0.50 ± 2.50"],
    ]


def test_a_folder_given_twice_is_a_mistake(tmp_path: Path) -> None:
    check_different([tmp_path / "a", tmp_path / "b"])
    with pytest.raises(ConfigError, match="twice"):
        check_different([tmp_path / "a", tmp_path / "b", tmp_path / "b" / ".." / "a"])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three data sets: without splits, with few classes and images, and with splits."""
    root = tmp_path_factory.mktemp("domains")
    for name, classes, images in (("many", 7, 4), ("few", 3, 3), ("twin/many", 6, 4)):
        for c in range(classes):
            for i in range(images):
                paint(root / name / f"kind-{c}" / f"{i}.png", (30 * c, 90, 200 - 20 * c), seed=10 * c + i, size=24)
    for c in range(8):
        for i in range(4):
            split = "train" if c < 3 else "test"
            paint(root / "split" / split / f"s-{c}" / f"{i}.png", (30 * c, 200, 90), seed=10 * c + i, size=24)
    return root


def test_several_data_sets_as_a_table(cli: CLI, checkpoint: Path, folders: Path) -> None:
    data = [word for name in ("many", "few", "split") for word in ("--data", folders / name)]
    result = cli("evaluate", "-c", checkpoint, *data, *FEW, "--verbose")
    assert result.code == 0, result.err
    assert "3 data sets, 3 episodes each" in result.out
    rows = [line.split("│")[1].strip() for line in result.out.splitlines() if "│" in line]
    assert rows == ["many", "few", "split", "mean"]
    for note in ("many has no splits of its own: all 7 classes", "many: 3 queries per class", "few: 3-way episodes",
                 "few: 2 queries per class", "split: 3 queries per class"):  # fmt: skip
        assert note in result.err
    assert "split has no splits" not in result.err and result.err.count("episodes per second") == 3


def test_several_data_sets_as_a_document_with_a_gate_on_the_mean(cli: CLI, checkpoint: Path, folders: Path) -> None:
    data = ["--data", folders / "many", "--data", folders / "twin" / "many", "--data", folders / "split"]
    given = ("evaluate", "-c", checkpoint, *data, *FEW, "--query", "2", "--json")
    found = validate(cli(*given), "metadiff.evaluate/1")
    assert [(d["name"], d["split"], d["classes"]) for d in found["data"]] == [
        ("many", "all", 7), ("many-2", "all", 6), ("split", "test", 5),
    ]  # fmt: skip
    accuracies = [d["methods"]["metadiff"]["accuracy"] for d in found["data"]]
    assert found["mean"]["metadiff"]["accuracy"] == pytest.approx(sum(accuracies) / 3, abs=1e-3)
    assert (found["way"], found["query"]) == (5, 2) and "methods" not in found
    mean = found["mean"]["metadiff"]["accuracy"]
    assert cli(*given, "--fail-under", str(mean - 0.01)).code == 0
    failed = cli(*given, "--fail-under", str(min(100, mean + 0.01)))
    assert failed.code == 5 and "is below --fail-under" in failed.err
    whole = validate(cli(*given, "--split", "all", "--imbalance", "1"), "metadiff.evaluate/1")
    assert [d["classes"] for d in whole["data"]] == [7, 6, 8]
    assert [d["query"] for d in whole["data"]] == [1, 1, 1]  # of four images three are left, for at most twice as many
    one = cli("evaluate", "-c", checkpoint, *data[4:], *FEW, "--query", "2", "--json")
    alone, beside = validate(one, "metadiff.evaluate/1"), found["data"][2]
    assert alone["methods"] == beside["methods"] and "mean" not in alone


@pytest.mark.parametrize("option", ["--halves", "--open-set", "--compare", "--report"])
def test_what_takes_one_data_set(
    cli: CLI, checkpoint: Path, small_run: Path, folders: Path, tmp_path: Path, option: str
) -> None:
    value = {"--compare": [small_run / "result.json"], "--report": [tmp_path / "e.html"]}.get(option, [])
    data = ("--data", folders / "many", "--data", folders / "few")
    result = cli("evaluate", "-c", checkpoint, *data, option, *value)
    assert result.code == 2 and option in result.err and "--data" in result.err and result.out == ""


def test_a_data_set_without_enough_images_is_named(cli: CLI, checkpoint: Path, folders: Path) -> None:
    data = ("--data", folders / "many", "--data", folders / "few")
    result = cli("evaluate", "-c", checkpoint, *data, *FEW, "--shot", "3")
    assert result.code == 3 and "few has fewer than 2 classes with enough images for 3-shot" in result.err
    assert cli("evaluate", "-c", checkpoint, *data[:2], *data[:2], *FEW).code == 2
