"""The Python interface: scikit-learn's conventions, every kind of image, the same answers as the command line.

Which part of scikit-learn's `check_estimator` applies: it feeds tables of numbers (n, features), and images are none.
Of a classifier whose tags say so it checks that it can be cloned, warns and stops. `test_checks_of_parameters` runs the
other checks that look at parameters alone, and `test_check_estimator_on_rows_drawn_as_images` all the rest, on
a subclass that draws each row of numbers as an image. What fails there, and why, is in ROWS_ARE_NO_IMAGES.
"""

import json
import pickle
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from metadiff_cli import FewShotClassifier
from metadiff_cli.api import InputError, NotFittedError
from metadiff_cli.errors import CheckpointError, MetaDiffError
from tests.worlds import COLOURS, Result, paint

sklearn = pytest.importorskip("sklearn", reason="scikit-learn is not installed; it is in the extra [dev]")
from sklearn.base import clone, is_classifier  # noqa: E402
from sklearn.model_selection import GridSearchCV, cross_val_score  # noqa: E402
from sklearn.pipeline import make_pipeline  # noqa: E402
from sklearn.preprocessing import FunctionTransformer  # noqa: E402
from sklearn.utils import estimator_checks, validation  # noqa: E402

ROWS_ARE_NO_IMAGES = {
    "check_estimators_unfitted": "wants scikit-learn's own NotFittedError; ours has the same bases and needs no import",
    "check_methods_subset_invariance": "float32 convolutions differ in the seventh digit with the size of the batch",
}


def folder(photos: Path) -> tuple[list[str], list[str]]:
    """Paths and labels of the support folder."""
    paths = sorted((photos / "support").glob("*/*.png"))
    return [str(path) for path in paths], [path.parent.name for path in paths]


def queries(photos: Path) -> list[str]:
    return sorted(str(path) for path in (photos / "query").iterdir())


@pytest.fixture
def fitted(photos: Path, checkpoint: Path) -> FewShotClassifier:
    return FewShotClassifier.from_pretrained(checkpoint).fit(*folder(photos))


def test_the_same_as_the_command_line(
    cli: Callable[..., Result], photos: Path, checkpoint: Path, fitted: FewShotClassifier
) -> None:
    result = cli("adapt", "-S", photos / "support", "-Q", photos / "query", "-c", checkpoint, "--json")
    predictions = json.loads(result.out)["predictions"]
    assert fitted.classes_.tolist() == sorted(COLOURS)
    assert fitted.predict(queries(photos)).tolist() == [p["label"] for p in predictions]
    confidence = fitted.predict_proba(queries(photos)).max(axis=1)
    assert confidence == pytest.approx([p["confidence"] for p in predictions], abs=1e-5)


def test_probabilities_are_distributions(photos: Path, fitted: FewShotClassifier) -> None:
    p = fitted.predict_proba(queries(photos))
    assert p.shape == (4, 4) and p.dtype == np.float64 and (p >= 0).all()
    assert p.sum(axis=1) == pytest.approx(1, abs=1e-12)
    assert fitted.predict_proba([]).shape == (0, 4) and fitted.predict([]).shape == (0,)


def test_paths_pictures_and_arrays_are_the_same(photos: Path, checkpoint: Path, fitted: FewShotClassifier) -> None:
    paths, labels = folder(photos)
    arrays = [np.asarray(Image.open(path).convert("RGB")) for path in paths]
    wanted = fitted.predict_proba(paths)
    kinds: list[Any] = [
        [Path(path) for path in paths], np.array(paths), [Image.open(path) for path in paths], arrays,
        np.stack(arrays), [p if i % 2 else a for i, (p, a) in enumerate(zip(paths, arrays, strict=True))],
    ]  # fmt: skip
    for images in kinds:
        again = FewShotClassifier(checkpoint).fit(images, labels)
        assert np.allclose(again.predict_proba(images), wanted, atol=1e-6)


def test_a_picture_is_prepared_as_a_file_is(tmp_path: Path, photos: Path, fitted: FewShotClassifier) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (30, 50, 4), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.fromarray(pixels).save(tmp_path / "odd.png", exif=exif)
    with Image.open(tmp_path / "odd.png") as image:
        assert np.allclose(fitted.predict_proba([image]), fitted.predict_proba([tmp_path / "odd.png"]))


