"""One table from error to status, and each dialect's shape around it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.routing import Match

from vecmill.core.errors import (
    BodyTooLarge,
    DeadlineExceeded,
    EmptyInput,
    InputTooLong,
    InvalidInput,
    JobConflict,
    MalformedBody,
    ModelNotFound,
    NonFiniteEmbedding,
    NotFound,
    Overloaded,
    TooManyInputs,
    Unavailable,
    VecmillError,
)
from vecmill.http.services import services_of

logger = logging.getLogger(__name__)

T = TypeVar("T")

# The nearest class in an error's MRO decides.
STATUS: Mapping[type[VecmillError], int] = {
    InvalidInput: 400,
    NonFiniteEmbedding: 422,
    BodyTooLarge: 413,
    NotFound: 404,
    JobConflict: 409,
    Overloaded: 429,
    DeadlineExceeded: 504,
    Unavailable: 503,
    VecmillError: 500,
}


@dataclass(frozen=True, slots=True)
class ErrorShape:
    """How one dialect writes an error."""

    body: Callable[[VecmillError, int], dict[str, object]]
    status: Mapping[type[VecmillError], int] = field(default_factory=dict)
    """Where this dialect's statuses differ from STATUS."""


def _openai(error: VecmillError, status: int) -> dict[str, object]:
    """https://platform.openai.com/docs/guides/error-codes; all four keys are always there."""
    kinds = {
        401: "authentication_error",
        404: "invalid_request_error",
        429: "rate_limit_error",
        503: "server_error",
    }
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": _openai_code(error)}}


def _openai_code(error: VecmillError) -> str | None:
    codes: Mapping[type[VecmillError], str] = {
        InputTooLong: "context_length_exceeded",
        ModelNotFound: "model_not_found",
        TooManyInputs: "array_above_max_length",
        EmptyInput: "empty_array",
        Overloaded: "rate_limit_exceeded",
        DeadlineExceeded: "timeout",
        BodyTooLarge: "request_too_large",
    }
    return next((codes[kind] for kind in type(error).__mro__ if kind in codes), None)


def _rerank(error: VecmillError, status: int) -> dict[str, object]:
    """vLLM's envelope, with the top-level keys that Cohere's and Jina's clients read."""
    return {**_openai(error, status), "message": error.message, "detail": error.message}


def _tei(error: VecmillError, status: int) -> dict[str, object]:
    """text-embeddings-inference: {"error", "error_type"}."""
    kinds: Mapping[type[VecmillError], str] = {
        EmptyInput: "Empty",
        NonFiniteEmbedding: "Backend",
        InvalidInput: "Validation",
        Overloaded: "Overloaded",
        DeadlineExceeded: "Overloaded",
        Unavailable: "Unhealthy",
        VecmillError: "Validation" if status < 500 else "Backend",
    }
    return {"error": error.message, "error_type": _nearest(kinds, error)}


def _detail(error: VecmillError, status: int) -> dict[str, object]:
    """FastAPI's own: what the servers before this one answered on /jobs."""
    return {"detail": error.message}


OPENAI = ErrorShape(_openai)
RERANK = ErrorShape(_rerank)
TEI = ErrorShape(
    _tei,
    # An over-long input stays a 400: TEI's own status for it changed from 413 to 422 between versions.
    {InvalidInput: 422, EmptyInput: 400, InputTooLong: 400, MalformedBody: 400},
)
DETAIL = ErrorShape(_detail)

# The first prefix that fits decides.
SHAPES: tuple[tuple[str, ErrorShape], ...] = (
    ("/v1/rerank", RERANK),
    ("/rerank", RERANK),
    ("/v1/", OPENAI),
    ("/embed", TEI),
    ("/", DETAIL),
)


def shape_for(path: str) -> ErrorShape:
    """The error shape of whoever calls this path."""
    return next(shape for prefix, shape in SHAPES if path.startswith(prefix))


def error_response(path: str, error: VecmillError) -> Response:
    """The answer to an error, in the dialect of the path."""
    shape = shape_for(path)
    status = _nearest({**STATUS, **shape.status}, error)
    headers: dict[str, str] = {}
    if isinstance(error, Overloaded | Unavailable):
        headers = {"Retry-After": str(error.retry_after), "x-should-retry": "true"}
    elif isinstance(error, DeadlineExceeded):
        headers = {"x-should-retry": "false"}  # it would only take as long again
    return JSONResponse(shape.body(error, status), status_code=status, headers=headers)


def _nearest(table: Mapping[type[VecmillError], T], error: VecmillError) -> T:
    return next(table[kind] for kind in type(error).__mro__ if kind in table)


def install(app: FastAPI) -> None:
    """Answer every exception through this table."""
    app.add_exception_handler(VecmillError, _on_vecmill_error)  # type: ignore[arg-type]
    app.add_exception_handler(RequestValidationError, _on_validation_error)  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, _on_http_exception)  # type: ignore[arg-type]
    app.add_exception_handler(Exception, _on_bug)


async def _on_vecmill_error(request: Request, error: VecmillError) -> Response:
    response = error_response(request.url.path, error)
    kind = type(error).__name__
    services_of(request).telemetry.error(response.status_code, kind)
    level = logging.WARNING if response.status_code >= 429 else logging.INFO
    # The message may quote what the client sent; the log gets the kind and the field alone.
    logger.log(
        level,
        "request refused",
        extra={"path": request.url.path, "status": response.status_code, "error": kind, "param": error.param},
    )
    return response


async def _on_validation_error(request: Request, error: RequestValidationError) -> Response:
    return await _on_vecmill_error(request, _translate(error))


def _translate(error: RequestValidationError) -> VecmillError:
    """The first of pydantic's errors as one sentence that names the field and repeats no input."""
    first = error.errors()[0]
    location = first["loc"][1:]  # without where it was found: body, path or query
    field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "")
        return MalformedBody(f"The request body is not valid JSON: {reason}.")
    if not location:
        return MalformedBody("The request body must be a JSON object, sent with Content-Type: application/json.")
    problem = first["msg"].removeprefix("Value error, ")
    return InvalidInput(f"`{field}`: {problem}", param=field)


async def _on_http_exception(request: Request, error: HTTPException) -> Response:
    """404, 405 and their like from the router; and what FastAPI wraps when a body cannot be read."""
    if isinstance(error.__cause__, VecmillError):
        return await _on_vecmill_error(request, error.__cause__)
    headers = dict(error.headers or {})
    message = str(error.detail)
    if error.status_code == HTTPStatus.NOT_FOUND:
        message = f"There is nothing at {request.url.path[:200]}; see /docs for what there is."
    elif error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        headers["Allow"] = ", ".join(_methods(request))
        message = f"{request.method} is not possible here; use {headers['Allow']}."
    body = shape_for(request.url.path).body(NotFound(message), error.status_code)
    services_of(request).telemetry.error(error.status_code, "HTTPException")
    return JSONResponse(body, status_code=error.status_code, headers=headers)


def _methods(request: Request) -> list[str]:
    """Every method of this path; Starlette names those of the first route that fits."""
    return sorted(
        method
        for method in ("DELETE", "GET", "POST")
        if any(
            route.matches({**request.scope, "method": method})[0] is Match.FULL for route in request.app.router.routes
        )
    )


async def _on_bug(request: Request, error: Exception) -> Response:
    """A fault of ours. The log has the traceback; the client is told nothing of the inside."""
    logger.error("unhandled error", exc_info=error, extra={"path": request.url.path})
    services_of(request).telemetry.error(500, type(error).__name__)
    return error_response(request.url.path, VecmillError("The server failed on this request; its log says why."))
