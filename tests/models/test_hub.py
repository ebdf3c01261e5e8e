"""The hub, spoken to over HTTP: a server in this process that knows as much of its protocol as a download needs."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants, hf_hub_download

from vecmill.core.errors import StartupError
from vecmill.models import hub

NAME = "owner/tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = bytes(range(256)) * 64
FILES = {
    "config.json": b'{"model_type": "bert"}',
    "tokenizer.json": b"{}",
    "1_Pooling/config.json": b'{"pooling_mode": "mean"}',
    "model.safetensors": WEIGHTS,
    "modeling_tiny.py": b"raise SystemExit",
    "pytorch_model.bin": b"pickled",
    "README.md": b"# tiny",
    "onnx/config.json": b"{}",
    "onnx/model.onnx": b"onnx",
    "openvino/openvino_tokenizer.json": b"{}",
    "openvino/model.safetensors": b"the weights once more",
}
NEEDED = {"config.json", "tokenizer.json", "1_Pooling/config.json", "model.safetensors"}


@dataclass
class FakeHub:
    """One repository and what is wrong with it."""

    files: dict[str, bytes] = field(default_factory=lambda: dict(FILES))
    card: dict[str, object] = field(default_factory=lambda: {"license": "apache-2.0"})
    tags: list[str] = field(default_factory=list)
    parameters: dict[str, int] | None = field(default_factory=lambda: {"F32": 4_000_000})
    token: str | None = None
    """With one, the repository is gated, and files need it."""
    cuts: list[int] = field(default_factory=list)
    """The weights' next answers end after so many bytes."""
    claimed: dict[str, int] = field(default_factory=dict)
    """Sizes in the metadata that are not the file's."""
    interrupt: Callable[[], None] = lambda: None
    """Called before the weights are sent."""
    status: int = 200
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)
    """Method, path and Range of every request."""
    endpoint: str = ""

    def fetched(self) -> list[str]:
        """The files whose bytes were asked for."""
        return [path.split("/resolve/")[1].split("/", 1)[1] for method, path, _ in self.asked if _gets(method, path)]

    def ranges(self) -> list[str]:
        return [asked for _, _, asked in self.asked if asked is not None]

    def info(self) -> dict[str, object]:
        siblings = [
            {"rfilename": path, "size": self.claimed.get(path, len(content)), "blobId": _oid(content)}
            for path, content in self.files.items()
        ]
        counted = self.parameters
        return {
            "id": NAME,
            "sha": COMMIT,
            "siblings": siblings,
            "cardData": self.card,
            "tags": self.tags,
            "gated": "auto" if self.token else False,
            **({"safetensors": {"parameters": counted, "total": sum(counted.values())}} if counted else {}),
        }

    def tree(self) -> list[dict[str, object]]:
        return [
            {"type": "file", "path": path, "size": len(content), "oid": _oid(content)}
            for path, content in self.files.items()
        ]


def _gets(method: str, path: str) -> bool:
    return method == "GET" and "/resolve/" in path


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """The hub's addresses: /api/models/…, /api/models/…/tree/… and /…/resolve/…"""

    hub: FakeHub

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append((self.command, path, self.headers.get("Range")))
        if self.hub.status != 200:
            return self._send(self.hub.status)
        where = re.fullmatch(r"(/api/models)?/(\w+/\w+)(?:/(revision|tree|resolve)/([^/]+)(?:/(.+))?)?", path)
        if where is None or where[2] != NAME:
            return self._send(404, {"X-Error-Code": "RepoNotFound"})
        if where[4] not in (None, "main", COMMIT):
            return self._send(404, {"X-Error-Code": "RevisionNotFound"})
        if where[3] == "resolve":
            return self._file(where[5])
        return self._send(200, body=json.dumps(self.hub.tree() if where[3] == "tree" else self.hub.info()).encode())

    def _file(self, path: str) -> None:
        if self.hub.token and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self._send(401, {"X-Error-Code": "GatedRepo"})
        content = self.hub.files[path]
        about = {"ETag": f'"{_oid(content)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        start = 0
        if asked := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            start = int(asked[1])
            about["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        keep = None
        if self.command == "GET" and content is WEIGHTS:
            keep = self.hub.cuts.pop(0) if self.hub.cuts else None
            self.hub.interrupt()
        return self._send(206 if asked else 200, about, content[start:], keep)

    def _send(
        self, status: int, headers: dict[str, str] | None = None, body: bytes = b"", keep: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:keep])

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def served_hub() -> Iterator[FakeHub]:
    """A hub on a free port."""
    fake = FakeHub()
    handler = type("BoundHandler", (Handler,), {"hub": fake})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        fake.endpoint = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield fake
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def hub_here(cache: Path) -> Iterator[FakeHub]:
    """A hub that the library in this process asks, with a cache of its own."""
    with served_hub() as fake, pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "ENDPOINT", fake.endpoint)
        patch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", fake.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        patch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))
        patch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1024)
        patch.setenv("NO_PROXY", "127.0.0.1")
        patch.delenv("HF_TOKEN", raising=False)
        # The library waits a second before it takes a broken connection up again.
        patch.setattr("huggingface_hub.file_download.time", SimpleNamespace(sleep=lambda seconds: None))
        yield fake


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeHub]:
    with hub_here(tmp_path) as fake:
        yield fake


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def fetch() -> Path:
    return hub.fetch(hub.plan(NAME, hf_token=None), hf_token=None, revision=None, report=lambda fetched, complete: None)


