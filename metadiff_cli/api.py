"""The Python interface: a classifier that follows scikit-learn's conventions and does not need scikit-learn.

>>> from metadiff_cli import FewShotClassifier
>>> classifier = FewShotClassifier.from_pretrained()  # or the path of a checkpoint
>>> classifier.fit(["imgs/cat/1.jpg", "imgs/dog/1.jpg"], ["cat", "dog"])
>>> classifier.predict(["q/1.jpg", "q/2.jpg"])
array(['dog', 'cat'], dtype='<U3')
"""

import importlib
import inspect
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from metadiff_cli.classify.arguments import Images, Labels, images_of, labels_of, name_of
from metadiff_cli.classify.classifier import Classifier, adapt, default_steps, narrow_draws
from metadiff_cli.classify.images import Encoded, ImageLike, encode_images
from metadiff_cli.classify.models import model_of_encoder, open_model
from metadiff_cli.classify.support_set import FEWEST_CLASSES, SHOWN, SupportSet, support_of
from metadiff_cli.core.checkpoints.model import Model
from metadiff_cli.core.device import pick_device
from metadiff_cli.core.encoders.bank import Encoding
from metadiff_cli.core.method.adapt import Sampling
from metadiff_cli.errors import ConfigError, DataError, MetaDiffError


class NotFittedError(MetaDiffError, ValueError, AttributeError):
    """A prediction was asked for before `fit` or `load`. The bases are those of scikit-learn's error of this name."""


class InputError(DataError, ValueError):
    """Images or labels cannot be used. It is a ValueError, as scikit-learn expects."""


class ParameterError(ConfigError, ValueError):
    """A parameter of the class is unknown or cannot be used. It is a ValueError, as scikit-learn expects."""


