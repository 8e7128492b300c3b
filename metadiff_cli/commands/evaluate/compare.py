"""`evaluate --compare OLD.json`: has accuracy dropped by more than chance, against a result that was kept?"""

import json
from pathlib import Path
from typing import Any

from metadiff_cli.errors import ConfigError, GateError

MAX_FILE = 16 * 1024 * 1024  # bytes; a result has a few kilobytes
SAME = ("way", "shot", "query", "split", "protocol", "imbalance", "halves")  # two results compare where these agree


def read_result(path: Path) -> dict[str, Any]:
    """A document that `evaluate --json` or `metatrain` wrote. Raises ConfigError for anything else."""
    hint = "give a file that `metadiff evaluate --json` or `metadiff metatrain` wrote, such as RUN/result.json"
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE + 1)
        document = json.loads(raw) if len(raw) <= MAX_FILE else None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"--compare {path} cannot be read ({error})", hint=hint) from error
    if not isinstance(document, dict) or document.get("schema") != "metadiff.evaluate/1":
        raise ConfigError(f"--compare {path} is no result of an evaluation", hint=hint)
    try:
        method = document["methods"]["metadiff"]
        float(method["accuracy"]), float(method["ci95"])
        missing = [key for key in SAME[:4] if key not in document]
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"--compare {path} has no accuracy of metadiff", hint=hint) from error
    if missing:
        raise ConfigError(f"--compare {path} has no {', '.join(missing)}", hint=hint)
    return document


def check_comparable(old: dict[str, Any], path: Path, asked: dict[str, Any]) -> None:
    """Raise ConfigError when what is `asked` for is another measurement than the old one."""
    differ = [
        f"{key} {old.get(key)} there, {asked[key]} here"
        for key in SAME
        if (old.get(key) or None) != (asked[key] or None)
    ]
    if differ:
        raise ConfigError(f"{path} measured something else: {'; '.join(differ)}", hint="evaluate with the same options")


def compare(new: dict[str, Any], old: dict[str, Any], path: Path) -> dict[str, Any]:
    """What the new document says about the old: both accuracies, the change, and whether the intervals lie apart."""
    now, before = new["methods"]["metadiff"], old["methods"]["metadiff"]
    change = now["accuracy"] - before["accuracy"]
    return {
        "file": str(path),
        "accuracy": before["accuracy"],
        "ci95": before["ci95"],
        "change": round(change, 4),
        "dropped": -change > now["ci95"] + before["ci95"],
    }


def gate(new: dict[str, Any]) -> None:
    """Raise GateError when the accuracy dropped beyond both intervals."""
    found = new["compared"]
    if found["dropped"]:
        now = new["methods"]["metadiff"]
        raise GateError(
            f"accuracy dropped by {-found['change']:.2f} points, from {found['accuracy']:.2f} ± {found['ci95']:.2f} "
            f"to {now['accuracy']:.2f} ± {now['ci95']:.2f} %: the intervals lie apart",
            hint=f"the results above are complete; {found['file']} has the old ones",
        )


def describe(new: dict[str, Any]) -> str:
    """One line for a person."""
    found = new["compared"]
    verdict = "a drop beyond both intervals" if found["dropped"] else "no drop beyond both intervals"
    return (
        f"against {found['file']}: {found['change']:+.2f} points "
        f"({found['accuracy']:.2f} ± {found['ci95']:.2f} before), {verdict}"
    )
