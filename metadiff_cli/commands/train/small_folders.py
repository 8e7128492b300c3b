"""Whether the data suffice for every episode of a run. Asked before anything is trained; what can be lowered is."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np

from metadiff_cli.config.schema import Config, Section
from metadiff_cli.core.baselines.learners import ON_FEATURES, ON_IMAGES
from metadiff_cli.core.training.losses import Pairs
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


def fitted(config: Config, splits: Mapping[str, Counts], stages: Sequence[str], note: Note) -> Config:
    """The configuration with ways, shots and queries that the data can fill; each change is said.

    `splits` has the classes of those splits that are used, `stages` the names of what is trained. Raises DataError for
    a class with too few images, or too few classes for pairs.
    """
    method, p = stages[-1], config.pretrain
    if "pretrain" in stages and p.objective == "pairs":
        counts = list(splits["train"].values())
        Pairs(np.repeat(np.arange(len(counts)), counts), 4 if p.rotated_classes else 1, p.batch // 2)
    if method == "pretrain":
        return config
    measured = next(name for name in ("test", "val", "train") if name in splits)
    drawn = {name: splits[name] for name in dict.fromkeys(("val", measured)) if name in splits}
    config = _fitted_evaluation(config, drawn, splits["train"], method, note)
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
    """Shots and queries of the episodes of base classes."""
    m = config.metatrain
    smallest = _room(train, "base ", m.shots[0], "metatrain.shots") + m.shots[0]
    query = min(m.query, max(1, smallest // 2, smallest - m.shots[1]), smallest - m.shots[0])
    most = min(m.shots[1], smallest - query)
    if (query, most) == (m.query, m.shots[1]):
        return config
    note(f"base classes have {smallest} images: meta-training takes at most {most} + {query} of them per episode")
    return _with(config, metatrain=_with(m, query=query, shots=(m.shots[0], most)))


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
