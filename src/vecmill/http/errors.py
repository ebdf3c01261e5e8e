"""Errors as answers: one table from error to status and headers, and the shape in which a dialect writes them.

Every exception is answered through this table, in the dialect of the request.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, field
from http import HTTPStatus
from math import ceil
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match

from vecmill.core.errors import (
    BatchConflict,
    BatchFailed,
    BodyTooLarge,
    DeadlineExceeded,
    EngineFailed,
    GenerationTimeout,
    GenerationUnavailable,
    HeadTooLarge,
    InsufficientStorage,
    InvalidApiKey,
    InvalidInput,
    JobConflict,
    JobsUnavailable,
    MalformedBody,
    MalformedRequest,
    MemoryLow,
    ModelConflict,
    ModelLoading,
    NonFiniteEmbedding,
    NotAllowed,
    NotFound,
    OutOfMemory,
    Overloaded,
    RequestTimedOut,
    ShuttingDown,
    StateUnavailable,
    TooManyInputs,
    Unavailable,
    UnsupportedEncoding,
    VecmillError,
    WorkLost,
    as_refusal,
)
from vecmill.http.bounds import TOO_MANY_INPUTS
from vecmill.http.hints import add_hints, explained, hints_of
from vecmill.http.services import address_of, services_of
from vecmill.telemetry.refusals import Blame, Refusal

T = TypeVar("T")
logger = logging.getLogger(__name__)

MOST_EXTRA_PARTS = 3  # of a path, that a base address has put before the one that is served
CLIENT_CLOSED_REQUEST = 499  # nginx's; nobody is left to read it
LOGGED_CHARACTERS = 200
LONGEST_PROBLEM = 500  # characters
FAULT = "The server failed on this request; its log says why."

# Prefix of the tags that tell the bodies of a shared path apart; left out of the locations of errors.
DIALECT_TAG = "dialect:"
LONGEST_NAME = 100  # characters, of a field that the client has named
MOST_BYTES = 4096  # of an error
LENGTHS = (1000, 500, 200, 50)  # characters of its message, of which some shapes have three

# The nearest class in an error's MRO decides.
STATUS: Mapping[type[VecmillError], int] = {
    InvalidInput: 400,
    NonFiniteEmbedding: 422,
    MalformedRequest: 400,
    HeadTooLarge: 431,
    RequestTimedOut: 408,
    UnsupportedEncoding: 415,
    InvalidApiKey: 401,
    NotAllowed: 403,
    BodyTooLarge: 413,
    NotFound: 404,
    Overloaded: 429,
    JobConflict: 409,
    BatchConflict: 409,
    ModelConflict: 409,
    DeadlineExceeded: 504,
    Unavailable: 503,
    GenerationUnavailable: 502,
    InsufficientStorage: 507,
    VecmillError: 500,
}

# Refused for the load: there is room, or time, at another moment.
OF_LOAD = (Overloaded, MemoryLow, ModelLoading, ShuttingDown, DeadlineExceeded)
# Their messages are made of what the server knows; all others may repeat what the client sent.
IN_OWN_WORDS = (
    *OF_LOAD,
    BatchFailed,
    EngineFailed,
    JobsUnavailable,
    OutOfMemory,
    RequestTimedOut,
    StateUnavailable,
    WorkLost,
)
DASHBOARD = "/dashboard/"
# Of pydantic's errors, those whose messages are made of the field's own bounds, never of what came in.
SAY_NO_INPUT = frozenset(
    [
        "missing",
        "greater_than",
        "greater_than_equal",
        "less_than",
        "less_than_equal",
        "string_too_long",
        "string_too_short",
        "too_long",
        "too_short",
        "int_type",
        "int_parsing",
        "int_from_float",
        "float_type",
        "float_parsing",
        "finite_number",
        "string_type",
        "bool_type",
        "bool_parsing",
        "list_type",
        "dict_type",
        "literal_error",
        "enum",
    ]
)

OTHER_HEADERS: Mapping[type[VecmillError], Mapping[str, str]] = {
    InvalidApiKey: {"WWW-Authenticate": "Bearer"},
    RequestTimedOut: {"Connection": "close"},  # what is left of it cannot be told from another request
    UnsupportedEncoding: {"Accept-Encoding": "gzip, deflate"},
    VecmillError: {},
}


@dataclass(frozen=True, slots=True)
class ErrorShape:
    """How one dialect writes an error."""

    name: str
    body: Callable[[VecmillError, int], dict[str, object]]
    status: Mapping[type[VecmillError], int] = field(default_factory=dict)
    """Where this dialect's statuses differ from the common ones."""
    busy: Callable[[Mapping[str, str]], int] = lambda headers: 429
    """The status that makes its clients try again when there is no room, by the request's headers."""