def test_labels_may_be_numbers(photos: Path, checkpoint: Path, fitted: FewShotClassifier) -> None:
    paths, labels = folder(photos)
    numbers = [sorted(COLOURS).index(label) + 9 for label in labels]  # 9, 10, ...: text would sort otherwise
    by_number = FewShotClassifier(checkpoint).fit(paths, numbers)
    assert by_number.classes_.tolist() == [9, 10, 11, 12]
    assert np.allclose(by_number.predict_proba(paths), fitted.predict_proba(paths), atol=1e-5)
    assert by_number.score(paths, numbers) == fitted.score(paths, labels)
    flags = FewShotClassifier(checkpoint).fit(paths, [label == "red" for label in labels])
    assert flags.predict(paths).dtype == bool


class Table:
    """A table of one column, as pandas has them."""

    def __init__(self, values: list[Any]) -> None:
        self.values = np.array(values, dtype=object)[:, None]

    def __len__(self) -> int:
        return len(self.values)

    def __iter__(self) -> Iterator[str]:
        return iter(["path"])  # the names of its columns

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.values


def test_tables_of_one_column_and_objects_are_what_they_hold(photos: Path, checkpoint: Path) -> None:
    paths, labels = folder(photos)
    numbers = [sorted(COLOURS).index(label) for label in labels]
    for images, wanted in [(Table(paths), Table(labels)), (paths, np.array(numbers, dtype=object)),
                           (np.array(paths)[:, None], [label == "red" for label in labels])]:  # fmt: skip
        fitted = FewShotClassifier(checkpoint).fit(images, wanted)  # type: ignore[arg-type]
        flat = np.asarray(wanted).ravel()
        assert fitted.classes_.tolist() == sorted(set(flat.tolist())) and fitted.score(images, wanted) > 0.5  # type: ignore[arg-type]


def test_parameters_may_be_of_numpy_and_of_torch(photos: Path, checkpoint: Path) -> None:
    plain = FewShotClassifier(checkpoint, guidance=4.0, steps=3, samples=1).fit(*folder(photos))
    for device in (None, torch.device("cpu")):
        other = FewShotClassifier(checkpoint, guidance=np.float32(4), steps=np.int64(3), samples=np.int32(1),
                                  temperature=np.float64(0), device=device)  # fmt: skip
        assert np.array_equal(other.fit(*folder(photos)).predict_proba(queries(photos)),
                              plain.predict_proba(queries(photos)))  # fmt: skip


def test_draws_take_more_steps(photos: Path, checkpoint: Path) -> None:
    draw: dict[str, Any] = {"temperature": 1.0, "samples": 2}
    hundred = FewShotClassifier(checkpoint, steps=100, **draw).fit(*folder(photos))
    default = FewShotClassifier(checkpoint, **draw).fit(*folder(photos))
    assert np.array_equal(default.predict_proba(queries(photos)), hundred.predict_proba(queries(photos)))
    with pytest.warns(UserWarning, match="20 steps draw classifiers that differ too little"):
        FewShotClassifier(checkpoint, steps=20, **draw).fit(*folder(photos))


def test_a_picture_given_twice_is_what_the_command_line_makes_of_it(
    cli: Callable[..., Result], photos: Path, checkpoint: Path
) -> None:
    shutil.copy(photos / "support" / "blue" / "0.png", photos / "support" / "blue" / "copy.png")
    with pytest.warns(UserWarning, match=r"copy\.png is the same picture as .*0\.png and counts once"):
        fitted = FewShotClassifier(checkpoint).fit(*folder(photos))
    result = cli("adapt", "-S", photos / "support", "-Q", photos / "query", "-c", checkpoint, "--json")
    confidence = [p["confidence"] for p in json.loads(result.out)["predictions"]]
    assert fitted.predict_proba(queries(photos)).max(axis=1) == pytest.approx(confidence, abs=1e-6)
    shutil.copy(photos / "support" / "blue" / "0.png", photos / "support" / "red" / "other.png")
    with pytest.raises(InputError, match="the same picture is in two classes"):
        FewShotClassifier(checkpoint).fit(*folder(photos))


