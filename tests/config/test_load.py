"""Configuration: precedence, suggestions, every preset."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metadiff_cli.config.load import check, encoder_file, preset_folder, preset_names, resolve, to_yaml
from metadiff_cli.config.schema import ENCODERS, Config
from metadiff_cli.errors import ConfigError


def test_each_layer_wins_over_the_one_before(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("seed: 2\npretrain: {epochs: 2, lr: 0.2}\n")
    environ = {"METADIFF_SEED": "3", "METADIFF_PRETRAIN__EPOCHS": "3", "METADIFF_CACHE_DIR": "/x", "OTHER": "1"}
    settings, flags = ["pretrain.epochs=4", "pretrain.batch=8"], {"pretrain.epochs": 5, "runtime.device": None}
    assert Config().pretrain.epochs == 30
    assert resolve("glyphs-5w1s", environ={}).pretrain.epochs == 12
    assert resolve("glyphs-5w1s", file, environ={}).pretrain.epochs == 2
    assert resolve("glyphs-5w1s", file, environ=environ).pretrain.epochs == 3
    assert resolve("glyphs-5w1s", file, settings, environ=environ).pretrain.epochs == 4
    final = resolve("glyphs-5w1s", file, settings, flags, environ)
    assert (final.pretrain.epochs, final.pretrain.lr, final.pretrain.batch, final.seed) == (5, 0.2, 8, 3)
    assert final.runtime.device == "auto" and final.name == "glyphs-5w1s"


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(settings=["pretrain.epoch=3", "sede=1", "metatrain.steps=0", "pretrain.schedule=magic"], environ={})
    for words in (
        "'pretrain.epoch', did you mean 'pretrain.epochs'",
        "'sede', did you mean 'seed'",
        "metatrain.steps",
        "magic",
    ):
        assert words in caught.value.message


def test_a_problem_names_the_layer_it_comes_from(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("pretrain: {epochs: many, schedule: magic}\nsede: 1\n")
    environ = {"METADIFF_PRETRAIN__EPOCHS": "few", "METADIFF_RUNTIME__THREADS": "0", "METADIFF_ROOT": "/x"}
    with pytest.raises(ConfigError) as caught:
        resolve("glyphs-5w1s", tmp_path / "own.yaml", ["seed=-1"], {"metatrain.steps": 0}, environ)
    for words in (
        "(got 'few' from $METADIFF_PRETRAIN__EPOCHS)", "(got 0 from $METADIFF_RUNTIME__THREADS)",
        "unknown key 'root' (from $METADIFF_ROOT)", f"(got 'magic' from --config {tmp_path / 'own.yaml'})",
        f"unknown key 'sede', did you mean 'seed'? (from --config {tmp_path / 'own.yaml'})", "(got -1 from --set)",
        "(got 0 from flag)",
    ):  # fmt: skip
        assert words in caught.value.message


def test_an_empty_variable_counts_as_not_set() -> None:
    environ = {"METADIFF_SEED": "", "METADIFF_PRETRAIN__EPOCHS": " ", "METADIFF_NONSENSE": ""}
    assert resolve("glyphs-5w1s", environ=environ) == resolve("glyphs-5w1s", environ={})


SERVICES = [
    "METADIFF_SERVICE_HOST", "METADIFF_SERVICE_PORT", "METADIFF_SERVICE_PORT_HTTP", "METADIFF_PORT",
    "METADIFF_PORT_80_TCP", "METADIFF_PORT_80_TCP_PROTO", "METADIFF_PORT_80_TCP_ADDR", "METADIFF_PORT_443_UDP_PORT",
    "METADIFF_WEB_SERVICE_HOST", "METADIFF_WEB_PORT_8080_TCP",
]  # fmt: skip


@pytest.mark.parametrize("name", SERVICES)
def test_variables_of_a_kubernetes_service_are_ignored(name: str) -> None:
    assert resolve("glyphs-5w1s", environ={name: "tcp://10.0.0.1:80"}) == resolve("glyphs-5w1s", environ={})


@pytest.mark.parametrize("name", ["METADIFF_HOST", "METADIFF_SUPPORT", "METADIFF_PORTS", "METADIFF_PRETRAIN__PORT"])
def test_other_unknown_variables_are_an_error_that_names_them(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(environ={name: "1"})
    assert f"${name}" in caught.value.message and caught.value.exit_code == 2


def test_the_name_of_an_encoder_wins_over_a_folder_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("conv4", "resnet12", "mine"):
        (tmp_path / name).mkdir()
    assert all(encoder_file(name) is None for name in (*ENCODERS, "timm:resnet18", "", None, "resnet9"))
    for path in ("./conv4", "mine", "gone/encoder", "gone.safetensors", str(tmp_path / "conv4")):
        assert encoder_file(path) == Path(path)


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [", "\x00", "!!python/object/apply:os.system ['true']\n"])
def test_files_that_are_no_configuration(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"c\.yaml"):
        resolve(file=tmp_path / "c.yaml", environ={})


def test_a_missing_file_and_a_setting_without_value(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no\.yaml"):
        resolve(file=tmp_path / "no.yaml", environ={})
    with pytest.raises(ConfigError, match="--set key=value"):
        resolve(settings=["seed"], environ={})


def test_stages_must_fill_the_epochs() -> None:
    with pytest.raises(ConfigError, match="add up to 1"):
        check({"pretrain": {"stages": [[0.5, 32]]}})


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_valid_and_begins_with_its_command(name: str) -> None:
    config = resolve(name, environ={})
    first = (preset_folder() / f"{name}.yaml").read_text().splitlines()[0]
    assert first.startswith(f"# metadiff metatrain --preset {name}")
    assert config.name == name and config.summary and config.kind in ("demo", "benchmark", "own")
    assert config.kind == "demo" or config.expect
    episodes = re.search(r"-(\d+)w(\d+)s", name)
    if episodes:
        assert (config.evaluation.way, config.evaluation.shot) == tuple(map(int, episodes.groups()))
        small = "conv4-padded" if name.startswith("omniglot") else "conv4"
        assert config.encoder == ("resnet12" if name.endswith("resnet12") else small)
    assert check(__import__("yaml").safe_load(to_yaml(config))) == config


def test_presets_of_one_data_set_share_their_encoder() -> None:
    one, five = resolve("mini-5w1s", environ={}), resolve("mini-5w5s", environ={})
    assert (one.pretrain, one.data, one.encoder, one.seed) == (five.pretrain, five.data, five.encoder, five.seed)


PLAIN = st.none() | st.integers() | st.text(max_size=5) | st.floats()
TREES = st.recursive(
    PLAIN, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=4), x, max_size=3), max_leaves=5
)


@given(st.dictionaries(st.text(max_size=8), TREES, max_size=4))
def test_any_values_are_accepted_or_refused_with_our_error(values: dict[str, object]) -> None:
    try:
        check(values)
    except ConfigError as error:
        assert error.exit_code == 2 and error.hint