def shortened(text: object, longest: int = LONGEST_NAME) -> str:
    """The text, its middle left out where it is long: the end of a sentence has the cure."""
    whole = str(text)
    if len(whole) <= longest:
        return whole
    kept = longest // 2
    return f"{whole[:kept]} ... {whole[-kept:]}"


def bounded_body(shape: ErrorShape, error: VecmillError, status: int) -> dict[str, object]:
    """An error in a dialect's shape, of at most MOST_BYTES as JSON, whatever of the client's own it repeats."""
    told = copy(error)
    told.message = encodable(error.message)
    told.param = None if error.param is None else encodable(error.param)
    body = shape.body(told, status)
    for longest in LENGTHS:
        if len(json.dumps(body)) <= MOST_BYTES:
            break
        short = copy(told)
        short.message = shortened(told.message, longest)
        short.param = None if told.param is None else shortened(told.param)
        body = shape.body(short, status)
    return body


def encodable(text: str) -> str:
    """Lone surrogates, which JSON's escapes can bring and UTF-8 cannot hold, as escapes again."""
    return text.encode("utf-8", "backslashreplace").decode()


def nearest(table: Mapping[type[VecmillError], T], error: VecmillError) -> T:
    """What the table has for the nearest class in the error's MRO."""
    return next(table[kind] for kind in type(error).__mro__ if kind in table)


def _detail(error: VecmillError, status: int) -> dict[str, object]:
    """FastAPI's own: what the servers before this one answered on /jobs."""
    return {"detail": error.message}


DETAIL = ErrorShape("detail", _detail)
"""The shape on paths that are no dialect's."""


def error_response(shape: ErrorShape, error: VecmillError, headers: Mapping[str, str] | None = None) -> Response:
    """The answer to an error, in a dialect's shape. `headers` are those of the request, if there is one."""
    status = nearest({**STATUS, **shape.status}, error)
    if isinstance(error, Overloaded) and headers is not None:
        status = shape.busy(headers)
    return JSONResponse(bounded_body(shape, error, status), status_code=status, headers=_headers(error))


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route or a router: errors that it answers with, beyond those that `api_document` finds out."""
    return {status: {"$ref": f"#/components/responses/{status}"} for status in statuses}


def _headers(error: VecmillError) -> dict[str, str]:
    """What says whether to try again, in the words that the OpenAI and Cohere SDKs read."""
    if isinstance(error, Overloaded | Unavailable):
        seconds = error.retry_after
        return {
            "Retry-After": str(ceil(seconds)),
            "retry-after-ms": str(ceil(1000 * seconds)),
            "x-should-retry": "true",
        }
    if isinstance(error, DeadlineExceeded | InsufficientStorage):
        return {"x-should-retry": "false"}  # it would only take as long, or be as full, again
    return dict(nearest(OTHER_HEADERS, error))


def shape_of(request: Request) -> ErrorShape:
    """The shape of a request's dialect: by its body once that has been read, before by its path."""
    by_body: ErrorShape | None = getattr(request.state, "error_shape", None)
    if by_body is not None:
        return by_body
    by_path: ErrorShape = request.app.state.shape_for(request.url.path, request.method)
    return by_path


def dialect_of(request: Request) -> str:
    """The name of a request's dialect: by its body once that has been read, before by its path; `none` on paths that
    are no dialect's."""
    by_body: str | None = getattr(request.state, "dialect", None)
    if by_body is not None:
        return by_body
    by_path: str = request.app.state.dialect_for(request.scope["path"], request.method)
    return by_path