def test_numbers_as_classes_survive_an_extension(
    cli: Callable[..., Result], photos: Path, checkpoint: Path, tmp_path: Path
) -> None:
    """Python sorts 9 before 10, folders "10" before "9": each column is that of its class."""
    paths, labels = folder(photos)
    fitted = FewShotClassifier(checkpoint).fit(paths, [sorted(COLOURS).index(label) + 8 for label in labels])
    assert fitted.classes_.tolist() == [8, 9, 10, 11]
    fitted.save(tmp_path / "c.safetensors")
    for i in range(2):
        paint(tmp_path / "more" / "7" / f"{i}.png", (250, 250, 20), seed=i)
    grown = cli("adapt", "--classifier", tmp_path / "c.safetensors", "-S", tmp_path / "more", "-Q", photos / "query",
                "--json", "--save", tmp_path / "d.safetensors", "--top-k", "5")  # fmt: skip
    document = json.loads(grown.out)
    assert document["classes"] == ["10", "11", "7", "8", "9"]
    whole = [*paths, *sorted(map(str, (tmp_path / "more").glob("*/*")))]
    at_once = FewShotClassifier(checkpoint).fit(whole, [*(sorted(COLOURS).index(label) + 8 for label in labels), 7, 7])
    loaded = FewShotClassifier.load(tmp_path / "d.safetensors")
    wanted, found = at_once.predict_proba(queries(photos)), loaded.predict_proba(queries(photos))
    assert loaded.classes_.tolist() == document["classes"] and at_once.classes_.tolist() == [7, 8, 9, 10, 11]
    for i, prediction in enumerate(document["predictions"]):
        for entry in prediction["top"]:
            confidence = pytest.approx(entry["confidence"], abs=1e-5)
            assert found[i, document["classes"].index(entry["label"])] == confidence
            assert wanted[i, at_once.classes_.tolist().index(int(entry["label"]))] == confidence


