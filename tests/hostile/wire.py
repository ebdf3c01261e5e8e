"""HTTP as bytes on a socket, for what no client library would send."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

PATIENCE = 30.0  # seconds


@dataclass(frozen=True)
class WireAnswer:
    """One response."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def text(self) -> str:
        return self.body.decode()


class Wire:
    """One connection."""

    def __init__(self, raw: socket.socket) -> None:
        self._socket = raw
        self.port: int = raw.getsockname()[1]
        """This end's."""
        self._buffer = b""

    def send(self, *pieces: bytes, pause: float = 0.05) -> None:
        """Send pieces, each in a segment of its own."""
        for number, piece in enumerate(pieces):
            if number:
                time.sleep(pause)
            self._socket.sendall(piece)

    def trickle(self, pieces: Sequence[bytes], pause: float) -> bool:
        """Send pieces with pauses; False where the server closed before the last."""
        try:
            self.send(*pieces, pause=pause)
        except OSError:
            return False
        return True

    def answer(self, *, head_only: bool = False) -> WireAnswer:
        """The next response. EOFError: the server closed before it was complete."""
        head = self._until(b"\r\n\r\n").decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])}
        status = int(head[0].split()[1])
        if head_only or status in (100, 204, 304):
            body = b""
        elif headers.get("transfer-encoding") == "chunked":
            body = self._chunks()
        else:
            body = self._exactly(int(headers["content-length"]))
        return WireAnswer(status, headers, body)

    def ended(self) -> bool:
        """Whether the server closes, with nothing more to say."""
        return self._buffer == b"" and self._socket.recv(65536) == b""

    def leave(self) -> None:
        """Close at once."""
        self._socket.close()

    def _chunks(self) -> bytes:
        body = b""
        while size := int(self._until(b"\r\n"), 16):
            body += self._exactly(size + 2)[:-2]
        self._until(b"\r\n")
        return body

    def _until(self, mark: bytes) -> bytes:
        while mark not in self._buffer:
            self._more()
        data, _, self._buffer = self._buffer.partition(mark)
        return data

    def _exactly(self, size: int) -> bytes:
        while len(self._buffer) < size:
            self._more()
        data, self._buffer = self._buffer[:size], self._buffer[size:]
        return data

    def _more(self) -> None:
        data = self._socket.recv(1 << 20)
        if not data:
            raise EOFError(f"closed after {self._buffer[:200]!r}")
        self._buffer += data


@contextmanager
def connected(url: str, source: str = "127.0.0.1", receive_buffer: int | None = None) -> Iterator[Wire]:
    """A connection from an address of this machine."""
    parts = urlsplit(url)
    with socket.socket() as raw:
        raw.settimeout(PATIENCE)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if receive_buffer is not None:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        raw.bind((source, 0))
        raw.connect((parts.hostname, parts.port))
        yield Wire(raw)


def request(path: str, body: bytes = b"", *fields: str, method: str = "POST") -> bytes:
    """A request with its Content-Length, and the type of JSON unless the fields have one."""
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", *fields]
    if body and not any(field.lower().startswith("content-type") for field in fields):
        lines.append("Content-Type: application/json")
    if body or method == "POST":
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body


def answer_to(url: str, *pieces: bytes) -> WireAnswer:
    """The answer to bytes on a connection of their own."""
    with connected(url) as wire:
        wire.send(*pieces)
        return wire.answer()
