"""A small batches API over real HTTP, in memory, for what a good server does not do: fail, expire, lose, stay away."""

from __future__ import annotations

import threading
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
import orjson

MODEL = "a/model"
PAGE = 2  # a page of a list, whatever limit is asked for

Line = dict[str, Any]


@dataclass(frozen=True)
class BatchReply:
    """A status, a body and headers beyond the usual; no status: the connection is cut."""

    body: object = None
    status: int | None = 200
    headers: dict[str, str] = field(default_factory=dict)


def vector(text: str) -> bytes:
    """Two values that tell texts apart."""
    return np.array([len(text), sum(text.encode())], "<f4").tobytes()


def answer(line: Line, model: str = MODEL) -> Line:
    """The answer to a line that succeeds."""
    encoded = b64encode(vector(line["body"]["input"])).decode()
    body = {"data": [{"embedding": encoded}], "model": model, "usage": {"prompt_tokens": 3}}
    return {"custom_id": line["custom_id"], "response": {"status_code": 200, "body": body}, "error": None}


def failure(line: Line, status: int, message: str) -> Line:
    """The answer to a line that fails."""
    body = {"error": {"message": message}}
    return {"custom_id": line["custom_id"], "response": {"status_code": status, "body": body}, "error": None}


def unanswered(line: Line) -> Line:
    """The error of a line whose batch expires."""
    error = {"code": "batch_expired", "message": "not run in time"}
    return {"custom_id": line["custom_id"], "response": None, "error": error}


@dataclass
class BatchServer:
    """The server's state, and the parts of its behaviour that a test may change."""

    url: str = ""
    received: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    """Method, path and headers of each request, in order."""
    files: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    """Names and contents, by id."""
    batches: list[dict[str, Any]] = field(default_factory=list)
    """The newest last."""
    uploads: list[list[Line]] = field(default_factory=list)
    """The lines of each uploaded file."""
    probes: list[Line] = field(default_factory=list)
    interfere: Callable[[str, str], BatchReply | None] = lambda method, path: None
    """Called with method and path; what it returns is sent in place of the answer."""
    works_although_cut: bool = False
    """Whether a request whose connection is cut is done all the same."""
    run: Callable[[Line], Line] = answer
    ends_as: Callable[[int], str] = lambda number: "completed"
    """The final status of the n-th batch, from 0."""

    def count(self, method: str, path: str) -> int:
        """The number of requests so far."""
        return sum(request[:2] == (method, path) for request in self.received)

    def reply(self, method: str, path: str, query: dict[str, list[str]], body: bytes, content_type: str) -> BatchReply:
        """The answer to a request."""
        missing = BatchReply({"error": {"message": f"no {path}"}}, 404)
        match method, path.split("/")[2:]:
            case "POST", ["embeddings"]:
                return self._probe(orjson.loads(body))
            case "POST", ["files"]:
                return BatchReply(self._upload(body, content_type))
            case "GET", ["files"]:
                return BatchReply(_page([self._file(file_id) for file_id in self.files], query))
            case _, ["files", file_id, *_]:
                return self._one_file(method, file_id) if file_id in self.files else missing
            case _, ["batches", *rest]:
                return BatchReply(self._batches(method, rest, query, body))
        return missing

    def _one_file(self, method: str, number: str) -> BatchReply:
        if method == "GET":
            return BatchReply(self.files[number][1])
        del self.files[number]
        return BatchReply({"id": number, "deleted": True})

    def _batches(self, method: str, rest: list[str], query: dict[str, list[str]], body: bytes) -> dict[str, Any]:
        if method == "POST":
            return self._create(orjson.loads(body))
        return self._poll(rest[0]) if rest else _page(list(reversed(self.batches)), query)

    def _probe(self, body: Line) -> BatchReply:
        self.probes.append(body)
        response = self.run({"custom_id": "probe", "body": body})["response"]
        return BatchReply(response["body"], response["status_code"])

    def _upload(self, body: bytes, content_type: str) -> dict[str, Any]:
        form = BytesParser().parsebytes(b"Content-Type: " + content_type.encode() + b"\r\n\r\n" + body)
        parts: list[Any] = list(form.get_payload())
        named = {part.get_param("name", header="content-disposition"): part for part in parts}
        assert named["purpose"].get_payload() == "batch"
        content = named["file"].get_payload(decode=True)
        self.uploads.append(list(map(orjson.loads, content.splitlines())))
        return self._keep(str(named["file"].get_filename()), content)

    def _keep(self, name: str, content: bytes) -> dict[str, Any]:
        number = f"file-{len(self.received)}-{len(self.files)}"
        self.files[number] = (name, content)
        return self._file(number)

    def _file(self, number: str) -> dict[str, Any]:
        return {"id": number, "filename": self.files[number][0], "status": "processed"}

    def _create(self, body: dict[str, Any]) -> dict[str, Any]:
        assert body["endpoint"] == "/v1/embeddings"
        batch = {**body, "id": f"batch_{len(self.batches)}", "status": "validating", "request_counts": None}
        self.batches.append(batch)
        return batch

    def _poll(self, number: str) -> dict[str, Any]:
        place, batch = next((at, candidate) for at, candidate in enumerate(self.batches) if candidate["id"] == number)
        if batch["status"] == "validating":
            self.work(batch, self.ends_as(place))
        return batch

    def work(self, batch: dict[str, Any], status: str) -> None:
        """Run it to its end."""
        batch["status"] = status
        if status == "failed":
            batch["errors"] = {"data": [{"message": "no such model", "line": 1}]}
        if status not in ("completed", "expired", "cancelled"):
            return
        requests = map(orjson.loads, self.files[batch["input_file_id"]][1].splitlines())
        results = list(map(self.run, requests))
        good = [result for result in results if result["response"] and result["response"]["status_code"] == 200]
        bad = [result for result in results if result not in good]
        batch["request_counts"] = {"total": len(results), "completed": len(good), "failed": len(bad)}
        # In no particular order, as the API has it.
        for name, lines in (("output_file_id", good[::-1]), ("error_file_id", bad)):
            content = b"\n".join(map(orjson.dumps, lines))
            batch[name] = self._keep("results", content)["id"] if lines else None


