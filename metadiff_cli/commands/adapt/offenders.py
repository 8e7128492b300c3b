"""What the report shows first: support images that look mislabelled, and the classes that are confused most."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from metadiff_cli.commands.adapt.output import Outcome
from metadiff_cli.core.evaluation.mistakes import Mistake

SUSPECTS, PAIRS, EACH = 12, 3, 3  # at most so many mislabelled images, pairs of classes, and images of a pair


@dataclass(frozen=True)
class ConfusedPair:
    """Two classes with the number of images that were taken for the other one, and the surest of these mistakes."""

    classes: tuple[str, str]
    count: int
    mistakes: Sequence[Mistake]


def query_mistakes(outcomes: Iterable[Outcome], classes: Collection[str]) -> list[Mistake]:
    """The query images of one of the classes that were labelled as another one."""
    return [
        Mistake(o.path, o.truth, o.label, o.confidence)
        for o in outcomes
        if o.truth in classes and o.label not in (None, o.truth) and o.truth is not None and o.label is not None
    ]


def confused_pairs(mistakes: Iterable[Mistake]) -> list[ConfusedPair]:
    """The pairs of classes with the most mistakes, most first."""
    of_pair: defaultdict[tuple[str, str], list[Mistake]] = defaultdict(list)
    for mistake in mistakes:
        first, second = sorted((mistake.label, mistake.looks_like))
        of_pair[first, second].append(mistake)
    most = sorted(of_pair.items(), key=lambda item: (-len(item[1]), item[0]))[:PAIRS]
    return [
        ConfusedPair(pair, len(found), sorted(found, key=lambda m: (-m.confidence, m.path))[:EACH])
        for pair, found in most
    ]
