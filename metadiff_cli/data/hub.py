"""Checkpoints on the Hugging Face Hub: `hf://USER/REPO/FILE@REVISION` in the place of a path.

The revision is pinned: a commit or a tag, since a branch may hold another file tomorrow. A file is downloaded once,
into the folder `hub` of the cache, and its sha256 is kept beside it. From then on the file in the cache is used,
without the network and without huggingface_hub, as long as it has that sha256.
"""

import hashlib
import importlib
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from metadiff_cli.errors import CheckpointError, ConfigError, MetaDiffError
from metadiff_cli.files import cache_dir, writable, write_text

FORM = "hf://USER/REPO/FILE@REVISION"
# pathlib makes one slash of two, and backslashes on Windows
REFERENCE = re.compile(r"hf:/{1,2}(?P<repo>[\w.-]+/[\w.-]+)/(?P<file>[^@]+)(@(?P<revision>[\w./+-]*))?")
COMMIT = re.compile("[0-9a-f]{40}")
NAMED = 5  # tags that an error names

Note = Callable[[str], None]


@dataclass(frozen=True)
class HubFile:
    """A file of a repository on the Hub at a revision."""

    repo: str
    file: str
    revision: str

    def __str__(self) -> str:
        return f"hf://{self.repo}/{self.file}@{self.revision}"

    def folder(self) -> Path:
        """Where the files of this revision are in the cache."""
        return writable(cache_dir()) / "hub" / self.repo / quote(self.revision, safe="+")


def fetch(given: Path | None, note: Note = lambda text: None) -> Path | None:
    """The local file of a reference to the Hub, downloaded if the cache does not have it; any other path as it is.

    `note` is told the sha256. Raises CheckpointError for a file that is not there or has changed in the cache,
    ConfigError for a reference without a pinned revision and where huggingface_hub is not installed, MetaDiffError if
    the Hub cannot be reached.
    """
    wanted = None if given is None else hub_file(given)
    if wanted is None:
        return given
    place = wanted.folder() / wanted.file
    record = place.with_name(f"{place.name}.sha256")
    if not (place.is_file() and record.is_file()):
        _download(wanted)
        write_text(record, f"{_sha256(place)}  {place.name}\n")  # `sha256sum -c` reads it
    digest = _sha256(place)
    if record.read_text(encoding="utf-8").split()[:1] != [digest]:
        raise CheckpointError(
            f"{place} has changed since it was downloaded: its sha256 is {digest}",
            hint=f"remove it and {record.name}, and it is downloaded again",
        )
    note(f"{wanted}: sha256 {digest}")
    return place


def shown(path: Path) -> str:
    """A path as text, and a reference to the Hub as it was given."""
    return str(hub_file(path) or path)


def hub_file(path: Path) -> HubFile | None:
    """The file on the Hub that `path` refers to, None for a local path. Raises ConfigError for half a reference."""
    text = str(path).replace("\\", "/")
    if not re.match("hf:/", text):
        return None
    found = REFERENCE.fullmatch(text)
    if found is None or ".." in text.split("/"):
        raise ConfigError(f"{text} is no file on the Hugging Face Hub", hint=f"write {FORM}")
    if not found["revision"]:
        raise ConfigError(
            f"{text} has no revision, so it could be another file tomorrow",
            hint=f"write {FORM} with a commit of 40 digits, or with a tag",
        )
    return HubFile(found["repo"], found["file"], found["revision"])


def _download(wanted: HubFile) -> None:
    """Bring the file to its folder; a download that was interrupted goes on."""
    with _hub_errors(wanted) as hub:
        hub.hf_hub_download(wanted.repo, wanted.file, revision=_commit(hub, wanted), local_dir=wanted.folder())


def _commit(hub: Any, wanted: HubFile) -> str:
    """The commit of the revision. Raises ConfigError for a branch, and CheckpointError for an unknown tag."""
    if COMMIT.fullmatch(wanted.revision):
        return wanted.revision
    refs = hub.HfApi().list_repo_refs(wanted.repo)
    tags = {ref.name: str(ref.target_commit) for ref in refs.tags}
    if wanted.revision in tags:
        return tags[wanted.revision]
    for branch in refs.branches:
        if branch.name == wanted.revision:
            raise ConfigError(
                f"{wanted}: {branch.name} is a branch, so it could be another file tomorrow",
                hint=f"give its commit of today, @{branch.target_commit}, or a tag",
            )
    known = f"it has {', '.join(sorted(tags)[:NAMED])}" if tags else "it has no tags: give a commit of 40 digits"
    raise CheckpointError(f"{wanted}: the repository has no tag {wanted.revision}", hint=known)


# the errors of huggingface_hub by name: what is wrong, and the next step
REFUSALS = {
    "GatedRepoError": ("its authors ask for an agreement first", "accept it on the page of the repository, and log in"),
    "RepositoryNotFoundError": ("there is no such repository, or it is private", "check the name; for a private one "
                                "log in with `hf auth login`"),
    "RevisionNotFoundError": ("the repository has no such revision", "give one of its commits or tags"),
    "RemoteEntryNotFoundError": ("the repository has no such file at this revision", "check the name of the file"),
    "HFValidationError": ("this is not the name of a repository", f"write {FORM}"),
}  # fmt: skip


@contextmanager
def _hub_errors(wanted: HubFile) -> Iterator[Any]:
    """Yield huggingface_hub, and raise a MetaDiffError for each of its errors."""
    try:
        hub = importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise ConfigError(
            f"{wanted} needs a package that is not installed ({error})",
            hint="install the extra [hub]: pip install huggingface_hub",
        ) from error
    log = logging.getLogger("huggingface_hub")
    level = log.level
    log.setLevel(max(level, logging.ERROR))  # the error at the end says what failed attempts warn of
    try:
        yield hub
    except MetaDiffError:
        raise
    except (OSError, ValueError) as error:  # all errors of the hub and of its HTTP client are of these kinds
        for kind in type(error).__mro__:
            if kind.__name__ in REFUSALS:
                what, hint = REFUSALS[kind.__name__]
                raise CheckpointError(f"{wanted}: {what}", hint=hint) from error
        raise MetaDiffError(
            f"{wanted} could not be downloaded ({_reason(error)})",
            hint="check the network, HTTPS_PROXY and HF_HUB_OFFLINE; once downloaded, it needs no network",
        ) from error
    finally:
        log.setLevel(level)


def _reason(error: BaseException) -> str:
    """The first line of the first cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
