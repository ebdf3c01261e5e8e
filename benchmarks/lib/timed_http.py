"""Single requests on a kept-alive connection, timed with as little of the client's own work as there can be.

It is the standard library's client because that does the least: the client's own time counts as the server's.
"""

import gzip
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from threading import Event, Thread
from urllib.parse import urlsplit

import zstandard

TIMEOUT_S = 300.0
POLL_EVERY_S = 0.003


@dataclass(frozen=True)
class Timed:
    """An answer, and the time from the first byte sent to the last one read."""

    milliseconds: float
    headers: Mapping[str, str]
    """By name in lower case."""
    content: bytes
    """As it came, perhaps compressed."""

    def body(self) -> bytes:
        """The content, decompressed."""
        coding = self.headers.get("content-encoding")
        if coding == "zstd":  # of a stream, whose head does not say how long it is
            return zstandard.ZstdDecompressor().decompressobj().decompress(self.content)
        return gzip.decompress(self.content) if coding == "gzip" else self.content


class TimedConnection:
    """One connection to a server on this machine."""

    def __init__(self, url: str) -> None:
        self._http = HTTPConnection(urlsplit(url).netloc, timeout=TIMEOUT_S)

    def send(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> Timed:
        """One request; RuntimeError for an answer other than 200."""
        started = time.perf_counter()
        self._http.request(method, path, body, dict(headers or {}))
        response = self._http.getresponse()
        content = response.read()
        milliseconds = 1000 * (time.perf_counter() - started)
        if response.status != 200:
            raise RuntimeError(f"{method} {path}: {response.status} {content[:500].decode(errors='replace')}")
        return Timed(milliseconds, {name.lower(): value for name, value in response.getheaders()}, content)

    def close(self) -> None:
        """Close it."""
        self._http.close()


@dataclass
class Polls:
    """The durations of small requests that another client sent meanwhile, in milliseconds."""

    milliseconds: list[float] = field(default_factory=list)


@contextmanager
def polled(url: str, path: str = "/ready") -> Iterator[Polls]:
    """GET the path every few milliseconds while the block runs, on a connection and in a thread of its own.

    A request that waits because the server's event loop is held takes about as long as it is held.
    """
    polls, ended, connection = Polls(), Event(), TimedConnection(url)

    def poll() -> None:
        while not ended.wait(POLL_EVERY_S):
            polls.milliseconds.append(connection.send("GET", path).milliseconds)

    thread = Thread(target=poll, name="polls")
    thread.start()
    try:
        yield polls
    finally:
        ended.set()
        thread.join()
        connection.close()
