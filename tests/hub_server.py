"""The hub, spoken to over HTTP: a server in this process that knows as much of its protocol as a download needs."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants
from tokenizers import Tokenizer
from tokenizers.models import WordPiece

NAME = "owner/tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = bytes(range(256)) * 64
FILES = {
    "config.json": b'{"model_type": "bert"}',
    "tokenizer.json": Tokenizer(WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]")).to_str().encode(),
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
ADDRESS = re.compile(
    r"(/api/models)?/(?P<name>[\w.-]+/[\w.-]+)"
    r"(?:/(?P<what>revision|tree|resolve|refs|discussions)(?:/(?P<revision>refs/pr/\d+|[^/]+))?(?:/(?P<file>.+))?)?"
)
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
    requests: dict[int, tuple[str, dict[str, bytes]]] = field(default_factory=dict)
    """Pull requests by number: who opened each, and the files of its revision `refs/pr/N`."""
    received: list[tuple[str, str, str | None]] = field(default_factory=list)
    """Method, path and Range of every request."""
    endpoint: str = ""

    def fetched(self) -> list[str]:
        """The files whose bytes were asked for."""
        matches = [ADDRESS.fullmatch(path) for method, path, _ in self.received if _gets(method, path)]
        return [where["file"] for where in matches if where is not None]

    def ranges(self) -> list[str]:
        return [byte_range for _, _, byte_range in self.received if byte_range is not None]

    def at(self, revision: str | None) -> tuple[str, dict[str, bytes]] | None:
        """The commit and the files of a revision."""
        if revision in (None, "main", COMMIT):
            return COMMIT, self.files
        numbers = [number for number in self.requests if revision in (f"refs/pr/{number}", _commit(number))]
        return (_commit(numbers[0]), self.requests[numbers[0]][1]) if numbers else None

    def info(self, commit: str, files: dict[str, bytes]) -> dict[str, object]:
        siblings = [
            {"rfilename": path, "size": self.claimed.get(path, len(content)), "blobId": _oid(content)}
            for path, content in files.items()
        ]
        counted = self.parameters
        return {
            "id": NAME,
            "sha": commit,
            "siblings": siblings,
            "cardData": self.card,
            "tags": self.tags,
            "gated": "auto" if self.token else False,
            **({"safetensors": {"parameters": counted, "total": sum(counted.values())}} if counted else {}),
        }

    def refs(self) -> dict[str, object]:
        pulls = [{"name": f"{number}", "ref": f"refs/pr/{number}", "targetCommit": "0"} for number in self.requests]
        main = {"name": "main", "ref": "refs/heads/main", "targetCommit": COMMIT}
        return {"branches": [main], "converts": [], "tags": [], "pullRequests": pulls}

    def discussions(self) -> dict[str, object]:
        opened = [
            {
                "title": "Adding `safetensors` variant of this model",
                "num": number,
                "author": {"name": author},
                "createdAt": "2024-01-31T08:30:00.000Z",
                "status": "open",
                "repo": {"name": NAME, "type": "model"},
                "isPullRequest": True,
            }
            for number, (author, _) in self.requests.items()
        ]
        return {"count": len(opened), "start": 0, "discussions": opened}


def _tree(files: dict[str, bytes]) -> list[dict[str, object]]:
    return [
        {"type": "file", "path": path, "size": len(content), "oid": _oid(content)} for path, content in files.items()
    ]


def _commit(number: int) -> str:
    """Of a pull request."""
    return f"{number:040x}"


def _gets(method: str, path: str) -> bool:
    return method == "GET" and "/resolve/" in path


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


class HubHandler(BaseHTTPRequestHandler):
    """The hub's addresses: /api/models/…, /api/models/…/tree/… and /…/resolve/…"""

    hub: FakeHub

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.received.append((self.command, path, self.headers.get("Range")))
        if self.hub.status != 200:
            return self._send(self.hub.status)
        where = ADDRESS.fullmatch(path)
        if where is None or where["name"] != NAME:
            return self._send(404, {"X-Error-Code": "RepoNotFound"})
        if where["what"] in ("refs", "discussions"):
            return self._json(self.hub.refs() if where["what"] == "refs" else self.hub.discussions())
        if (at_revision := self.hub.at(where["revision"])) is None:
            return self._send(404, {"X-Error-Code": "RevisionNotFound"})
        if where["what"] == "resolve":
            return self._file(where["file"], *at_revision)
        return self._json(_tree(at_revision[1]) if where["what"] == "tree" else self.hub.info(*at_revision))

    def _json(self, answer: object) -> None:
        self._send(200, body=json.dumps(answer).encode())

    def _file(self, path: str, commit: str, files: dict[str, bytes]) -> None:
        if self.hub.token and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self._send(401, {"X-Error-Code": "GatedRepo"})
        content = files[path]
        about = {"ETag": f'"{_oid(content)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        start = 0
        if byte_range := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            start = int(byte_range[1])
            about["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        keep = None
        if self.command == "GET" and content is WEIGHTS:
            keep = self.hub.cuts.pop(0) if self.hub.cuts else None
            self.hub.interrupt()
        return self._send(206 if byte_range else 200, about, content[start:], keep)

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
    handler = type("BoundHandler", (HubHandler,), {"hub": fake})
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
        patch.setattr(constants, "HF_HOME", str(cache / "home"))
        patch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))
        patch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1024)
        patch.setenv("NO_PROXY", "127.0.0.1")
        patch.delenv("HF_TOKEN", raising=False)
        # The library waits a second before it takes a broken connection up again.
        patch.setattr("huggingface_hub.file_download.time", SimpleNamespace(sleep=lambda seconds: None))
        yield fake
