"""What commands with a finished model make of the shared options."""

from pathlib import Path

import pytest

from metadiff_cli.commands.runtime import accelerated
from metadiff_cli.commands.settings import check_new, model_config
from metadiff_cli.config.load import resolve, to_yaml
from metadiff_cli.console import Screen
from metadiff_cli.errors import ConfigError
from tests.worlds import small_encoder


@pytest.mark.parametrize("setting", ["data.size=64", "features.views=1", "pretrain.epochs=3", "card.data=x"])
def test_a_setting_of_training_is_refused(setting: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"--set {setting.split('=')[0]} has no effect here.*can be set: seed, sampler"
    ):
        model_config(None, ["seed=1", setting])


def test_the_file_of_a_run_is_taken_with_one_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METADIFF_DATA__SIZE", "32")
    monkeypatch.setenv("METADIFF_SAMPLER__STEPS", "7")
    (tmp_path / "config.yaml").write_text(to_yaml(resolve("mini-5w5s", settings=["seed=3"], environ={})))
    notes: list[str] = []
    config = model_config(
        tmp_path / "config.yaml", ["sampler.temperature=1"], {"runtime.threads": 1}, note=notes.append
    )
    assert (config.seed, config.sampler.steps, config.sampler.temperature, config.runtime.threads) == (3, 7, 1, 1)
    (note,) = notes
    assert "$METADIFF_DATA__SIZE" in note and f"keys of --config {tmp_path / 'config.yaml'}" in note
    assert "SAMPLER" not in note


def test_a_file_without_settings_of_training_is_taken_in_silence(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("seed: 4\nsampler: {steps: 3}\nevaluation: {way: 7}\n")
    notes: list[str] = []
    config = model_config(tmp_path / "own.yaml", (), used=("seed", "sampler", "evaluation.way"), note=notes.append)
    assert (config.seed, config.sampler.steps, config.evaluation.way) == (4, 3, 7) and not notes


def test_samples_that_are_all_the_same_are_refused() -> None:
    assert model_config(None, (), {"sampler.samples": 4, "sampler.temperature": 0.5}).sampler.samples == 4
    with pytest.raises(ConfigError, match="4 samples have no effect at temperature 0"):
        model_config(None, (), {"sampler.samples": 4})


def test_wrong_keys_are_told_before_unused_ones() -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'pretrain\.epoch'"):
        model_config(None, ["data.size=64", "pretrain.epoch=3"])


def test_a_new_file_needs_a_place_and_leave(tmp_path: Path) -> None:
    check_new(tmp_path / "a" / "b.onnx", overwrite=False)
    (tmp_path / "old").touch()
    check_new(tmp_path / "old", overwrite=True)
    for file, overwrite in ((tmp_path / "old", False), (tmp_path, True), (tmp_path / "old" / "x", False)):
        with pytest.raises(ConfigError, match=r"exists already|is not a folder"):
            check_new(file, overwrite=overwrite)


def test_the_backend_follows_the_request_and_what_pays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed; it is the extra [fast]")
    monkeypatch.setenv("METADIFF_CACHE_DIR", str(tmp_path))
    images = small_encoder(28, "resnet10")

    def found(backend: str, count: int) -> bool | None:
        config = resolve(settings=[f"runtime.backend={backend}"], environ={})
        graphs = accelerated(images, config, count, Screen()).graphs
        return None if graphs is None else graphs.required

    assert found("auto", 10) is None and found("auto", 10_000) is False
    assert found("onnxruntime", 10) is True and found("torch", 10_000) is None
    assert not list(tmp_path.rglob("*.onnx"))  # features may be in the cache: a graph is made when it is used
