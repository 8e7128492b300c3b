"""What `adapt` says of a support: how far to trust it, which images look mislabelled, and what it lacks."""

from dataclasses import asdict
from typing import Any

from metadiff_cli.classify.support_set import SupportSet
from metadiff_cli.commands.adapt.output import NAMED, shown
from metadiff_cli.core.evaluation.support_check import SupportCheck

HIGH = 0.5  # doubt from which on the user is told of it


def unlike_sentence(doubt: float | None) -> str:
    """A sentence on a support that is unlike the base classes, by its `doubt` from 0 to 1; empty for any other."""
    if doubt is None or doubt < HIGH:
        return ""
    return (
        "support: these images are unlike the classes that the model was made with, whose statistics count for less "
        "here; check it on images of known class (--labelled)"
    )


def check_sentences(check: SupportCheck | None, support: SupportSet) -> list[str]:
    """What held-out images say of the support: first the estimate, then each image that looks mislabelled."""
    if check is None:
        return []
    estimate = f"support: estimated accuracy {check.accuracy:.0f} % ({check.images} images held out in turn)"
    if left_out := single_images(support):
        more = ", ..." if len(left_out) > NAMED else ""
        estimate += f"; classes with one image are not in it: {', '.join(left_out[:NAMED])}{more}"
    if check.confused:
        first, second, _ = check.confused[0]
        estimate += f"; most confused: {shown(first)} / {shown(second)}"
    if check.lacking is not None:
        count = support.counts()[check.lacking]
        estimate += f"; one more image of {shown(check.lacking)}, which has {count}, would help most"
    return [estimate] + [
        f"{suspect.path} looks mislabelled: it is in '{shown(suspect.label)}' and looks like "
        f"'{shown(suspect.looks_like)}' ({suspect.confidence:.0%})"
        for suspect in check.suspects
    ]


def single_images(support: SupportSet) -> list[str]:
    """The classes with one image, which no image can be left out of."""
    return [name for name, count in support.counts().items() if count == 1]


def check_document(check: SupportCheck, support: SupportSet) -> dict[str, Any]:
    """The same as JSON."""
    return {
        "images": check.images,
        "left_out": single_images(support),
        "accuracy": round(check.accuracy, 4),
        "lacking": check.lacking,
        "confused": [{"classes": [first, second], "images": n} for first, second, n in check.confused],
        "suspects": [{**asdict(s), "confidence": round(s.confidence, 6)} for s in check.suspects],
    }
