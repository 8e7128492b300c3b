"""Whether the data suffice for every episode of a run. Asked before anything is trained; what can be lowered is."""

from collections.abc import Callable, Container, Mapping, Sequence
from typing import TypeVar

import numpy as np

from metadiff_cli.config.schema import Config, Section
from metadiff_cli.core.baselines.learners import ON_FEATURES, ON_IMAGES
from metadiff_cli.core.training.losses import Pairs
from metadiff_cli.core.training.metatrain import classes_needed, images_needed
from metadiff_cli.errors import DataError

Counts = Mapping[str, int]  # class -> number of images
Note = Callable[[str], None]
FEWEST = 2  # classes of an episode

Some = TypeVar("Some", bound=Section)


def too_small(splits: Mapping[str, Counts], note: Note) -> list[str]:
    """Names of validation and test splits with too few classes for an episode; each is said and to be left out.

    Raises DataError when the base classes are too few.
    """
    if len(splits["train"]) < FEWEST:
        raise DataError("there is 1 base class, and training needs two", hint="add a folder of images per class")
    found = [name for name in ("val", "test") if name in splits and len(splits[name]) < FEWEST]
    for name in found:
        without = "nothing is selected by its accuracy" if name == "val" else "other classes are measured"
        note(f"there is 1 {name} class, and an episode needs two: it is left out, and {without}")
    return found


def measured_split(splits: Container[str]) -> str:
    """The name of the split that the final table is measured on."""
    return next(name for name in ("test", "val", "train") if name in splits)


def drawn_splits(splits: Container[str], *, several: bool, validated: bool) -> list[str]:
    """The names of the splits of the first data set whose episodes have to be as the configuration has them.

    With `several` data sets, each one's validation classes have the episodes that they can fill. So has the final
    table where data sets were given for validation (`validated`).
    """
    if not several:
        return ["val", measured_split(splits)]
    return [] if validated else [measured_split(splits)]


def fitted(
    config: Config, splits: Mapping[str, Counts], stages: Sequence[str], drawn: Sequence[str], note: Note
) -> Config:
    """The configuration with ways, shots and queries that the data can fill; each change is said.

    `splits` has the classes of those splits that are used, and `drawn` names those among them that validation and the
    final table draw episodes of; `stages` are the names of what is trained. Raises DataError for a class with too few
    images, or too few classes for pairs.
    """
    method, p = stages[-1], config.pretrain
    if "pretrain" in stages and p.objective == "pairs":
        counts = list(splits["train"].values())
        Pairs(np.repeat(np.arange(len(counts)), counts), 4 if p.rotated_classes else 1, p.batch // 2)
    if method == "pretrain":
        return config
    if found := {name: splits[name] for name in dict.fromkeys(drawn) if name in splits}:
        config = _fitted_evaluation(config, found, splits["train"], method, note)
    if method == "metadiff" and config.denoiser.kind != "analytic":
        return _fitted_metatraining(config, splits["train"], note)
    if method in (*ON_FEATURES, *ON_IMAGES):
        return _fitted_baseline(config, splits["train"], method, note)
    return config


def _fitted_evaluation(config: Config, drawn: Mapping[str, Counts], train: Counts, method: str, note: Note) -> Config:
    """Ways and queries of the episodes of validation, fitting and table."""
    e = config.evaluation
    ways = {name: len(classes) for name, classes in drawn.items()}
    if method != "metadiff":  # a baseline serves the ways that it is trained for
        turns = 4 if method in ON_IMAGES and config.baselines.images.rotated_classes else 1
        ways["train"] = turns * len(train)
    name = min(ways, key=lambda split: ways[split])
    if ways[name] < e.way:
        note(f"there are {ways[name]} {name} classes: episodes are {ways[name]}-way, not {e.way}-way")
    query = min(_room(drawn[split], f"{split} ", e.shot, "evaluation.shot") for split in drawn)
    if query < e.query:
        note(f"classes have too few images for {e.shot} + {e.query} per episode: {query} are queries")
    lowered = {"way": min(e.way, ways[name]), "query": min(e.query, query)}
    smallest = min(count for classes in drawn.values() for count in classes.values())
    fits = tuple(shot for shot in e.card_shots if shot + lowered["query"] <= smallest)
    if fits != e.card_shots:
        note(f"classes have too few images for evaluation.card_shots={list(e.card_shots)}: {list(fits)} are left")
    return _with(config, evaluation=_with(e, **lowered, card_shots=fits))


def _fitted_metatraining(config: Config, train: Counts, note: Note) -> Config:
    """Shots and queries of the episodes of base classes, as half of the classes or more can fill them.

    Smaller classes are left out of the training, and where too few are left there is none.
    """
    m = config.metatrain
    images = sorted(train.values())[len(train) // 2] - 1  # one makes the target
    query = min(m.query, max(1, images // 2, images - m.shots[1]), images - m.shots[0])
    most = min(m.shots[1], images - query)
    fits = _with(m, query=query, shots=(m.shots[0], most))
    left = sum(count >= images_needed(fits) for count in train.values()) if query > 0 else 0
    if left < classes_needed(config.denoiser.kind):
        note(
            f"base classes are too few, or too small, to train a denoiser ({len(train)}, half of them with "
            f"{images + 1} images or more): the analytic one is taken"
        )
        return _with(config, denoiser=_with(config.denoiser, kind="analytic"))
    if fits != m:
        note(f"base classes have {images + 1} images: meta-training takes at most {most} + {query} of them per episode")
    if left < len(train):
        note(f"{len(train) - left} base classes with fewer than {images_needed(fits)} images make no training tasks")
    return _with(config, metatrain=fits)


def _fitted_baseline(config: Config, train: Counts, method: str, note: Note) -> Config:
    """Queries of the episodes that a baseline is trained on."""
    section = "frozen" if method in ON_FEATURES else "images"
    settings = getattr(config.baselines, section)
    query = _room(train, "base ", config.evaluation.shot, "evaluation.shot")
    if query >= settings.query:
        return config
    note(f"base classes have too few images for {settings.query} queries: {method} is trained with {query}")
    return _with(config, baselines=_with(config.baselines, **{section: _with(settings, query=query)}))


def _room(classes: Counts, kind: str, shot: int, setting: str) -> int:
    """How many queries the smallest class leaves beside `shot` support images. Raises DataError when it leaves none."""
    few = [name for name, count in classes.items() if count <= shot]
    if few:
        name, more = few[0], f" (and {len(few) - 1} more)" if len(few) > 1 else ""
        images = "1 image" if classes[name] == 1 else f"{classes[name]} images"
        lower = f", or lower --set {setting}" if shot > 1 else ""
        raise DataError(
            f"{kind}class '{name}'{more} has {images}, and an episode needs {shot + 1}: {shot} for support and a query",
            hint=f"add images or leave the class out{lower}",
        )
    return min(classes.values()) - shot


def _with(section: Some, **changes: object) -> Some:
    return section.model_copy(update=changes)
