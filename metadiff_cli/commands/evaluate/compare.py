"""`evaluate --compare OLD.json`: is the accuracy lower than in an earlier result, by more than chance?"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metadiff_cli.core.evaluation.evaluate import Protocol
from metadiff_cli.errors import ConfigError, GateError

MAX_FILE = 16 * 1024 * 1024  # bytes; a result has a few kilobytes
HINT = "give a file that `metadiff evaluate --json` or `metadiff metatrain` wrote, such as RUN/result.json"


@dataclass(frozen=True)
class Result:
    """An earlier result: its document, and the file that it was read from."""

    path: Path
    document: dict[str, Any]


def read_result(path: Path) -> Result:
    """A document that `evaluate --json` or `metatrain` wrote. Raises ConfigError for any other file."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE + 1)
        document = json.loads(raw) if len(raw) <= MAX_FILE else None
    except OSError as error:
        raise ConfigError(f"--compare {path} cannot be read ({error.strerror})", hint=HINT) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--compare {path} is not a JSON document ({error})", hint=HINT) from error
    if not isinstance(document, dict) or document.get("schema") != "metadiff.evaluate/1":
        raise ConfigError(f"--compare {path} is not the result of an evaluation", hint=HINT)
    try:
        own = document["methods"]["metadiff"]
        float(own["accuracy"]), float(own["ci95"])
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"--compare {path} has no accuracy of metadiff", hint=HINT) from error
    return Result(path, document)


def check_comparable(earlier: Result, protocol: Protocol, split: str, *, halves: bool) -> None:
    """Raise ConfigError when the earlier result comes from other episodes, or from another way of measuring."""
    now = {
        "way": protocol.way,
        "shot": protocol.shot,
        "query": protocol.query,
        "split": split,
        "protocol": "transductive" if protocol.transductive else "inductive",
        "imbalance": protocol.imbalance,
        "halves": halves or None,  # both keys are missing in results that have no use for them
    }
    old = {key: earlier.document.get(key) or None for key in now}
    differ = [f"{key} {old[key]} there, {now[key]} here" for key in now if old[key] != now[key]]
    if differ:
        raise ConfigError(
            f"{earlier.path} measured something else: {'; '.join(differ)}", hint="evaluate with the same options"
        )


def compared(new: dict[str, Any], earlier: Result) -> dict[str, Any]:
    """The entry `compared` of the new document: the earlier accuracy, the change, and whether it is a drop."""
    now, before = new["methods"]["metadiff"], earlier.document["methods"]["metadiff"]
    change = now["accuracy"] - before["accuracy"]
    return {
        "file": str(earlier.path),
        "accuracy": before["accuracy"],
        "ci95": before["ci95"],
        "change": round(change, 4),
        "dropped": -change > now["ci95"] + before["ci95"],
    }


def check_no_drop(new: dict[str, Any]) -> None:
    """Raise GateError when the accuracy is lower than before and the two intervals lie apart."""
    found = new["compared"]
    if found["dropped"]:
        now = new["methods"]["metadiff"]
        raise GateError(
            f"accuracy dropped by {-found['change']:.2f} points, from {found['accuracy']:.2f} ± {found['ci95']:.2f} "
            f"to {now['accuracy']:.2f} ± {now['ci95']:.2f} %: the intervals lie apart",
            hint=f"the results above are complete; {found['file']} holds the earlier ones",
        )


def describe(new: dict[str, Any]) -> str:
    """The comparison as one line of text."""
    found = new["compared"]
    verdict = "lower, and the intervals lie apart" if found["dropped"] else "no drop beyond the two intervals"
    return (
        f"compared with {found['file']}: {found['change']:+.2f} points "
        f"({found['accuracy']:.2f} ± {found['ci95']:.2f} before), {verdict}"
    )