def install(app: FastAPI, shape_for: Callable[[str, str], ErrorShape], dialect_for: Callable[[str, str], str]) -> None:
    """Answer every exception of the application through this table.

    `shape_for`: the shape of errors on a path, called with a method; `dialect_for`: the name of its dialect.
    """
    app.state.shape_for, app.state.dialect_for = shape_for, dialect_for
    app.add_exception_handler(VecmillError, refused)  # type: ignore[arg-type]
    app.add_exception_handler(RequestValidationError, _on_validation_error)  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, _on_http_exception)  # type: ignore[arg-type]
    app.add_exception_handler(ClientDisconnect, _gone)
    for kind in (MemoryError, RuntimeError, OSError, ExceptionGroup):
        app.add_exception_handler(kind, _on_lack_of_memory)
    app.add_exception_handler(Exception, _on_bug)


async def refused(request: Request, error: VecmillError) -> Response:
    """The answer to an error, counted, and noted for the log."""
    error = explained(error, hints_of(request))
    kind = type(error).__name__
    response = add_hints(request, error_response(shape_of(request), error, request.headers))
    _report(request, error, response.status_code)
    # The line of the log, which RequestLog writes, has the kind and the field: the message may quote the client.
    request.state.refusal = kind, error.param and error.param[:LOGGED_CHARACTERS]
    return response


def _report(request: Request, error: Exception, status: int) -> None:
    """Count an error, and keep it among the last."""
    blame = blamed(error, status)
    services_of(request).telemetry.error(status, type(error).__name__, dialect_of(request), blame)
    if blame is Blame.CLIENT and request.url.path.startswith(DASHBOARD):
        return  # such as the page's own, before somebody signs in
    keep_refusal(request, _name_of(error, status), status, reason_of(error, status), getattr(error, "param", None))


def keep_refusal(request: Request, name: str, status: int, reason: str, param: str | None = None) -> None:
    """Keep an error among the last. Nothing of `reason` may be the client's."""
    state = request.state
    services_of(request).telemetry.refusals.add(
        Refusal(
            request_id=getattr(state, "request_id", ""),
            status=status,
            error=name,
            reason=reason,
            param=param,
            path=request.url.path[:LOGGED_CHARACTERS],
            client=address_of(request),
            key=getattr(state, "api_key_name", None),
            owner=state.viewer.owner if hasattr(state, "viewer") else None,
        )
    )


def blamed(error: Exception, status: int) -> Blame:
    """Whose fault an error is."""
    if isinstance(error, OF_LOAD) and not isinstance(error, GenerationTimeout):
        return Blame.LOAD
    return _blamed_by_status(status)


def blamed_for_another(status: int) -> Blame:
    """Whose fault it is that a server behind this one answered with an error."""
    if status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE):
        return Blame.LOAD
    return _blamed_by_status(status)


def _blamed_by_status(status: int) -> Blame:
    return Blame.CLIENT if status < HTTPStatus.INTERNAL_SERVER_ERROR else Blame.SERVER


def _name_of(error: Exception, status: int) -> str:
    """The error in one word: `overloaded`, `too_many_inputs`; the status' own where the router refuses."""
    if isinstance(error, HTTPException):
        return HTTPStatus(status).name.lower()
    return re.sub("(?<!^)(?=[A-Z])", "_", type(error).__name__).lower()


def reason_of(error: Exception, status: int) -> str:
    """Why, as a sentence in which nothing is the client's: of its faults that is what the class says of itself."""
    if isinstance(error, HTTPException):
        return f"{HTTPStatus(status).phrase}."
    if not isinstance(error, VecmillError):
        return FAULT
    if isinstance(error, IN_OWN_WORDS):
        return error.message
    if error.reason is not None:
        return error.reason
    return (type(error).__doc__ or "").strip()


async def _on_validation_error(request: Request, error: RequestValidationError) -> Response:
    return await refused(request, _translate(error.errors()[0]))


def invalid_body(error: ValidationError) -> VecmillError:
    """What a body that is no request's own is refused with."""
    first = error.errors()[0]
    return _translate({**first, "loc": ("body", *first["loc"])})