def test_plan_names_sizes_licence_and_parameters_and_fetches_nothing(fake: FakeHub, tmp_path: Path) -> None:
    found = hub.plan(NAME, hf_token=None)
    assert set(found.sizes) == set(found.missing) == NEEDED
    assert found.size == found.missing_size == sum(len(FILES[path]) for path in NEEDED)
    assert (found.commit, found.licence, found.memory) == (COMMIT, "apache-2.0", 8_000_000)
    assert not found.non_commercial
    assert fake.fetched() == []
    assert not list(tmp_path.rglob("refs"))  # a plan must not move what a server without network would serve


def test_memory_is_the_size_of_the_weight_files_where_the_hub_counts_no_parameters(fake: FakeHub) -> None:
    fake.parameters = None
    found = hub.plan(NAME, hf_token=None)
    assert (found.parameters, found.memory) == (None, len(WEIGHTS))


@pytest.mark.parametrize(
    ("card", "tags", "licence", "non_commercial"),
    [
        ({"license": "cc-by-nc-4.0"}, [], "cc-by-nc-4.0", True),
        ({"license": "other", "license_name": "acme-nc"}, [], "other, acme-nc", True),
        ({"license": ["mit", "cc-by-nc-sa-4.0"]}, [], "mit, cc-by-nc-sa-4.0", True),
        ({}, ["bert", "license:cc-by-nc-4.0"], "cc-by-nc-4.0", True),
        ({"license": "ncsa"}, [], "ncsa", False),
        ({"license": "x-ncsa"}, [], "x-ncsa", False),
        ({}, [], "not stated", False),
    ],
)
def test_licence(fake: FakeHub, card: dict[str, object], tags: list[str], licence: str, non_commercial: bool) -> None:
    fake.card, fake.tags = card, tags
    found = hub.plan(NAME, hf_token=None)
    assert (found.licence, found.non_commercial) == (licence, non_commercial)


def test_only_needed_files_are_fetched(fake: FakeHub) -> None:
    folder = fetch()
    assert sorted(fake.fetched()) == sorted(NEEDED)
    assert files_in(folder) == NEEDED
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS


def test_a_cut_connection_is_taken_up_where_it_broke(fake: FakeHub) -> None:
    fake.cuts = [5000]
    counts: list[tuple[int, int]] = []
    found = hub.plan(NAME, hf_token=None)
    folder = hub.fetch(
        found, hf_token=None, revision=None, report=lambda fetched, complete: counts.append((fetched, complete))
    )
    assert fake.ranges() == ["bytes=4096-"]  # whole chunks of 1024 were kept
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert max(counts) == counts[-1] == (found.missing_size, len(NEEDED))


def test_after_a_connection_that_stays_broken_only_the_rest_is_fetched(fake: FakeHub) -> None:
    fake.cuts = [0] * 6
    with pytest.raises(StartupError, match=r"^owner/tiny: .*RemoteProtocolError.*network.*complete files are kept"):
        fetch()
    fake.asked.clear()
    assert files_in(fetch()) == NEEDED
    assert "model.safetensors" in fake.fetched()
    assert set(fake.fetched()) < NEEDED


def test_a_truncated_file_is_named_and_removed_and_then_fetched_again(fake: FakeHub) -> None:
    weights = fetch() / "model.safetensors"
    with weights.open("r+b") as file:
        file.truncate(100)
    with pytest.raises(StartupError, match=r"^owner/tiny: .*removed: model.safetensors \(100 of 16,384 bytes\)"):
        fetch()
    fake.asked.clear()
    assert fetch() / "model.safetensors" == weights
    assert weights.read_bytes() == WEIGHTS
    assert fake.fetched() == ["model.safetensors"]


def test_a_file_of_another_size_than_the_metadata_says_is_refused(fake: FakeHub) -> None:
    fake.claimed = {"tokenizer.json": 99}
    with pytest.raises(StartupError, match=r"tokenizer.json \(2 of 99 bytes\)"):
        fetch()


