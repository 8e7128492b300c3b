"""The Python interface: a classifier that follows scikit-learn's conventions and does not need scikit-learn.

>>> from metadiff_cli import FewShotClassifier
>>> classifier = FewShotClassifier.from_pretrained()  # or the path of a checkpoint
>>> classifier.fit(["imgs/cat/1.jpg", "imgs/dog/1.jpg"], ["cat", "dog"])
>>> classifier.predict(["q/1.jpg", "q/2.jpg"])
array(['dog', 'cat'], dtype='<U3')
"""

import importlib
import inspect
import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Self, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from metadiff_cli.classify.images import adapt_classifier, classifier_rejector
from metadiff_cli.commands.options import checkpoint_path
from metadiff_cli.core.checkpoints.classifier import Origin, load_classifier, save_classifier
from metadiff_cli.core.checkpoints.model import Model, SavedClassifier, load_model
from metadiff_cli.core.device import pick_device
from metadiff_cli.core.encoders.bank import Encoding
from metadiff_cli.core.encoders.image_encoder import ImageEncoder
from metadiff_cli.core.method.adapt import Sampling
from metadiff_cli.core.method.support import FEWEST_CLASSES, SupportSet, digest_of
from metadiff_cli.data.cache import decode_images
from metadiff_cli.data.images import to_square, upright_rgb
from metadiff_cli.errors import ConfigError, DataError, MetaDiffError

ImageLike: TypeAlias = "str | os.PathLike[str] | Image.Image | np.ndarray"
Images: TypeAlias = "np.ndarray | Sequence[ImageLike]"


class NotFittedError(MetaDiffError, ValueError, AttributeError):
    """Prediction before `fit` or `load`; the same bases as scikit-learn's error of this name."""


class InputError(DataError, ValueError):
    """Images or labels that cannot be used; scikit-learn's conventions want a ValueError."""


class ParameterError(ConfigError, ValueError):
    """A parameter of the class that is unknown or cannot be used."""


