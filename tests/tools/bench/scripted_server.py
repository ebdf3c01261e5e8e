"""A real HTTP server in this process that answers as a test says."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import orjson


@dataclass(frozen=True)
class Reply:
    """A status, a body, which is sent as JSON unless it is bytes, and headers beyond the usual."""

    body: object
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class ScriptedServer:
    """Where it answers, and what it was asked: path, headers and parsed body of each request, in order."""

    url: str
    asked: list[tuple[str, dict[str, str], Any]] = field(default_factory=list)


@contextmanager
def scripted(answer: Callable[[int, Any], Reply]) -> Iterator[ScriptedServer]:
    """Answer the n-th request (from 0) with `answer(n, body)`, each on a thread of its own."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_POST(self) -> None:
            body = orjson.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(served.asked)
                served.asked.append((self.path, {name.lower(): value for name, value in self.headers.items()}, body))
            reply = answer(number, body)
            content = reply.body if isinstance(reply.body, bytes) else orjson.dumps(reply.body)
            self.send_response(reply.status)
            for name, value in {**reply.headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served = ScriptedServer(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def vectors(body: Any) -> Reply:
    """OpenAI's answer with a vector of two values for each text, and a token for each."""
    count = len(body["input"])
    return Reply({"data": [{"embedding": [0.6, 0.8]}] * count, "usage": {"prompt_tokens": count}})
