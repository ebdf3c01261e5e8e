"""One request and what became of it."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field
from time import perf_counter
from types import TracebackType
from typing import Self

import httpx2

from vecmill.refusals import NOT_THROUGH_PROXIES, message_of, retry_after
from vecmill.tools.bench.answers import tokens_of
from vecmill.tools.bench.errors import BenchError
from vecmill.tools.bench.target import Target

CONNECT_S = 10.0
ANSWER_S = 300.0
PATIENCE_S = 120.0  # how long one request is offered to a server that says "later"
LATER = (httpx2.codes.TOO_MANY_REQUESTS, httpx2.codes.SERVICE_UNAVAILABLE)


@dataclass(slots=True)
class Answer:
    """What became of a request, waits that the server asked for included. Times are perf_counter's, in seconds."""

    started: float
    """When it was due; for a bulk's request that is when it was sent."""
    ended: float = 0.0
    content: bytes = b""
    tokens: int | None = None
    error: str | None = None
    """The status, or the name of what broke the connection; None: answered."""
    message: str = ""
    retries: Counter[str] = field(default_factory=Counter)
    """Statuses with Retry-After that were waited for."""

    @property
    def seconds(self) -> float:
        return self.ended - self.started


class Client:
    """Kept-alive connections to one server."""

    def __init__(self, target: Target, connections: int | None = None) -> None:
        """`connections` None: as many as there are requests at once.

        Raises:
            BenchError: the address is not one.
        """
        self.target = target
        try:
            self._endpoint = httpx2.URL(target.endpoint)
        except httpx2.InvalidURL as error:
            raise BenchError(f"{target.url} is not an address: {error}.") from error
        if self._endpoint.scheme not in ("http", "https") or not self._endpoint.host:
            raise BenchError(f"{target.url} is not an address of the form http://host:port.")
        self._http = httpx2.AsyncClient(
            headers=target.headers,
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
        """Send a request; again after each 429 and 503 that says when. Never raises for what the server does."""
        answer = Answer(perf_counter() if due is None else due)
        while (wait := await self._try(body, answer)) is not None:  # noqa: ASYNC110  # a server gives no event
            await asyncio.sleep(wait)
        answer.ended = perf_counter()
        return answer

    async def _try(self, body: bytes, answer: Answer) -> float | None:
        """One try; how many seconds to wait for the next, None where there is to be none."""
        try:
            response = await self._http.post(self._endpoint, content=body)
        except httpx2.TransportError as error:
            answer.error, answer.message = type(error).__name__, str(error) or type(error).__name__
            return None
        if response.is_success:
            answer.content = response.content
            answer.tokens = tokens_of(response.content, response.headers)
            return None
        wait = retry_after(response.headers) if response.status_code in LATER else None
        if wait is not None and perf_counter() - answer.started + wait <= PATIENCE_S:
            answer.retries[str(response.status_code)] += 1
            return wait
        answer.error, answer.message = str(response.status_code), message_of(response.content)
        return None
