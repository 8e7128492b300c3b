"""Methods by name, and which of them have a fitted temperature."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from metadiff_cli.commands.completions import CONTROLS
from metadiff_cli.commands.evaluate.methods import Entry, methods_of, parse_controls
from metadiff_cli.core.checkpoints.model import Model
from metadiff_cli.core.evaluation import controls
from metadiff_cli.core.evaluation.controls import ANALYTIC, ControlSettings
from metadiff_cli.core.evaluation.evaluate import Protocol, evaluate, run_through
from metadiff_cli.core.method.adapt import Sampling
from metadiff_cli.core.method.calibration import TaskTable
from metadiff_cli.core.method.metric import Metric
from metadiff_cli.errors import CheckpointError, ConfigError
from tests.worlds import CPU, Result, bank_of, model_of_world

CLI = Callable[..., Result]
BANK, PROTOCOL = bank_of(8, seed=3), Protocol(query=3, episodes=4)
UNCALIBRATED = {"untrained", "soft-kmeans", "label-propagation"}


def methods(model: Model, *names: str, **sampling: Any) -> dict[str, Entry]:
    return methods_of(model, BANK, names, Sampling(**sampling), PROTOCOL, CPU)


def confidence(entry: Entry) -> float:
    scores = run_through(evaluate(BANK, {"method": entry.run}, PROTOCOL, CPU))["method"]
    return float(sum(part.sum() for part in scores.confidence))


def test_every_control_is_measured(cli: CLI, checkpoint: Path) -> None:
    result = cli("evaluate", "-c", checkpoint, "--way", "3", "--query", "3", "--episodes", "3", "--controls",
                 ",".join(CONTROLS), "--transductive", "--json")  # fmt: skip
    assert result.code == 0, result.err
    document = json.loads(result.out)
    assert set(document["methods"]) == {"metadiff", *CONTROLS} and document["protocol"] == "transductive"
    assert all("paired_to_inductive" in m for name, m in document["methods"].items() if name != "inductive")
    assert {name for name, m in document["methods"].items() if m["ece"] is None} == UNCALIBRATED


def test_the_list_of_names_is_that_of_the_controls() -> None:
    assert {*controls.CONTROLS, ANALYTIC} <= set(CONTROLS)
    assert set(methods(model_of_world(), *CONTROLS)) == {"metadiff", *CONTROLS}


def test_a_model_that_was_never_fitted_is_not_calibrated() -> None:
    assert not any(entry.calibrated for entry in methods(model_of_world(), *CONTROLS).values())


def test_what_was_fitted_for_a_control_is_used() -> None:
    settings = {name: [ControlSettings(5, 1, temperature=9.0)] for name in (ANALYTIC, "prototype", "logreg")}
    plain = model_of_world()
    header = {**plain.header, "controls": {name: [asdict(s) for s in found] for name, found in settings.items()}}
    before = methods(plain, *settings, "lda")
    after = methods(replace(plain, header=header), *settings, "lda")
    assert {name for name, entry in after.items() if entry.calibrated} == set(settings)
    for name in settings:
        assert confidence(before[name]) != confidence(after[name])
    assert confidence(before["lda"]) == confidence(after["lda"])


def test_analytic_is_the_posterior_mean_without_the_descent() -> None:
    model = model_of_world()
    found = methods(model, ANALYTIC)
    metadiff = model.metadiff.without_descent(TaskTable.constant(2.0))  # the temperature of the tuning
    again = methods(replace(model, metadiff=metadiff))
    assert confidence(found[ANALYTIC]) == confidence(again["metadiff"])
    assert confidence(found[ANALYTIC]) != confidence(found["metadiff"])


def test_damaged_settings_of_controls_are_an_error_of_the_checkpoint() -> None:
    model = model_of_world()
    for damage in ({"logreg": [{"way": "five"}]}, {ANALYTIC: [{"way": w, "shot": s} for w, s in ((5, 1), (10, 2))]}):
        with pytest.raises(CheckpointError):
            methods(replace(model, header={**model.header, "controls": damage}), "prototype")


def test_nothing_is_denoised_without_a_task_space() -> None:
    model = model_of_world()
    model = replace(model, metadiff=replace(model.metadiff, metric=Metric(model.metadiff.metric.groups)))
    assert set(methods(model, "prototype", "analytic", "lda")) == {"metadiff", "prototype", "analytic", "lda"}
    for name in ("untrained", "posterior"):
        with pytest.raises(ConfigError, match=name):
            methods(model, "prototype", name)


def test_names_of_controls() -> None:
    assert parse_controls(" prototype,, a.safetensors ") == ["prototype", "a.safetensors"]
    with pytest.raises(ConfigError, match="unknown control 'magic'"):
        parse_controls("magic")
