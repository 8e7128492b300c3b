"""Models of any encoder, without base classes."""

from pathlib import Path

import pytest

from metadiff_cli.classify.models import VIEWS, installed_encoders, model_of_encoder, open_model, plain_tuning
from metadiff_cli.errors import ConfigError
from tests.worlds import CPU, small_model


def test_an_encoder_alone_makes_a_model_with_the_hyper_parameters_of_the_package() -> None:
    model = model_of_encoder("lite0", CPU)
    assert model.images.views == VIEWS and model.metadiff.metric.space is None
    assert model.metadiff.tuning == plain_tuning() and model.metadiff.tuning.rejection is None
    assert "lite0" in installed_encoders()


def test_a_file_gives_its_encoder_alone(tmp_path: Path) -> None:
    path = small_model(tmp_path / "m.safetensors")
    model = model_of_encoder(str(path), CPU, views=1)
    assert (model.images.name, model.images.views) == ("conv4", 1) and model.metadiff.metric.space is None
    assert open_model(path, CPU).images.views == 2 and open_model(path, CPU, 1).images.views == 1


def test_an_encoder_without_weights_is_refused() -> None:
    with pytest.raises(ConfigError, match="'conv4' is no trained encoder") as caught:
        model_of_encoder("conv4", CPU)
    assert caught.value.hint is not None and "lite0" in caught.value.hint