class FewShotClassifier:
    """Learn classes from a few images each, with a trained checkpoint and no training.

    Parameters
    ----------
    checkpoint : path of a `checkpoint.safetensors`; None for the one that comes with the package.
    guidance : scale of the support gradient, above 0; "auto" chooses it from the support.
    steps : denoising steps S.
    samples : classifiers M whose probabilities are averaged.
    temperature : noise temperature, 0 for the posterior mean.
    random_state : seed of the noise, an int; without effect at temperature 0.
    device : "auto", "cpu", "cuda" or "mps".
    batch_size : images of one forward pass of the encoder.

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
        guidance: float | str = "auto",
        steps: int = 10,
        samples: int = 1,
        temperature: float = 0.0,
        random_state: int = 0,
        device: str = "auto",
        batch_size: int = 64,
    ) -> None:
        self.checkpoint = checkpoint
        self.guidance = guidance
        self.steps = steps
        self.samples = samples
        self.temperature = temperature
        self.random_state = random_state
        self.device = device
        self.batch_size = batch_size

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str] | None = None, **parameters: Any) -> Self:
        """An unfitted classifier whose checkpoint is loaded now. Raises CheckpointError when there is none at `path`.

        `parameters` are those of the class.
        """
        classifier = cls(path, **parameters)
        classifier._model()
        return classifier

    def fit(self, X: Images, y: Sequence[Any] | np.ndarray) -> Self:
        """Adapt to n labelled images X with labels y (n,). Labels may be text, whole numbers or booleans.

        Raises InputError for fewer than two classes, labels that do not fit the images, and images that cannot be read.
        """
        sampling = self._sampling()
        classes, labels = _classes_of(y)
        items = _items(X)
        if len(items) != len(labels):
            raise InputError(f"{len(items)} images but {len(labels)} labels", hint="give one label per image")
        model = self._model()
        features, digests = _encode(items, model.images, self.batch_size)
        names = tuple(str(label) for label in classes)
        paths = tuple(os.fspath(x) if isinstance(x, str | os.PathLike) else str(i) for i, x in enumerate(items))
        support = SupportSet(names, features, labels, digests, paths)
        self._origin = Origin(model, support)
        self.classifier_ = adapt_classifier(model, support, sampling, seed=self.random_state)
        self.classes_ = classes
        return self

    def predict_proba(self, X: Images) -> np.ndarray:
        """Probabilities (n, N) float64 of n images, columns in the order of `classes_`.

        Raises InputError for an image that cannot be read, NotFittedError before `fit`.
        """
        ready = self._fitted()
        items = _items(X)
        if not items:
            return np.empty((0, len(self.classes_)))
        z, _ = _encode(items, ready.images, self.batch_size)
        p: np.ndarray = ready.probabilities(z).cpu().numpy().astype(np.float64)
        rows: np.ndarray = p / p.sum(axis=1, keepdims=True)  # to the precision of float64
        return rows

    def known_margin(self, X: Images) -> np.ndarray:
        """How far (n,) the known score of n images is above the threshold of rejection, in nats; below 0: of no class.

        The threshold rejects 5 % of images of known classes, on the classes that it was fitted on. Raises as
        `predict_proba` does, and CheckpointError when the checkpoint has no fitted threshold.
        """
        ready = self._fitted()
        rejector = classifier_rejector(self._origin.model, self._origin.support, ready)
        items = _items(X)
        if not items:
            return np.empty(0)
        z, _ = _encode(items, ready.images, self.batch_size)
        margins: np.ndarray = rejector.margins(z.unsqueeze(0))[0].cpu().numpy().astype(np.float64)
        return margins

    def is_known(self, X: Images) -> np.ndarray:
        """Whether (n,) each image looks like one of the classes, by `known_margin`; for others `predict` guesses."""
        known: np.ndarray = self.known_margin(X) >= 0
        return known

    def predict(self, X: Images) -> np.ndarray:
        """The most probable label (n,) of each image; raises as `predict_proba` does."""
        best: np.ndarray = self.predict_proba(X).argmax(axis=1)
        labels: np.ndarray = self.classes_[best]
        return labels

    def score(self, X: Images, y: Sequence[Any] | np.ndarray) -> float:
        """Share of the images X whose predicted label is the one in y (n,)."""
        predicted, wanted = self.predict(X), np.asarray(y)
        if predicted.shape != wanted.shape:
            raise InputError(f"{len(predicted)} images but labels of shape {wanted.shape}", hint="give one per image")
        if (predicted.dtype.kind == "U") != (wanted.dtype.kind in "UO"):
            raise InputError(
                f"labels of type {wanted.dtype} for classes of type {predicted.dtype}",
                hint="after load the classes are text: give str labels",
            )
        return float(np.mean(predicted == wanted))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the adapted classifier, for `load` and for `metadiff adapt --classifier`."""
        save_classifier(Path(path), self._fitted(), self._origin)

    @classmethod
    def load(cls, path: str | os.PathLike[str], **parameters: Any) -> Self:
        """A fitted classifier from a file of `save` or of `metadiff adapt --save`; its classes are text.

        Raises CheckpointError for any other file. `fit` would start anew, from the checkpoint of the parameters.
        """
        classifier = cls(**parameters)
        classifier.classifier_, classifier._origin = load_classifier(Path(path), pick_device(classifier.device))
        classifier.classes_ = np.array(classifier.classifier_.classes)
        return classifier

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The parameters by name, as scikit-learn's `clone` and searches ask for them."""
        return {name: getattr(self, name) for name in self._parameter_names()}

    def set_params(self, **parameters: Any) -> Self:
        """Change parameters; takes effect at the next `fit`. Raises ParameterError for an unknown one."""
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
        """Without the checkpoint, which is loaded again where it is needed."""
        return {name: value for name, value in vars(self).items() if name != "_loaded"}

    def __sklearn_is_fitted__(self) -> bool:
        """Whether `fit` or `load` was called."""
        return hasattr(self, "classifier_")

    def __sklearn_tags__(self) -> Any:
        """What scikit-learn, which alone calls this, wants to know: a classifier of images, not of feature tables."""
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
        """The sampler's settings. Raises ParameterError for values that cannot be used."""
        guidance = None if self.guidance == "auto" else self.guidance
        if guidance is not None and not (isinstance(guidance, int | float) and guidance > 0):
            raise ParameterError(f"guidance is {guidance!r}", hint='give "auto" or a number above 0')
        for name, fewest in (("steps", 1), ("samples", 1), ("temperature", 0), ("random_state", 0), ("batch_size", 1)):
            value = getattr(self, name)
            if not isinstance(value, (int, float, np.number) if name == "temperature" else (int, np.integer)):
                raise ParameterError(f"{name} is {value!r}", hint="give a number")
            if value < fewest:
                raise ParameterError(f"{name} is {value}", hint=f"give at least {fewest}")
        return Sampling(self.steps, self.samples, self.temperature, guidance)

    def _model(self) -> Model:
        """The checkpoint, read when first needed and when `checkpoint` or `device` has changed."""
        key = (self.checkpoint, self.device)
        loaded: tuple[object, Model] | None = getattr(self, "_loaded", None)
        if loaded is None or loaded[0] != key:
            given = None if self.checkpoint is None else Path(self.checkpoint)
            loaded = self._loaded = (key, load_model(checkpoint_path(given), pick_device(self.device)))
        return loaded[1]

    def _fitted(self) -> SavedClassifier:
        if not self.__sklearn_is_fitted__():
            raise NotFittedError(f"this {type(self).__name__} is not fitted yet", hint="call fit(images, labels) first")
        return self.classifier_