def _translate(first: Mapping[str, Any]) -> VecmillError:
    """One of pydantic's errors as one sentence that names the field and repeats no input."""
    # Without where it was found (body, path or query), and without which of several bodies it is.
    location = [part for part in first["loc"][1:] if not str(part).startswith(DIALECT_TAG)]
    field = "".join(f"[{part}]" if isinstance(part, int) else f".{shortened(part)}" for part in location).lstrip(".")
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "")
        return MalformedBody(f"The request body is not valid JSON: {reason}.")
    if not location:
        return MalformedBody("The request body must be a JSON object, sent with Content-Type: application/json.")
    if first["type"] == TOO_MANY_INPUTS:
        return TooManyInputs(f"`{field}` {first['msg']}.", param=field)
    problem = shortened(first["msg"].removeprefix("Value error, "), LONGEST_PROBLEM)
    error = InvalidInput(f"`{field}`: {problem}", param=field)
    if first["type"] in SAY_NO_INPUT:
        error.reason = f"{problem}."
    return error


async def _on_http_exception(request: Request, error: HTTPException) -> Response:
    """404, 405 and their like from the router; and what FastAPI wraps when a body cannot be read."""
    if isinstance(error.__cause__, ClientDisconnect):
        return await _gone(request, error.__cause__)
    if isinstance(error.__cause__, Exception):  # also where FastAPI takes it for the client's fault
        refusal = as_refusal(error.__cause__)
        if isinstance(refusal, VecmillError):
            return await refused(request, refusal)
    headers = dict(error.headers or {})
    message = str(error.detail)
    if error.status_code == HTTPStatus.NOT_FOUND:
        meant = _meant(request)
        cure = f"{meant} is served: take what stands before it off the client's base URL, or see" if meant else "see"
        message = f"There is nothing at {request.url.path[:200]}; {cure} /docs for what there is."
    elif error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        headers["Allow"] = ", ".join(_methods(request))
        message = f"{request.method} is not possible here; use {headers['Allow']}."
    body = bounded_body(shape_of(request), NotFound(message), error.status_code)
    _report(request, error, error.status_code)
    return JSONResponse(body, status_code=error.status_code, headers=headers)


async def _gone(request: Request, error: Exception) -> Response:
    """The client left before it had sent its request: neither a fault nor worth a line above `debug`."""
    return Response(status_code=CLIENT_CLOSED_REQUEST)


def _methods(request: Request) -> list[str]:
    """Every method of this path; Starlette names those of the first route that fits."""
    methods = [method for method in ("DELETE", "GET", "POST") if _is_served(request, method, request.scope["path"])]
    return sorted([*methods, "HEAD"] if "GET" in methods else methods)


def _is_served(request: Request, method: str, path: str) -> bool:
    scope = {**request.scope, "method": method, "path": path}
    return any(route.matches(scope)[0] is Match.FULL for route in request.app.router.routes)


def _meant(request: Request) -> str | None:
    """The path that is served where a base address ends with a part too many: `/v1/v2/embed`, `/api/v1/embeddings`."""
    parts = request.scope["path"].split("/")[1:]
    paths = ("/" + "/".join(parts[start:]) for start in range(1, min(len(parts), MOST_EXTRA_PARTS + 1)))
    return next((path for path in paths if _is_served(request, request.method, path)), None)


async def _on_lack_of_memory(request: Request, error: Exception) -> Response:
    """Memory that ran out is no fault: the request is refused. What else has one of these types is."""
    refusal = as_refusal(error)
    if not isinstance(refusal, VecmillError):
        raise error
    return await refused(request, refusal)


async def _on_bug(request: Request, error: Exception) -> Response:
    """A fault of ours, or memory that ran out in the middleware.

    The log has the traceback of a fault; the client is told nothing of the inside.
    """
    refusal = as_refusal(error)
    if isinstance(refusal, VecmillError):
        response = await refused(request, refusal)
    else:
        logger.error("unhandled error", exc_info=error, extra={"path": request.url.path})
        _report(request, error, 500)
        response = error_response(shape_of(request), VecmillError(FAULT))
    # This answer is made outside of all middleware, RequestLog included.
    response.headers["X-Request-ID"] = request.state.request_id
    return response