@pytest.mark.parametrize("side", [64, 1500])
def test_a_photo_is_prepared_in_one_way(
    cli: Callable[..., Result], tmp_path: Path, photos: Path, fitted: FewShotClassifier, side: int
) -> None:
    """As a path, as a Pillow image, as an array, and by the command line; a large JPEG, too."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 255, (12, 16, 3), dtype=np.uint8)).resize((side, side * 3 // 4))
    file = tmp_path / "photo.jpg"
    coarse.save(file, quality=95)
    with Image.open(file) as image:
        found = fitted.predict_proba([file, image, np.asarray(Image.open(file).convert("RGB"))])
    assert np.array_equal(found[0], found[1]) and np.array_equal(found[0], found[2])
    fitted.save(tmp_path / "c.safetensors")
    result = cli("adapt", "--classifier", tmp_path / "c.safetensors", "-Q", file, "--json")
    assert json.loads(result.out)["predictions"][0]["confidence"] == pytest.approx(found[0].max(), abs=1e-6)


def test_a_tilde_is_the_home_folder(
    photos: Path, fitted: FewShotClassifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    fitted.save("~/c.safetensors")
    assert (tmp_path / "home" / "c.safetensors").is_file() and not (tmp_path / "~").exists()
    assert FewShotClassifier.load("~/c.safetensors").classes_.tolist() == sorted(COLOURS)


def test_score_is_the_share_of_right_labels(photos: Path, fitted: FewShotClassifier) -> None:
    predicted = fitted.predict(queries(photos))
    wanted = np.where(np.arange(4) < 3, predicted, "none of these")
    assert fitted.score(queries(photos), predicted) == 1.0 and fitted.score(queries(photos), wanted) == 0.75


def test_save_and_load(
    cli: Callable[..., Result], photos: Path, checkpoint: Path, fitted: FewShotClassifier, tmp_path: Path
) -> None:
    file = tmp_path / "colours.safetensors"
    fitted.save(file)
    loaded = FewShotClassifier.load(file)
    assert np.array_equal(loaded.predict_proba(queries(photos)), fitted.predict_proba(queries(photos)))
    shown = json.loads(cli("adapt", "--classifier", file, "-Q", photos / "query", "--json").out)
    assert [p["label"] for p in shown["predictions"]] == loaded.predict(queries(photos)).tolist()
    numbers = FewShotClassifier(checkpoint).fit(*folder(photos)).predict(queries(photos))
    with pytest.raises(InputError, match="give str labels"):
        loaded.score(queries(photos), range(len(numbers)))
    with pytest.raises(CheckpointError):
        FewShotClassifier.load(checkpoint)


def test_draws_follow_the_seed(photos: Path, checkpoint: Path) -> None:
    draw: dict[str, Any] = {"temperature": 1.0, "samples": 2}
    first, again, other = (
        FewShotClassifier(checkpoint, random_state=seed, **draw).fit(*folder(photos)).predict_proba(queries(photos))
        for seed in (3, 3, 4)
    )
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_clone_pickle_and_parameters(photos: Path, fitted: FewShotClassifier, checkpoint: Path) -> None:
    fitted.set_params(guidance=4.0)
    copy = clone(fitted)
    assert copy.get_params() == fitted.get_params() and not hasattr(copy, "classes_") and is_classifier(copy)
    assert repr(copy) == f"FewShotClassifier(checkpoint={checkpoint!r}, guidance=4.0)"
    thawed = pickle.loads(pickle.dumps(fitted))
    assert np.array_equal(thawed.predict_proba(queries(photos)), fitted.predict_proba(queries(photos)))
    assert not hasattr(thawed, "_loaded")
    assert thawed.fit(*folder(photos)).predict(queries(photos)).shape == (4,)


def test_cross_validation_search_and_pipelines(tmp_path: Path, checkpoint: Path) -> None:
    for c, (name, colour) in enumerate(COLOURS.items()):
        for i in range(4):
            paint(tmp_path / "support" / name / f"{i}.png", colour, seed=10 * c + i)
    paths, labels = folder(tmp_path)
    scores = cross_val_score(FewShotClassifier(checkpoint), paths, labels, cv=2, error_score="raise")
    assert scores.shape == (2,) and (scores > 0.25).all()
    search = GridSearchCV(FewShotClassifier(checkpoint), {"guidance": ["auto", 4.0]}, cv=2, error_score="raise")
    assert search.fit(paths, labels).best_params_["guidance"] in ("auto", 4.0)
    turned = make_pipeline(FunctionTransformer(lambda images: images[:, ::-1]), FewShotClassifier(checkpoint))
    images = np.stack([np.asarray(Image.open(path)) for path in paths])
    assert turned.fit(images, labels).predict(images).shape == (16,)


@pytest.mark.parametrize(("change", "words"), [
    ({"guidance": 0}, "above 0"), ({"guidance": "much"}, "above 0"), ({"steps": 0}, "at least 1"),
    ({"temperature": "hot"}, "give a number"), ({"random_state": None}, "give a whole number"),
    ({"temperature": float("nan")}, "give a number"), ({"temperature": float("inf")}, "give a number"),
    ({"guidance": float("nan")}, "above 0"), ({"guidance": np.float32("inf")}, "above 0"),
    ({"guidance": True}, "above 0"), ({"steps": 2.5}, "give a whole number"),
    ({"batch_size": "all"}, "give a whole number"),
    ({"device": "tpu"}, "unknown device"), ({"device": 3}, "device is 3"), ({"checkpoint": 3}, "3 is not a path"),
])  # fmt: skip
def test_bad_parameters_are_named_by_fit(checkpoint: Path, photos: Path, change: dict[str, Any], words: str) -> None:
    # not before: scikit-learn sets parameters as it likes
    classifier = FewShotClassifier(**{"checkpoint": checkpoint, **change})
    with pytest.raises(MetaDiffError, match=words) as caught:
        classifier.fit(*folder(photos))
    assert isinstance(caught.value, ValueError)
    with pytest.raises(ValueError, match="unknown parameter 'step'"):
        classifier.set_params(step=3)


def test_bad_images_and_labels_are_named(photos: Path, fitted: FewShotClassifier) -> None:
    paths, labels = folder(photos)
    (photos / "bad.png").write_bytes(b"no image")
    cut = photos / "cut.png"
    cut.write_bytes(Path(paths[0]).read_bytes()[:600])
    pixels = np.zeros((2, 8, 8, 3))
    for images, words in [
        ([paths[0], photos / "bad.png"], r"image 1, .*bad.png"), (["absent.png"], "does not exist"),
        (paths[0], "put it into a list"), (pixels, "uint8"), (pixels[0].astype(np.uint8), "height, width, 3"),
        (pixels[..., 0].astype(np.uint8)[..., None], "height, width, 3"), ([3], "image 0 is of type int"),
        ({"a.png": 1}, "no order"), (b"a.png", "put it into a list"), (np.zeros((2, 3)), r"shape \(2, 3\)"),
        ([Image.new("RGB", (0, 0))], "0 x 0 pixels"), ([np.zeros((0, 5, 3), np.uint8)], "5 x 0 pixels"),
        ([Image.new("1", (20_000, 9_000))], "image 0: 20000 x 9000 pixels, more than 178 million"),
    ]:  # fmt: skip
        with pytest.raises(InputError, match=words):
            fitted.predict(images)  # type: ignore[arg-type]
    with Image.open(cut) as broken, pytest.raises(InputError, match="image 0"):
        fitted.predict([broken])
    rest = labels[1:]
    for wrong, words in [(labels[:-1], "one label per image"), (["a"] * len(paths), "one class only"),
                         ([0.5, *range(9)], "label 0 is 0.5"), ([labels], "shape"), ([], "one label per image"),
                         ([None, *rest], r"label 0 is missing \(None\)"), (["", *rest], "label 0 is missing"),
                         ([*range(9), float("nan")], "label 9 is missing"), ([3, *rest], "text and whole numbers"),
                         ([b"a", *rest], "label 0 is b'a', of type bytes")]:  # fmt: skip
        with pytest.raises(InputError, match=words):
            fitted.fit(paths, wrong)


def test_not_fitted_and_no_checkpoint(checkpoint: Path, photos: Path) -> None:
    for method in ("predict", "predict_proba"):
        with pytest.raises(NotFittedError, match=r"call fit\(images, labels\) first"):
            getattr(FewShotClassifier(checkpoint), method)(queries(photos))
    assert issubclass(NotFittedError, ValueError) and issubclass(NotFittedError, AttributeError)
    with pytest.raises(CheckpointError):
        FewShotClassifier.from_pretrained(photos / "absent.safetensors")


def test_importing_the_package_is_light() -> None:
    code = (
        "import sys, metadiff_cli\n"
        "heavy = {'torch', 'numpy', 'PIL', 'sklearn', 'typer'} & set(sys.modules)\nassert not heavy, heavy\n"
        "metadiff_cli.FewShotClassifier\nassert 'torch' in sys.modules and 'sklearn' not in sys.modules\n"
        "assert not hasattr(metadiff_cli, 'nonsense')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", [
    "check_estimator_cloneable", "check_estimator_tags_renamed", "check_valid_tag_types", "check_estimator_repr",
    "check_no_attributes_set_in_init", "check_parameters_default_constructible", "check_get_params_invariance",
    "check_set_params", "check_mixin_order", "check_do_not_raise_errors_in_init_or_set_params",
])  # fmt: skip
def test_checks_of_parameters(name: str, checkpoint: Path) -> None:
    getattr(estimator_checks, name)("FewShotClassifier", FewShotClassifier(checkpoint))


class RowsAsImages(FewShotClassifier):
    """Draws each row of a table as an image, after scikit-learn's own checks of tables."""

    def fit(self, X: Any, y: Any) -> "RowsAsImages":
        X, y = validation.validate_data(self, X, y)
        from sklearn.utils.multiclass import check_classification_targets

        check_classification_targets(y)
        return super().fit(self._draw(X), y)

    def predict_proba(self, X: Any) -> np.ndarray:
        self._fitted()
        return super().predict_proba(self._draw(validation.validate_data(self, X, reset=False)))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = True
        return tags

    @staticmethod
    def _draw(X: np.ndarray) -> np.ndarray:
        """Bar charts (n, 28, 28, 3): column j of a row sets the height of the j-th bar; blue bars tell the decimals."""
        columns = X[:, np.arange(28) * X.shape[1] // 28]
        coarse, fine = 28 / (1 + np.exp(-columns / 2)), columns * 28 % 2
        heights = np.stack([coarse, coarse, fine], axis=-1)[:, None]
        return (np.clip(heights - np.arange(28)[:, None, None], 0, 1) * 255).astype(np.uint8)


def test_check_estimator_on_rows_drawn_as_images(checkpoint: Path) -> None:
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn warns of what it skips
        results = estimator_checks.check_estimator(
            RowsAsImages(checkpoint), on_fail=None, on_skip=None, expected_failed_checks=ROWS_ARE_NO_IMAGES
        )
    failed = {r["check_name"]: str(r["exception"]) for r in results if r["status"] == "failed"}
    assert not failed, "\n".join(f"{k}: {v}" for k, v in failed.items())
    assert sum(r["status"] == "passed" for r in results) > 40
