"""How the tools call a server that may be busy, or away for a while. No other module of theirs opens a connection.

`HttpClient` makes one call after another, `AsyncHttpClient` loads a server over many connections. `Retries` decides for
both when a call is made again.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from time import perf_counter, sleep
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx2

from vecmill.refusals import message_of, start_of
from vecmill.tools.console import CommandError, UsageError, printable

CONNECT_S = 10.0
ANSWER_S = 300.0  # without a byte
PATIENCE_S = 600.0  # with a server that is busy or away
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 5.0  # where the server does not say how long to wait
LONGEST_ANSWER_S = 4  # times the seconds without a byte, for an answer that comes in drops
LARGEST_ANSWER = 64 * 2**20  # bytes, of a JSON object
LARGEST_REFUSAL = 2**20  # bytes that are read of an error's answer
LARGEST_VECTORS = 2**30  # bytes of an answer with vectors
WHOLE_SECONDS = re.compile("[0-9]{1,18}")

# For `mounts`: what is on this machine is not reached by way of the environment's proxy.
NOT_THROUGH_PROXIES: Mapping[str, None] = dict.fromkeys(("all://localhost", "all://127.0.0.1", "all://[::1]"))

T = TypeVar("T")


class NotThere(CommandError):
    """The server has no such file or path (404)."""


class Unreachable(CommandError):
    """The connection broke, or was refused: what was asked for may have been done."""


class _Busy(Exception):
    """The server refuses for now; `retry_after` in seconds where it says when to come back."""

    def __init__(self, reason: str, retry_after: float | None) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


def base_url(url: str) -> str:
    """The address with a scheme and without a slash at its end.

    Raises:
        UsageError: it is not an address.
    """
    base = (url if "://" in url else f"http://{url}").rstrip("/")
    try:
        parsed = httpx2.URL(base)
    except httpx2.InvalidURL as error:
        raise UsageError(f"{url} is not an address: {error}.") from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise UsageError(f"{url} is not an address of the form http://host:port.")
    return base


def request_headers(api_key: str | None) -> dict[str, str]:
    """The headers of every request.

    Raises:
        UsageError: the key cannot be sent.
    """
    # Compression would cost both sides time, and vectors hardly shrink.
    headers = {"Accept-Encoding": "identity"}
    if api_key:
        if not api_key.isascii():
            raise UsageError("The API key is not plain ASCII, as a header must be.")
        headers["Authorization"] = f"Bearer {api_key}"
    return headers


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Retry-After in seconds from now; it may be a number or a date (RFC 9110, section 10.2.3)."""
    value = headers.get("retry-after", "").strip()
    if WHOLE_SECONDS.fullmatch(value):
        return float(value)
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError, OverflowError):
        return None


def get_here(url: str, seconds: float) -> httpx2.Response | None:
    """One GET on this machine, past any proxy and never repeated; None where nothing answers in HTTP."""
    try:
        return httpx2.get(url, timeout=seconds, trust_env=False)
    except (httpx2.HTTPError, httpx2.InvalidURL):
        return None


@dataclass(frozen=True, slots=True)
class Patience:
    """When a call is made again."""

    seconds: float
    """For how long it is; counted from the first refusal, or from where `Retries` is told."""
    statuses: frozenset[int]
    only_when_told: bool = False
    """Not without Retry-After, and not after a broken connection: for measuring, where each failure counts."""


class Retries:
    """The tries of one call."""

    def __init__(self, patience: Patience, since: float | None = None) -> None:
        """`since`: where patience begins, by perf_counter; None: at the first refusal."""
        self._patience, self._since = patience, since
        self._backoff = FIRST_WAIT_S

    def next_wait(self, told: float | None) -> float | None:
        """Seconds until the next try, None where there is to be none. `told`: what the server says of it."""
        if told is None and self._patience.only_when_told:
            return None
        wait = self._backoff if told is None else told
        now = perf_counter()
        if self._since is None:
            self._since = now
        if now + wait >= self._since + self._patience.seconds:
            return None
        self._backoff = min(2 * self._backoff, LONGEST_WAIT_S)
        return wait