def _classes_of(y: Sequence[Any] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sorted classes (N,), and of each label (n,) its number among them."""
    given = np.asarray(y)
    if given.ndim != 1:
        raise InputError(f"labels of shape {given.shape}", hint="give one label per image, shape (n,)")
    if given.dtype.kind == "O" and all(isinstance(label, str) for label in given):
        given = given.astype(np.str_)
    whole = given.dtype.kind == "f" and bool(np.all(given % 1 == 0))
    if given.dtype.kind not in "Uiub" and not whole:
        raise InputError(f"labels of type {given.dtype}", hint="give text, whole numbers or booleans")
    classes, labels = np.unique(given, return_inverse=True)
    if len(classes) < FEWEST_CLASSES:
        raise InputError(f"the labels hold {len(classes)} class", hint="give images of two classes or more")
    return classes, labels


def _items(X: Images) -> list[ImageLike]:
    """The single images. Raises InputError for one path or image where a sequence is meant."""
    if isinstance(X, str | os.PathLike | Image.Image) or not hasattr(X, "__len__"):
        raise InputError(f"a single {type(X).__name__} instead of a sequence", hint="put it into a list: [image]")
    if isinstance(X, np.ndarray) and X.ndim not in (1, 4):
        raise InputError(f"an array of shape {X.shape}", hint="give images as uint8 of shape (n, height, width, 3)")
    return list(X)


def _encode(items: Sequence[ImageLike], images: ImageEncoder, batch: int) -> tuple[Tensor, tuple[bytes, ...]]:
    """Features (n, D) and digests, a batch of pixels in memory at a time."""
    encode, parts, digests = Encoding(images, batch), [], []
    for pixels in batched(_pixels(items, images.size), batch):
        parts.append(encode(np.stack(pixels)))
        digests += [digest_of(single) for single in pixels]
    return torch.cat(parts), tuple(digests)


def batched(items: Iterator[np.ndarray], size: int) -> Iterator[list[np.ndarray]]:
    """Lists of `size` items, the last one perhaps shorter (itertools.batched is of Python 3.12)."""
    while part := list(islice(items, size)):
        yield part


def _pixels(items: Sequence[ImageLike], size: int) -> Iterator[np.ndarray]:
    """Pixels (size, size, 3) uint8 of each image in order; files are decoded by several threads."""
    files = decode_images([Path(item) for item in items if isinstance(item, str | os.PathLike)], size)
    for i, item in enumerate(items):
        if isinstance(item, str | os.PathLike):
            path, decoded = next(files)
            if isinstance(decoded, str):
                raise InputError(f"image {i}, {path}: {decoded}", hint="replace it or leave it out")
            yield decoded
        else:
            yield to_square(_opened(item, i), size)


def _opened(item: Any, number: int) -> Image.Image:
    """RGB of a Pillow image or of an array."""
    if isinstance(item, np.ndarray):
        if item.dtype != np.uint8 or item.ndim != 3 or item.shape[2] != 3 or 0 in item.shape:
            raise InputError(
                f"image {number} is an array {item.dtype} of shape {item.shape}",
                hint="give uint8 of shape (height, width, 3)",
            )
        return Image.fromarray(np.ascontiguousarray(item))
    if not isinstance(item, Image.Image):
        raise InputError(f"image {number} is a {type(item).__name__}", hint="give a path, a Pillow image or an array")
    try:
        return upright_rgb(item)
    except OSError as error:  # a file that Pillow opened but cannot decode
        raise InputError(f"image {number}: {error}", hint="replace it or leave it out") from error
