"""The confusions that the report shows as pictures."""

from metadiff_cli.commands.adapt.offenders import EACH, PAIRS, confused_pairs, query_mistakes
from metadiff_cli.commands.adapt.output import Outcome
from metadiff_cli.core.evaluation.support_check import Mistake


def test_both_directions_are_one_pair_and_the_surest_mistake_comes_first() -> None:
    mistakes = [Mistake("1", "a", "b", 0.5), Mistake("2", "b", "a", 0.9), Mistake("3", "c", "a", 0.99)]
    first, second = confused_pairs(mistakes)
    assert (first.classes, first.count, [m.path for m in first.mistakes]) == (("a", "b"), 2, ["2", "1"])
    assert (second.classes, second.count) == (("a", "c"), 1)


def test_few_of_many_are_shown() -> None:
    mistakes = [Mistake(f"{i}", "a", f"b{i % 5}", 0.5) for i in range(50)]
    pairs = confused_pairs(mistakes)
    assert len(pairs) == PAIRS and all(len(pair.mistakes) == EACH and pair.count == 10 for pair in pairs)


def test_only_wrong_labels_of_known_classes_are_mistakes() -> None:
    def labelled(truth: str | None, label: str, rejected: bool = False) -> Outcome:
        return Outcome(f"{truth}-{label}", ((label, 0.7),), truth=truth, rejected=rejected)

    outcomes = [
        labelled("a", "b"), labelled("a", "a"), labelled(None, "a"), labelled("foreign", "a"),
        labelled("b", "a", rejected=True), Outcome("broken", reason="damaged", truth="a"),
    ]  # fmt: skip
    assert query_mistakes(outcomes, ["a", "b"]) == [Mistake("a-b", "a", "b", 0.7)]