@dataclass(frozen=True, slots=True)
class ServerAddress:
    """Where a server is, and how long to wait for it."""

    url: str
    """With or without `http://`, with or without `/v1`."""
    api_key: str | None = field(default=None, repr=False)
    """Sent as a bearer token."""
    answer_seconds: float = ANSWER_S
    """Without a byte from it."""
    patience_seconds: float | None = PATIENCE_S
    """While it is busy or away; None: a call is made once."""


class HttpClient:
    """Calls to one server, repeated while it is busy or away, over kept-alive connections."""

    STATUSES = frozenset({429, 502, 503, 504})

    def __init__(self, server: ServerAddress, waiting: Callable[[str], None] = lambda reason: None) -> None:
        """`waiting` is told why a call has to wait, and with an empty reason that it goes on.

        Raises:
            UsageError: the address is not one, or the key cannot be sent.
        """
        self.base = base_url(server.url).removesuffix("/v1")
        self._once = server.patience_seconds is None
        self._patience = Patience(server.patience_seconds or 0.0, self.STATUSES)
        self._longest_answer = LONGEST_ANSWER_S * server.answer_seconds
        self._waiting = waiting
        self._met = False
        self._http = httpx2.Client(
            headers=request_headers(server.api_key),
            timeout=httpx2.Timeout(server.answer_seconds, connect=CONNECT_S),
            mounts=NOT_THROUGH_PROXIES,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._http.close()

    def ask(self, method: str, path: str, **arguments: Any) -> dict[str, Any]:
        """The JSON object that is answered; asked again while the server is away. For calls that may be made twice.

        Raises:
            NotThere: a 404.
            CommandError: another error, or the server stayed away.
        """
        return self.patiently(lambda: self._ask(method, path, **arguments))

    def ask_once(self, method: str, path: str, **arguments: Any) -> dict[str, Any]:
        """The same for calls that must not be made twice.

        Raises:
            Unreachable: it may have been done, or not.
        """
        return self.patiently(lambda: self._ask(method, path, **arguments), repeat=False)

    def patiently(self, attempt: Callable[[], T], *, repeat: bool = True) -> T:
        """Try until it works; with `repeat` also after a broken connection, once the server has answered a call.

        Raises:
            CommandError: it does not work, or has not for too long.
        """
        retries = Retries(self._patience)
        while True:
            try:
                answer = attempt()
            except Unreachable as error:
                if not (repeat and self._met):
                    raise
                reason, told = str(error), None
            except _Busy as busy:
                reason, told = str(busy), busy.retry_after
            else:
                self._met = True
                self._waiting("")
                return answer
            wait = retries.next_wait(told)
            if wait is None and self._once:
                raise CommandError(reason)
            if wait is None:
                raise CommandError(
                    f"Given up after {self._patience.seconds:g} s (--patience); the same command goes on from here. "
                    f"{reason}"
                )
            self._waiting(reason)
            sleep(wait)

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
            content = self._content(response, LARGEST_ANSWER)
        if len(content) > LARGEST_ANSWER:
            raise CommandError(f"The answer to {method} {self.base}{path} is larger than {LARGEST_ANSWER} bytes.")
        try:
            answer = json.loads(content)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise CommandError(f"{method} {self.base}{path} was not answered with a JSON object: {start_of(content)}")
        return answer

    def _content(self, response: httpx2.Response, most: int) -> bytes:
        """An answer's body, or a little more than the `most` bytes of it that are wanted.

        Raises:
            Unreachable: it takes too long.
        """
        ends, content = perf_counter() + self._longest_answer, bytearray()
        for part in response.iter_bytes():
            content += part
            if len(content) > most:
                break
            if perf_counter() > ends:
                raise Unreachable(f"{self.base} did not end its answer within {self._longest_answer:g} s.")
        return bytes(content)

    @contextmanager
    def _response(self, method: str, path: str, **arguments: Any) -> Iterator[httpx2.Response]:
        try:
            with self._http.stream(method, self.base + path, **arguments) as response:
                self._check(method, path, response)
                yield response
        except httpx2.DecodingError as error:
            raise CommandError(f"The answer to {method} {self.base}{path} cannot be decompressed: {error}.") from error
        except httpx2.RequestError as error:
            why = str(error) or type(error).__name__
            raise Unreachable(f"{self.base} cannot be reached: {why}.") from error

    def _check(self, method: str, path: str, response: httpx2.Response) -> None:
        if response.is_success:
            return
        status, message = response.status_code, message_of(self._content(response, LARGEST_REFUSAL))
        sentence = printable(f"{method} {self.base}{path} was answered with {status}: {message}")
        match status:
            case 401 | 403:
                raise CommandError(f"{sentence} (--api-key, or API_KEY)")
            case 404:
                raise NotThere(sentence)
            case 400 | 422:
                raise UsageError(sentence)
            case _ if status in self._patience.statuses:
                raise _Busy(sentence, retry_after(response.headers))
        raise CommandError(sentence)


@dataclass(slots=True)
class Answer:
    """What became of a request, waits that the server asked for included. Times are perf_counter's, in seconds."""

    started: float
    """When it was due; without a due time, when it was sent."""
    ended: float = 0.0
    content: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    error: str | None = None
    """The status, or the name of what broke the connection; None: answered."""
    message: str = ""
    retries: Counter[str] = field(default_factory=Counter)
    """Statuses with Retry-After that were waited for."""

    @property
    def seconds(self) -> float:
        return self.ended - self.started


class AsyncHttpClient:
    """POST requests to one address over kept-alive connections, each told apart and timed."""

    def __init__(
        self, endpoint: str, headers: Mapping[str, str], patience: Patience, connections: int | None = None
    ) -> None:
        """`connections` None: as many as there are requests at once."""
        self._endpoint, self._patience = endpoint, patience
        self._http = httpx2.AsyncClient(
            headers=headers,
            timeout=httpx2.Timeout(ANSWER_S, connect=CONNECT_S, pool=None),
            mounts=NOT_THROUGH_PROXIES,
            limits=httpx2.Limits(max_connections=connections, max_keepalive_connections=connections),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._http.aclose()

    async def post(self, body: bytes, due: float | None = None) -> Answer:
        """Send a request, again while the server asks for it. Never raises for what the server does.

        `due`: when it was to be sent, by perf_counter, where its time counts from then.
        """
        answer = Answer(perf_counter() if due is None else due)
        retries = Retries(self._patience, answer.started)
        while (wait := await self._try(body, answer, retries)) is not None:  # noqa: ASYNC110  # a server gives no event
            await asyncio.sleep(wait)
        answer.ended = perf_counter()
        return answer

    async def _try(self, body: bytes, answer: Answer, retries: Retries) -> float | None:
        """One try; how many seconds to wait for the next, None where there is to be none."""
        content = bytearray()
        try:
            async with self._http.stream("POST", self._endpoint, content=body) as response:
                most = LARGEST_VECTORS if response.is_success else LARGEST_REFUSAL
                async for part in response.aiter_bytes():
                    content += part
                    if len(content) > most:
                        break
        except httpx2.RequestError as error:
            answer.error, answer.message = type(error).__name__, str(error) or type(error).__name__
            return None
        if response.is_success and len(content) > most:
            answer.error, answer.message = "TooLarge", f"the answer is larger than {most} bytes"
            return None
        if response.is_success:
            answer.content, answer.headers = bytes(content), response.headers
            return None
        if response.status_code in self._patience.statuses:
            wait = retries.next_wait(retry_after(response.headers))
            if wait is not None:
                answer.retries[str(response.status_code)] += 1
                return wait
        answer.error, answer.message = str(response.status_code), message_of(bytes(content))
        return None
