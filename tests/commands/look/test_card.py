"""`metadiff card`: a card that the Hub reads, with the numbers of the header; nothing of it is markup of a stranger."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from metadiff_cli.commands.look.card import hub_card
from metadiff_cli.commands.train.card import model_card
from metadiff_cli.config.schema import Config
from metadiff_cli.core.checkpoints.file import read_header, save_checkpoint
from metadiff_cli.errors import CheckpointError
from tests.worlds import Result

CLI = Callable[..., Result]
METHODS = {
    "metadiff": {"accuracy": 60.82, "ci95": 0.34, "ece": 0.5},
    "prototype": {"accuracy": 60.33, "ci95": 0.34, "ece": None},
}
HEADER = {
    "config": {"name": "mini-5w1s", "data": {"name": "mini-imagenet"}},
    "classes": ["a", "b"],
    "encoder": "conv4",
    "card": {"summary": "mini-ImageNet, conv4", "licence": "MIT", "protocol": ["one", "two"]},
    "metrics": {"methods": METHODS, "split": "val", "way": 5, "shot": 1, "query": 15, "episodes": 1000, "seed": 0},
}


def card_of(folder: Path, kind: str = "model", **changes: Any) -> tuple[dict[str, Any], str]:
    """The head and the text of the card of a file with that header."""
    save_checkpoint(folder / "pets.safetensors", kind, {"a": torch.zeros(1)}, {**HEADER, **changes})
    text = hub_card(folder / "pets.safetensors", read_header(folder / "pets.safetensors"))
    _, head, body = text.split("---\n", 2)
    return yaml.safe_load(head), body


def test_the_head_has_what_the_hub_reads(tmp_path: Path) -> None:
    head, body = card_of(tmp_path)
    assert head["library_name"] == "metadiff" and head["pipeline_tag"] == "image-classification"
    assert head["license"] == "mit" and head["datasets"] == ["mini-imagenet"] and "few-shot-learning" in head["tags"]
    (model,) = head["model-index"]
    (result,) = model["results"]
    assert model["name"] == "metadiff-mini-5w1s" and result["metrics"][0]["value"] == 60.82
    assert result["dataset"]["split"] == "val" and result["dataset"]["args"]["episodes"] == 1000
    assert "| prototype | 60.33 ± 0.34 |  |" in body and "**Protocol:**\n\n- one\n- two\n" in body


def test_the_library_of_the_hub_reads_the_results(tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is the extra [hub]")
    head, body = card_of(tmp_path)
    card = hub.ModelCard(f"---\n{yaml.safe_dump(head)}---\n{body}", ignore_metadata_errors=False)
    accuracy, error = card.data.eval_results
    assert (accuracy.metric_type, accuracy.metric_value, accuracy.dataset_name) == ("accuracy", 60.82, "mini-imagenet")
    assert error.metric_type == "ece" and card.data.model_name == "metadiff-mini-5w1s"


@pytest.mark.parametrize("kind", ["model", "classifier", "baseline", "encoder"])
def test_every_kind_has_one_and_says_how_to_use_it(tmp_path: Path, kind: str) -> None:
    head, body = card_of(tmp_path, kind)
    assert kind in head["tags"] and "pets.safetensors" in body and "```sh" in body


def test_what_is_not_known_is_left_out(tmp_path: Path) -> None:
    head, body = card_of(tmp_path, card={"licence": "as the photos"}, metrics={"validation": 0.5}, config={})
    assert head["license"] == "other" and "**Licence.** as the photos." in body
    assert not {"datasets", "model-index"} & set(head)


def test_a_header_decides_neither_about_the_table_nor_about_html(tmp_path: Path) -> None:
    hostile = "x | y\n---\n<script>"
    methods = {hostile: METHODS["metadiff"]}
    head, body = card_of(tmp_path, card={"summary": hostile}, metrics={**HEADER["metrics"], "methods": methods})
    assert "<script" not in body and "| x &#124; y --- &lt;script> |" in body and "**Summary.** x &#124; y" in body
    assert head["license"] == "other"


def test_several_data_sets_are_not_named_as_one(tmp_path: Path) -> None:
    sets = [{"name": "food", "methods": METHODS}, {"name": "signs", "methods": METHODS}]
    result = {"mean": METHODS, "data": sets, "protocol": "inductive", **HEADER["metrics"]}
    stored = model_card(Config(), "lite0", 224, 0, [result], "none")
    head, body = card_of(tmp_path, card=stored)
    assert "datasets" not in head and "food, signs" in body
    assert head["model-index"][0]["results"][0]["dataset"]["type"] == "custom"


def test_names_of_support_images_stay_at_home(tmp_path: Path) -> None:
    _, body = card_of(tmp_path, "classifier", support=["secret-name.jpg"], classes=["cat", "dog"])
    assert "secret" not in body and "**Classes** (2). cat, dog" in body


def test_the_command(cli: CLI, checkpoint: Path, tmp_path: Path) -> None:
    shown = cli("card", checkpoint)
    assert shown.code == 0 and shown.out.startswith("---\nlibrary_name: metadiff\n") and shown.err == ""
    written = cli("card", checkpoint, "--out", tmp_path / "README.md")
    assert written.code == 0 and written.out == "" and "upload it as README.md" in written.err
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == shown.out
    again = cli("card", checkpoint, "--out", tmp_path / "README.md")
    assert again.code == 2 and "exists already" in again.err
    assert cli("card", checkpoint, "--out", tmp_path / "README.md", "--overwrite").code == 0


def test_the_packaged_checkpoint_has_a_card(cli: CLI) -> None:
    shown = cli("card")
    assert shown.code == 0 and "pipeline_tag: image-classification" in shown.out


def test_the_state_of_a_training_has_none(cli: CLI, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "s.safetensors", "state", {}, {})
    refused = cli("card", tmp_path / "s.safetensors")
    assert refused.code == 4 and "unfinished training" in refused.err


@pytest.mark.parametrize(
    "changes", [{"card": 1}, {"metrics": {"methods": 1}}, {"metrics": {"methods": {"a": {}}}}, {"config": []}]
)
def test_a_header_of_another_form_is_told(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="is damaged"):
        card_of(tmp_path, **changes)
