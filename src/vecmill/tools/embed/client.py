"""HTTP calls to a server that may be busy, or away for a while."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic, sleep
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx2

from vecmill.refusals import NOT_THROUGH_PROXIES, message_of, retry_after, start_of
from vecmill.tools.embed.errors import EmbedError, NotThere, UsageError
from vecmill.tools.embed.options import Server

CONNECT_S = 10.0
LATER = frozenset({429, 502, 503, 504})
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 5.0  # where the server does not say how long

T = TypeVar("T")


class Unreachable(EmbedError):
    """The connection broke, or was refused: what was asked may have been done."""


class _Later(Exception):
    """The server says to come back, after so many seconds where it says when."""

    def __init__(self, reason: str, seconds: float | None) -> None:
        super().__init__(reason)
        self.seconds = seconds


class Client:
    """Kept-alive connections to one server, with patience."""

    def __init__(self, server: Server, waiting: Callable[[str], None] = lambda reason: None) -> None:
        """`waiting` is told why a call has to wait, and with an empty reason that it goes on.

        Raises:
            UsageError: the address is not one.
        """
        self.base = server.base
        self._patience, self._waiting = server.patience_seconds, waiting
        self._met = False
        headers = {"Accept-Encoding": "identity"}
        if server.api_key:
            headers["Authorization"] = f"Bearer {server.api_key}"
        try:
            url = httpx2.URL(self.base)
        except httpx2.InvalidURL as error:
            raise UsageError(f"{server.url} is not an address: {error}.") from error
        if url.scheme not in ("http", "https") or not url.host:
            raise UsageError(f"{server.url} is not an address of the form http://host:port.")
        try:
            self._http = httpx2.Client(
                headers=headers,
                timeout=httpx2.Timeout(server.answer_seconds, connect=CONNECT_S),
                mounts=NOT_THROUGH_PROXIES,
            )
        except UnicodeEncodeError as error:
            raise UsageError("The API key is not plain ASCII, as a header must be.") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._http.close()

    def ask(self, method: str, path: str, **arguments: Any) -> dict[str, Any]:
        """What is answered, a JSON object; asked again while the server is away. For calls that may be made twice.

        Raises:
            NotThere: a 404.
            EmbedError: another error, or the server stayed away.
        """
        return self.patiently(lambda: self._ask(method, path, **arguments))

    def ask_once(self, method: str, path: str, **arguments: Any) -> dict[str, Any]:
        """The same for calls that must not be made twice.

        Raises:
            Unreachable: it may have been done, or not.
        """
        return self.patiently(lambda: self._ask(method, path, **arguments), repeat=False)

    def patiently(self, attempt: Callable[[], T], *, repeat: bool = True) -> T:
        """Try until it works; again after a broken connection too, if it may be repeated.

        Raises:
            EmbedError: it does not work, or has not for too long.
        """
        since, wait = None, FIRST_WAIT_S
        while True:
            try:
                found = attempt()
            except Unreachable as error:
                if not (repeat and self._met):
                    raise
                reason, asked = str(error), None
            except _Later as later:
                reason, asked = str(later), later.seconds
            else:
                self._met = True
                self._waiting("")
                return found
            seconds = wait if asked is None else asked
            since = since or monotonic()
            if monotonic() + seconds > since + self._patience:
                raise EmbedError(
                    f"Given up after {self._patience:g} s (--patience); the same command goes on from here. {reason}"
                )
            self._waiting(reason)
            sleep(seconds)
            wait = min(2 * wait, LONGEST_WAIT_S)

    def lines(self, path: str) -> Iterator[bytes]:
        """A file's lines as they come. Raises like `ask`, and is not repeated: run it in `patiently`."""
        with self._response("GET", path) as response:
            rest = b""
            for chunk in response.iter_bytes():
                *lines, rest = (rest + chunk).split(b"\n")
                yield from lines
            if rest:
                yield rest

    def _ask(self, method: str, path: str, **arguments: Any) -> dict[str, Any]:
        with self._response(method, path, **arguments) as response:
            content = response.read()
        try:
            found = json.loads(content)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise EmbedError(f"{method} {self.base}{path} was not answered with a JSON object: {start_of(content)}")
        return found

    @contextmanager
    def _response(self, method: str, path: str, **arguments: Any) -> Iterator[httpx2.Response]:
        try:
            with self._http.stream(method, self.base + path, **arguments) as response:
                self._check(method, path, response)
                yield response
        except httpx2.TransportError as error:
            why = str(error) or type(error).__name__
            raise Unreachable(f"{self.base} cannot be reached: {why}.") from error

    def _check(self, method: str, path: str, response: httpx2.Response) -> None:
        if response.is_success:
            return
        status, message = response.status_code, message_of(response.read())
        said = f"{method} {self.base}{path} was answered with {status}: {message}"
        match status:
            case 401 | 403:
                raise EmbedError(f"{said} (--api-key, or API_KEY)")
            case 404:
                raise NotThere(said)
            case 400 | 422:
                raise UsageError(said)
            case _ if status in LATER:
                raise _Later(said, retry_after(response.headers))
        raise EmbedError(said)
