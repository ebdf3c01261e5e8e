"""What stands around every request: its id, its line of the log, and its trace."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
from collections.abc import Callable
from time import perf_counter
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vecmill.core.types import RequestRecord
from vecmill.http.access import READING
from vecmill.http.errors import CLIENT_CLOSED_REQUEST, LOGGED_CHARACTERS
from vecmill.http.tracing import RequestSpan, Tracing

logger = logging.getLogger(__name__)

ACCEPTABLE = re.compile(r"[\w.:-]{1,128}", re.ASCII)
REFUSED_FROM, FAULT_FROM = 400, 429  # a refusal that may be the server's own, or its load's, is a warning


class RequestLog:
    """ASGI middleware, around all others: it answers with the client's `X-Request-ID` or one of its own, and writes a
    line when the request is over. Where REPLICA is set, `X-Replica` says who answered.

    What was refused has a line at `info` or `warning`; so has, with LOG_REQUESTS, everything but successful reads.
    Those are at `debug`: health checks, Prometheus and the dashboard repeat them all day.
    """

    def __init__(
        self, app: ASGIApp, log_requests: bool, tracing: Callable[[], Tracing | None], replica: str | None = None
    ) -> None:
        """`replica` is told to everyone, so it must be a name that was chosen for that: not the machine's own."""
        self._app = app
        self._replica = replica
        self._usual_level = logging.INFO if log_requests else logging.DEBUG
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if ACCEPTABLE.fullmatch(given) else secrets.token_hex(8)
        started = perf_counter()
        state = scope.setdefault("state", {})
        state.update(request_id=request_id, records=[])
        tracing = self._tracing()
        span = None if tracing is None or scope["method"] in READING else tracing.begin(scope, started)
        if span is not None:
            state["span"] = span
        status = 0

        async def stamping_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-ID"] = request_id
                if self._replica is not None:
                    headers["X-Replica"] = self._replica
                # Answers repeat what clients say; no browser may take one for a page.
                headers.setdefault("X-Content-Type-Options", "nosniff")
            await send(message)

        try:
            await self._app(scope, receive, stamping_send)
        except BaseException as error:
            status = status or (CLIENT_CLOSED_REQUEST if isinstance(error, asyncio.CancelledError) else 500)
            raise
        finally:
            ended = perf_counter()
            if span is not None:
                span.end(scope, status, ended)
            self._write(scope, status, ended - started, span)

    def _write(self, scope: Scope, status: int, seconds: float, span: RequestSpan | None) -> None:
        refusal = scope["state"].get("refusal")
        level = logging.DEBUG
        if refusal is not None:
            level = logging.WARNING if status >= FAULT_FROM else logging.INFO
        elif status == CLIENT_CLOSED_REQUEST and not scope["state"]["records"]:
            pass  # the client left before it had asked for anything
        elif scope["method"] not in READING or status >= REFUSED_FROM:
            level = self._usual_level
        if logger.isEnabledFor(level):
            message = "request" if refusal is None else "request refused"
            logger.log(level, message, extra=_fields(scope, status, seconds, refusal, span))


def _fields(
    scope: Scope, status: int, seconds: float, refusal: tuple[str, str | None] | None, span: RequestSpan | None
) -> dict[str, Any]:
    """What is known of a request, without what is not. Of a refusal the kind and the field alone: its message may quote
    what the client sent."""
    state = scope["state"]
    fields: dict[str, Any] = {
        "request_id": state["request_id"],
        "method": scope["method"],
        "path": scope["path"][:LOGGED_CHARACTERS],
        "status": status,
        "key": state.get("api_key_name"),
    }
    for record in state["records"]:
        fields |= _of_record(record)
    fields["total_ms"] = round(1000 * seconds, 2)
    if refusal is not None:
        fields["error"], fields["param"] = refusal
    if span is not None:
        fields["trace_id"] = span.trace_id
    return {name: value for name, value in fields.items() if value is not None}


def _of_record(record: RequestRecord) -> dict[str, Any]:
    return {
        "dialect": record.dialect,
        "model": record.model or None,
        "lane": record.lane and record.lane.value,
        "texts": record.texts,
        "tokens": record.tokens,
        "cached": record.cached,
        "tokenize_ms": round(1000 * record.tokenize, 2),
        "queue_ms": round(1000 * record.queue, 2),
        "forward_ms": round(1000 * record.forward, 2),
    }
