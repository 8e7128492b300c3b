"""`hf://` checkpoints: pinned revisions, the sha256 beside the file, no network from the second time on, clear errors.

huggingface_hub itself runs here, against a small server on this computer that speaks the Hub's protocol.
"""

import hashlib
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from metadiff_cli import FewShotClassifier
from metadiff_cli.data.hub import FORM, HubFile, fetch, hub_file, shown
from metadiff_cli.errors import CheckpointError, ConfigError, MetaDiffError
from tests.worlds import Result, small_model

CLI = Callable[..., Result]
COMMIT, NEWER = "a" * 40, "b" * 40
WANTED = f"hf://someone/flowers/models/m.safetensors@{COMMIT}"
REFS = {
    "branches": [{"name": "main", "ref": "refs/heads/main", "targetCommit": NEWER}],
    "tags": [{"name": "v1.0", "ref": "refs/tags/v1.0", "targetCommit": COMMIT}],
    "converts": [],
}


class Hub(ThreadingHTTPServer):
    """A Hub with one repository; `content` is its only file, `asked` what was asked for."""

    def __init__(self, content: bytes) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.content = content
        self.asked: list[str] = []


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        self.server.asked.append(f"{self.command} {self.path}")
        if not self.path.removeprefix("/api/models").startswith("/someone/flowers/"):
            return self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
        if self.path.endswith("/refs"):
            return self._send(200, json.dumps(REFS).encode(), {"Content-Type": "application/json"})
        if f"/resolve/{COMMIT}/" not in self.path:
            return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        if not self.path.endswith("models/m.safetensors"):
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        tag = hashlib.sha256(self.server.content).hexdigest()
        self._send(200, self.server.content, {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT})

    do_HEAD = do_GET

    def _send(self, code: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *parts: object) -> None:
        """Print nothing."""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A running Hub whose file is a small model, and an empty cache."""
    constants = pytest.importorskip("huggingface_hub.constants", reason="huggingface_hub is the extra [hub]")
    server = Hub(small_model(tmp_path / "m.safetensors").read_bytes())
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    here = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", here)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", here + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("METADIFF_CACHE_DIR", str(tmp_path / "cache"))
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("revision", [COMMIT, "v1.0"])
def test_a_file_is_downloaded_once_with_its_sha256_beside_it(hub: Hub, revision: str, tmp_path: Path) -> None:
    wanted, told = Path(f"hf://someone/flowers/models/m.safetensors@{revision}"), list[str]()
    place = fetch(wanted, told.append)
    assert place == tmp_path / "cache" / "hub" / "someone" / "flowers" / revision / "models" / "m.safetensors"
    assert place.read_bytes() == hub.content
    digest = hashlib.sha256(hub.content).hexdigest()
    assert place.with_name("m.safetensors.sha256").read_text() == f"{digest}  m.safetensors\n"
    assert told == [f"{shown(wanted)}: sha256 {digest}"] and revision in told[0]
    count = len(hub.asked)
    assert fetch(wanted) == place and len(hub.asked) == count


def test_no_network_and_no_library_is_needed_from_then_on(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    place = fetch(Path(WANTED))
    hub.shutdown()
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert fetch(Path(WANTED)) == place


def test_a_changed_file_is_refused(hub: Hub) -> None:
    place = fetch(Path(WANTED))
    assert place is not None
    content = place.read_bytes()
    place.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="has changed since it was downloaded") as caught:
        fetch(Path(WANTED))
    assert "remove it" in str(caught.value)


@pytest.mark.parametrize(
    ("reference", "kind", "told"),
    [
        ("hf://someone/flowers/models/m.safetensors", ConfigError, "has no revision"),
        ("hf://someone/flowers/models/m.safetensors@", ConfigError, "has no revision"),
        ("hf://someone/flowers/models/m.safetensors@main", ConfigError, f"@{NEWER}"),
        ("hf://someone/flowers/models/m.safetensors@v2", CheckpointError, "it has v1.0"),
        (f"hf://someone/flowers/models/m.safetensors@{NEWER}", CheckpointError, "no such revision"),
        (f"hf://someone/flowers/other.safetensors@{COMMIT}", CheckpointError, "no such file"),
        (f"hf://someone/birds/m.safetensors@{COMMIT}", CheckpointError, "no such repository, or it is private"),
        ("hf://someone/birds/m.safetensors@v1", CheckpointError, "no such repository, or it is private"),
        (f"hf://someone/..x/m.safetensors@{COMMIT}", CheckpointError, "name of a repository"),
        (f"hf://m.safetensors@{COMMIT}", ConfigError, FORM),
        ("hf://someone/flowers/../../../m@v1", ConfigError, FORM),
        ("hf://someone/flowers/m@../../x", ConfigError, FORM),
    ],
)
def test_errors_say_what_to_write(hub: Hub, reference: str, kind: type[MetaDiffError], told: str) -> None:
    with pytest.raises(kind) as caught:
        fetch(Path(reference))
    assert told in str(caught.value) and caught.value.hint


def test_a_hub_that_cannot_be_reached(hub: Hub, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    hub.shutdown()
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # it would wait between its attempts
    hub.server_close()
    with pytest.raises(MetaDiffError, match="could not be downloaded") as caught:
        fetch(Path(WANTED))
    assert caught.value.exit_code == 1 and "needs no network" in str(caught.value)
    assert not caplog.records


def test_a_missing_library_is_told_with_the_extra(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match=r"extra \[hub\]"):
        fetch(Path(WANTED))


def test_references_and_paths() -> None:
    assert hub_file(Path("hf://a/b/c/d.safetensors@v1")) == HubFile("a/b", "c/d.safetensors", "v1")
    assert shown(Path("hf://a/b/c@refs/pr/1")) == "hf://a/b/c@refs/pr/1"
    for path in (Path("runs/checkpoint.safetensors"), Path("hf/a/b/c@v1"), Path("/hf:/a/b/c@v1")):
        assert hub_file(path) is None and fetch(path) is path and shown(path) == str(path)
    assert fetch(None) is None


def test_every_command_takes_one(hub: Hub, cli: CLI, photos: Path) -> None:
    digest = hashlib.sha256(hub.content).hexdigest()
    inspected = cli("inspect", WANTED)
    assert inspected.code == 0 and "kind: model" in inspected.out and digest in inspected.err
    adapted = cli("adapt", "-S", photos / "support", "-Q", photos / "query", "-c", WANTED, "--json")
    assert adapted.code == 0, adapted.err
    assert json.loads(adapted.out)["checkpoint"] == WANTED and digest in adapted.err
    for command in (["adapt", "-S", photos / "support", "-Q", photos / "query"], ["evaluate"]):
        refused = cli(*command, "-c", "hf://a/b/c")
        assert refused.code == 2 and "has no revision" in refused.err and "try:" in refused.err


def test_the_python_class_takes_one(hub: Hub, photos: Path) -> None:
    files = sorted((photos / "support").rglob("*.png"))
    classifier = FewShotClassifier.from_pretrained(WANTED).fit(files, [file.parent.name for file in files])
    local = fetch(Path(WANTED))
    other = FewShotClassifier(local).fit(files, [file.parent.name for file in files])
    np.testing.assert_array_equal(classifier.predict_proba(files), other.predict_proba(files))
    assert classifier.get_params()["checkpoint"] == WANTED