class FewShotClassifier:
    """Learn classes from a few images each, with a trained checkpoint and no training.

    Parameters
    ----------
    checkpoint : path of a `checkpoint.safetensors`; None for the one that comes with the package.
    encoder : "lite0", "timm:MODEL", "torchvision:MODEL" or a file, in place of a checkpoint: no class statistics then.
    views : views of an image, 1, 2, 5 or 6; None for those of the checkpoint.
    guidance : how far the class statistics are distrusted, above 0 (1: not at all); "auto" chooses it for each task.
    steps : denoising steps S; None for 10, or for 100 at a temperature above 0, where fewer draw too narrow.
    samples : classifiers M whose probabilities are averaged; they differ at a temperature above 0.
    temperature : noise temperature, 0 for the posterior mean, 1 to draw from the posterior.
    random_state : seed of the noise, an int; it has no effect at temperature 0.
    device : "auto" (or None), "cpu", "cuda", "mps", or a torch.device.
    batch_size : images per forward pass of the encoder; None for the default of the device.

    Attributes (after `fit` or `load`)
    ----------
    classes_ : array (N,) of the labels in sorted order.
    classifier_ : the adapted classifier, as the command line saves it.

    Images are paths, Pillow images or uint8 arrays (H, W, 3), in a sequence, or one uint8 array (n, H, W, 3). Each
    prediction depends on the support and its own image alone.
    """

    _estimator_type = "classifier"  # for scikit-learn before 1.6

    def __init__(
        self,
        checkpoint: str | os.PathLike[str] | None = None,
        *,
        encoder: str | None = None,
        views: int | None = None,
        guidance: float | str = "auto",
        steps: int | None = None,
        samples: int = 1,
        temperature: float = 0.0,
        random_state: int = 0,
        device: str | torch.device | None = "auto",
        batch_size: int | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.encoder = encoder
        self.views = views
        self.guidance = guidance
        self.steps = steps
        self.samples = samples
        self.temperature = temperature
        self.random_state = random_state
        self.device = device
        self.batch_size = batch_size

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str] | None = None, **parameters: Any) -> Self:
        """A classifier that is not fitted, with its checkpoint loaded. `parameters` are those of the class.

        Raises CheckpointError when the file cannot be used.
        """
        classifier = cls(path, **parameters)
        classifier._model()
        return classifier

    def fit(self, X: Images, y: Labels) -> Self:
        """Adapt to n labelled images X with labels y (n,). Labels are text, whole numbers or booleans.

        The label "_none" is that of images that show none of the classes; `predict` may return it.
        The same picture given twice counts once, with a warning. Raises InputError for fewer than two classes, for
        labels that do not fit the images, for images that cannot be read, and for a picture with two labels.
        """
        sampling = self._sampling()
        if warning := narrow_draws(sampling):
            warnings.warn(warning, stacklevel=2)
        with _input_errors():
            labels, images = labels_of(y), images_of(X)
            classes = np.unique(labels)
            if len(images) != len(labels):
                raise InputError(f"{len(images)} images but {len(labels)} labels", hint="give one label per image")
            if len(classes) < FEWEST_CLASSES:
                what = "the labels hold one class only" if len(classes) else "there are no labels"
                raise InputError(what, hint="give images of two classes or more")
            model = self._model()
            support = support_of(zip(map(name_of, labels), self._encoded(images, model), strict=True))
        _warn_of_repeated(support)
        self.classifier_ = adapt(model, support, sampling, seed=self.random_state)
        self.classes_ = classes
        return self

    def predict_proba(self, X: Images) -> np.ndarray:
        """Probabilities (n, N) float64 of n images, columns in the order of `classes_`.

        Raises InputError for an image that cannot be read, NotFittedError before `fit`.
        """
        classifier = self._fitted()
        z = self._features(X, classifier)
        if not len(z):
            return np.empty((0, len(self.classes_)))
        p: np.ndarray = classifier.probabilities(z).cpu().numpy().astype(np.float64)
        # the classes of the classifier are sorted by name, and numbers sort otherwise
        columns = [classifier.classes.index(name_of(label)) for label in self.classes_]
        rows: np.ndarray = p[:, columns] / p.sum(axis=1, keepdims=True)  # float32 probabilities add up to 1 + 1e-7
        return rows

    def known_margin(self, X: Images) -> np.ndarray:
        """How far the known score of each image (n,) is above the threshold of rejection, in nats.

        An image below 0 shows none of the classes, among which "_none" does not count. The threshold was fitted to
        reject 5 % of images of known classes, on validation classes. Raises as `predict_proba` does, CheckpointError
        when the checkpoint has no threshold, and DataError for a single class of one image beside "_none".
        """
        classifier = self._fitted()
        rejector = classifier.rejector()
        z = self._features(X, classifier)
        if not len(z):
            return np.empty(0)
        margins: np.ndarray = rejector.margins(classifier.expanded(z))[0].cpu().numpy().astype(np.float64)
        return margins

    def is_known(self, X: Images) -> np.ndarray:
        """Whether each image (n,) shows one of the classes, by `known_margin`. For the others `predict` guesses."""
        known: np.ndarray = self.known_margin(X) >= 0
        return known

    def predict(self, X: Images) -> np.ndarray:
        """The most probable label of each image (n,). Raises as `predict_proba` does."""
        best: np.ndarray = self.predict_proba(X).argmax(axis=1)
        labels: np.ndarray = self.classes_[best]
        return labels

    def score(self, X: Images, y: Sequence[Any] | np.ndarray) -> float:
        """The share of the images X whose predicted label equals that in y (n,). Raises InputError for other labels."""
        with _input_errors():
            wanted = labels_of(y)
        predicted = self.predict(X)
        if predicted.shape != wanted.shape:
            raise InputError(f"{len(predicted)} images but {len(wanted)} labels", hint="give one label per image")
        if (predicted.dtype.kind == "U") != (wanted.dtype.kind == "U"):
            raise InputError(
                f"labels of type {wanted.dtype} for classes of type {predicted.dtype}",
                hint="after load the classes are text: give str labels",
            )
        return float(np.mean(predicted == wanted))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the classifier, for `load` and for `metadiff adapt --classifier`. Raises NotFittedError and OSError."""
        self._fitted().save(_path(path))

    @classmethod
    def load(cls, path: str | os.PathLike[str], **parameters: Any) -> Self:
        """A fitted classifier from a file of `save` or of `metadiff adapt --save`. Its classes are text.

        `fit` starts again from the checkpoint of the parameters. Raises CheckpointError for any other file.
        """
        classifier = cls(**parameters)
        classifier.classifier_ = Classifier.load(_path(path), classifier._device())
        classifier.classes_ = np.array(classifier.classifier_.classes)
        return classifier

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The parameters by name, as scikit-learn's `clone` and searches ask for them."""
        return {name: getattr(self, name) for name in self._parameter_names()}

    def set_params(self, **parameters: Any) -> Self:
        """Change parameters, from the next `fit` on. Raises ParameterError for an unknown one."""
        known = self._parameter_names()
        for name in parameters:
            if name not in known:
                raise ParameterError(f"unknown parameter '{name}'", hint=f"choose from {', '.join(known)}")
        for name, value in parameters.items():
            setattr(self, name, value)
        return self

    def __repr__(self) -> str:
        """The parameters that differ from their defaults."""
        signature = inspect.signature(type(self).__init__).parameters
        shown = [f"{n}={v!r}" for n, v in self.get_params().items() if v != signature[n].default]
        return f"{type(self).__name__}({', '.join(shown)})"

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the checkpoint, which is loaded again when it is needed."""
        return {name: value for name, value in vars(self).items() if name != "_loaded"}

    def __sklearn_is_fitted__(self) -> bool:
        """Whether `fit` or `load` was called."""
        return hasattr(self, "classifier_")

    def __sklearn_tags__(self) -> Any:
        """Tell scikit-learn, which alone calls this, that the class is a classifier, and of images, not of tables."""
        tags = importlib.import_module("sklearn.utils")
        return tags.Tags(
            estimator_type="classifier",
            target_tags=tags.TargetTags(required=True),
            classifier_tags=tags.ClassifierTags(),
            input_tags=tags.InputTags(two_d_array=False),
        )

    @classmethod
    def _parameter_names(cls) -> list[str]:
        return [name for name in inspect.signature(cls.__init__).parameters if name != "self"]

    def _sampling(self) -> Sampling:
        """The sampler's settings. Raises ParameterError for a value that cannot be used."""
        self._number("random_state", 0)
        temperature = float(self._number("temperature", 0, Real))
        steps = default_steps(temperature) if self.steps is None else int(self._number("steps", 1))
        if isinstance(self.guidance, str) and self.guidance == "auto":
            guidance = None
        else:
            guidance = float(self._number("guidance", 0, Real, 'give "auto" or a number above 0'))
            if guidance == 0:
                raise ParameterError("guidance is 0", hint='give "auto" or a number above 0')
        return Sampling(steps, int(self._number("samples", 1)), temperature, guidance)

    def _number(self, name: str, least: int, kind: type = Integral, hint: str = "") -> Any:
        """A parameter that is a finite number, NumPy's included. Raises ParameterError."""
        value = getattr(self, name)
        if not isinstance(value, kind) or isinstance(value, bool) or not math.isfinite(value):  # type: ignore[arg-type]
            whole = "a whole number" if kind is Integral else "a number"
            raise ParameterError(f"{name} is {value!r}", hint=hint or f"give {whole}")
        if value < least:  # type: ignore[operator]
            raise ParameterError(f"{name} is {value}", hint=hint or f"give at least {least}")
        return value

    def _device(self) -> torch.device:
        """The device that the parameter names. Raises ParameterError where there is none."""
        device = "auto" if self.device is None else self.device
        if not isinstance(device, str | torch.device):
            raise ParameterError(f"device is {device!r}", hint='give "auto", "cpu", "cuda" or "mps"')
        try:
            return pick_device(str(device))
        except ConfigError as error:
            raise ParameterError(error.message, hint='give "auto", "cpu", "cuda" or "mps"') from error

    def _model(self) -> Model:
        """The model, read when first needed and when a parameter that decides about it has changed.

        Raises ParameterError for parameters that do not fit each other.
        """
        key = (self.checkpoint, self.encoder, self.views, self.device)
        loaded: tuple[object, Model] | None = getattr(self, "_loaded", None)
        if loaded is None or loaded[0] != key:
            if self.views not in (None, 1, 2, 5, 6):
                raise ParameterError(f"views is {self.views!r}", hint="give 1, 2, 5, 6 or None")
            if self.encoder is not None and self.checkpoint is not None:
                raise ParameterError("a checkpoint has an encoder", hint="give one of checkpoint and encoder")
            given = None if self.checkpoint is None else _path(self.checkpoint)
            if self.encoder is None:
                model = open_model(given, self._device(), self.views)
            else:
                model = model_of_encoder(self.encoder, self._device(), views=self.views)
            loaded = self._loaded = (key, model)
        return loaded[1]

    def _fitted(self) -> Classifier:
        if not self.__sklearn_is_fitted__():
            raise NotFittedError(f"this {type(self).__name__} is not fitted yet", hint="call fit(images, labels) first")
        return self.classifier_

    def _features(self, X: Images, classifier: Classifier) -> Tensor:
        """Features (n, D) of n images. Raises InputError for an image that cannot be read."""
        with _input_errors():
            images = images_of(X)
        z = [image.features for image in self._encoded(images, classifier.model) if image.features is not None]
        return torch.stack(z) if z else torch.empty(0)

    def _encoded(self, images: Sequence[ImageLike], model: Model) -> Iterator[Encoded]:
        """The images one by one. Raises InputError for an image that cannot be read."""
        batch = None if self.batch_size is None else int(self._number("batch_size", 1))
        batches = encode_images(images, Encoding(model.images, batch))
        for number, image in enumerate(chain.from_iterable(batches)):
            if image.features is None:
                path = f", {image.path}" if isinstance(images[number], str | os.PathLike) else ""
                raise InputError(f"image {number}{path}: {image.reason}", hint="replace it or leave it out")
            yield image


@contextmanager
def _input_errors() -> Iterator[None]:
    """Raise an InputError for any other DataError, which is not a ValueError."""
    try:
        yield
    except InputError:
        raise
    except DataError as error:
        raise InputError(error.message, hint=error.hint) from error


def _warn_of_repeated(support: SupportSet) -> None:
    for path, twin in support.repeated[:SHOWN]:
        warnings.warn(f"image {path} is the same picture as {twin} and counts once", stacklevel=3)
    if len(support.repeated) > SHOWN:
        warnings.warn(f"{len(support.repeated)} images are repeated, and each picture counts once", stacklevel=3)


def _path(path: str | os.PathLike[str]) -> Path:
    """A path in which `~` is the home folder. Raises ParameterError for what is not a path."""
    if not isinstance(path, str | os.PathLike):
        raise ParameterError(f"{path!r} is not a path", hint="give a str or a pathlib.Path")
    return Path(path).expanduser()