def test_a_second_run_fetches_nothing(fake: FakeHub) -> None:
    fetch()
    fake.asked.clear()
    assert hub.plan(NAME, hf_token=None).missing == {}
    fetch()
    assert [path for _, path, _ in fake.asked if "/resolve/" in path] == []


def test_gated(fake: FakeHub) -> None:
    fake.token = "secret"
    with pytest.raises(StartupError, match=rf"^owner/tiny: .*gated.*{fake.endpoint}/owner/tiny.*HF_TOKEN"):
        hub.plan(NAME, hf_token=None)
    assert set(hub.plan(NAME, hf_token="secret").missing) == NEEDED


@pytest.mark.parametrize(
    ("name", "revision", "said"),
    [
        ("owner/other", None, "^owner/other: the hub has no such model.*HF_TOKEN"),
        (NAME, "v9", "^owner/tiny: the hub has no revision v9"),
        ("owner/bad name", None, "^owner/bad name: not a hub id"),
    ],
)
def test_unknown(fake: FakeHub, name: str, revision: str | None, said: str) -> None:
    with pytest.raises(StartupError, match=said):
        hub.plan(name, hf_token=None, revision=revision)


@pytest.mark.parametrize(("status", "said"), [(500, "answered 500"), (403, "refuses the token .*HF_TOKEN")])
def test_a_hub_that_does_not_answer_well(fake: FakeHub, status: int, said: str) -> None:
    fake.status = status
    with pytest.raises(StartupError, match=said):
        hub.plan(NAME, hf_token=None)


def test_no_network(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the port for discarding; nothing listens
    with pytest.raises(StartupError, match=r"connection to http://127.0.0.1:9 failed.*ConnectError"):
        hub.plan(NAME, hf_token=None)


def test_offline(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(StartupError, match=r"^owner/tiny: HF_HUB_OFFLINE=1 forbids"):
        hub.plan(NAME, hf_token=None)


def test_no_safetensors(fake: FakeHub) -> None:
    fake.files = {path: content for path, content in FILES.items() if path != "model.safetensors"}
    with pytest.raises(StartupError, match=r"has no \*.safetensors"):
        hub.plan(NAME, hf_token=None)


def test_a_full_disk_is_refused(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    found = hub.plan(NAME, hf_token=None)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=found.missing_size))
    hub.require_space(found)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=found.missing_size - 1))
    with pytest.raises(StartupError, match=r"16.4 kB are missing and 16.4 kB are free in .*HF_HOME"):
        hub.require_space(found)


def test_a_cache_that_cannot_be_written_is_named(fake: FakeHub, tmp_path: Path) -> None:
    found = hub.plan(NAME, hf_token=None)
    (tmp_path / "models--owner--tiny").write_text("a file where the folder would be")
    with pytest.raises(StartupError, match=r"models--owner--tiny.* cannot be written \(Not a directory\).*HF_HOME"):
        hub.fetch(found, hf_token=None, revision=None, report=lambda fetched, complete: None)


def test_a_complete_model_is_served_without_asking_the_hub(fake: FakeHub) -> None:
    folder = hub.download(NAME, hf_token=None)
    assert files_in(folder) == NEEDED
    fake.asked.clear()
    assert hub.download(NAME, hf_token=None) == folder
    assert hub.download(NAME, hf_token=None, revision=COMMIT) == folder
    assert fake.asked == []


def test_an_incomplete_model_is_completed_before_it_is_served(fake: FakeHub) -> None:
    weights = hub.download(NAME, hf_token=None) / "model.safetensors"
    weights.resolve().unlink()
    weights.unlink()
    fake.asked.clear()
    hub.download(NAME, hf_token=None)
    assert fake.fetched() == ["model.safetensors"]


def test_a_folder_that_another_program_began_is_completed_before_it_is_served(fake: FakeHub) -> None:
    begun = Path(hf_hub_download(NAME, "tokenizer.json")).parent
    assert hub.download(NAME, hf_token=None) == begun
    assert files_in(begun) == NEEDED


def test_a_branch_that_moves_during_the_pull_is_refused(fake: FakeHub) -> None:
    before = replace(hub.plan(NAME, hf_token=None), commit="f" * 40)
    with pytest.raises(StartupError, match=f"moved from {before.commit} to {COMMIT}"):
        hub.fetch(before, hf_token=None, revision=None, report=lambda fetched, complete: None)


def test_a_model_that_cannot_be_had_is_refused_with_everything_that_would_help(fake: FakeHub) -> None:
    with pytest.raises(StartupError, match=r"^owner/other: .*HF_HOME.*network.*HF_HUB_OFFLINE.*HF_TOKEN"):
        hub.download("owner/other", hf_token=None)