def _page(items: list[dict[str, Any]], query: dict[str, list[str]]) -> dict[str, Any]:
    after = query.get("after", [None])[0]
    start = 0 if after is None else 1 + [item["id"] for item in items].index(after)
    return {"object": "list", "data": items[start : start + PAGE], "has_more": start + PAGE < len(items)}


class _Server(ThreadingHTTPServer):
    """An HTTP server with the state that it serves."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.served = BatchServer(f"http://127.0.0.1:{self.server_port}")
        self.one_at_a_time = threading.Lock()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def answer(self) -> None:
        body = self._body()
        with self.server.one_at_a_time:
            reply = self._reply(body)
        if reply.status is None:
            self.close_connection = True
            return
        content = reply.body if isinstance(reply.body, bytes) else orjson.dumps(reply.body)
        self.send_response(reply.status)
        for name, value in {"Content-Length": str(len(content)), **reply.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)
        # After an answer that is shorter than its Content-Length the connection must break.
        self.close_connection = self.close_connection or "Content-Length" in reply.headers

    do_GET = do_POST = do_DELETE = answer

    def _reply(self, body: bytes) -> BatchReply:
        served, split = self.server.served, urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        served.received.append((self.command, split.path, headers))
        reply = served.interfere(self.command, split.path)
        if reply is not None and not (reply.status is None and served.works_although_cut):
            return reply
        done = served.reply(self.command, split.path, parse_qs(split.query), body, headers.get("content-type", ""))
        return reply or done

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", "0")))
        pieces = []
        while size := int(self.rfile.readline(), 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def batch_server() -> Iterator[BatchServer]:
    """A server that answers while the block runs, one request at a time."""
    with _Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server.served
        finally:
            server.shutdown()
            thread.join()
