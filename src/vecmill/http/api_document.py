"""What the API's document says beyond what FastAPI finds in the routes: examples, errors, the key.

Source: https://spec.openapis.org/oas/v3.1.0
"""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Collection, Iterable, Iterator
from functools import cache
from hashlib import sha256
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse

from vecmill.core.errors import InvalidInput
from vecmill.http.access import is_open
from vecmill.http.dialects.registry import shape_for
from vecmill.http.route import InferenceRoute

Object = dict[str, Any]

OFFLINE_FILES = "/static-offline-docs"
SCRIPT = re.compile(rb"<script>(.*?)</script>", re.DOTALL)

RETRY_AFTER = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}}}
ERRORS: dict[str, Object] = {
    "400": {"description": "The request is not valid; the message names the field."},
    "401": {"description": "The API key is missing or wrong."},
    "403": {"description": "A web page of another origin, or a name that this server does not answer to."},
    "404": {"description": "There is no such model, job, file or batch."},
    "408": {"description": "The request did not arrive in time."},
    "409": {"description": "The present state of the job or batch does not allow this."},
    "413": {"description": "The body is larger than MAX_BODY_BYTES, or a file than MAX_FILE_BYTES or MAX_FILES_BYTES."},
    "415": {"description": "The Content-Encoding of the body is neither gzip nor deflate."},
    "422": {"description": "A vector is not finite; or, in TEI's and NIM's dialects, the request is not valid."},
    "429": {"description": "There is no room now.", "headers": RETRY_AFTER},
    "503": {"description": "Loading, shutting down, short of memory or failed.", "headers": RETRY_AFTER},
    "504": {"description": "Not answered in time."},
    "507": {"description": "The disk is full."},
}
KEY: Object = {
    "type": "http",
    "scheme": "bearer",
    "description": "One of the server's keys (API_KEY); without those, none is needed.",
}


def install(app: FastAPI, routers: Iterable[APIRouter]) -> None:
    """Complete the document that `app.openapi` gives; `routers` are those of the application."""
    generate = app.openapi
    for_models = {
        (method, route.path_format)
        for router in routers
        for route in router.routes
        if isinstance(route, InferenceRoute)
        for method in route.methods or ()
    }

    @cache
    def openapi() -> Object:
        return _completed(generate(), for_models)

    app.openapi = openapi  # type: ignore[method-assign]  # as FastAPI's documentation has it

    app.get("/docs", include_in_schema=False)(_docs)


# Whoever has signed in at the dashboard has done so for its tab: see server.js.
WITH_THE_TAB_S_KEY = b"""onComplete: () => {
        const key = sessionStorage.getItem("vecmill-api-key");
        if (key) ui.preauthorizeApiKey("API key", key);
    },
    """


# FastAPI keeps the functions of routes for as long as the process lives, so none of them may hold an application.
async def _docs(request: Request) -> HTMLResponse:
    return _page(request.app, str(request.scope.get("root_path", "")))


def _page(app: FastAPI, root: str) -> HTMLResponse:
    """The document for people, with the files that fastapi-offline ships. Nothing else may run in it, or show it."""
    html = bytes(
        get_swagger_ui_html(
            openapi_url=f"{root}{app.openapi_url}",
            title=f"{app.title} - Swagger UI",
            swagger_js_url=f"{root}{OFFLINE_FILES}/swagger-ui-bundle.js",
            swagger_css_url=f"{root}{OFFLINE_FILES}/swagger-ui.css",
            swagger_favicon_url=f"{root}{OFFLINE_FILES}/favicon.png",
        ).body
    ).replace(b"presets: [", WITH_THE_TAB_S_KEY + b"presets: [")
    own = " ".join(f"'sha256-{b64encode(sha256(script).digest()).decode()}'" for script in SCRIPT.findall(html))
    policy = (
        "default-src 'none'",
        f"script-src 'self' {own}",
        "style-src 'self' 'unsafe-inline'",  # Swagger UI writes style attributes
        "connect-src 'self'",
        "img-src 'self' data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
    headers = {
        "Content-Security-Policy": "; ".join(policy),
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
    }
    return HTMLResponse(html, headers=headers)


def _completed(document: Object, for_models: Collection[tuple[str, str]]) -> Object:
    """`for_models`: the methods and paths whose requests are work for a model."""
    components = document["components"]
    # FastAPI's shape of a validation error, which is never sent.
    for name in ("HTTPValidationError", "ValidationError"):
        components["schemas"].pop(name, None)
    components["responses"] = ERRORS
    components["securitySchemes"] = {"API key": KEY}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            _no_null_parameters(operation)
            _show_examples(operation, components["schemas"])
            _name_errors(operation, path, method.upper(), (method.upper(), path) in for_models)
    return document


def _no_null_parameters(operation: Object) -> None:
    """A header or a query has no null: one that may be left out is only not required."""
    for parameter in operation.get("parameters", ()):
        schema = parameter["schema"]
        kinds = [kind for kind in schema.pop("anyOf", ()) if kind != {"type": "null"}]
        if len(kinds) == 1:
            schema.update({**kinds[0], **schema})
        elif kinds:
            schema["anyOf"] = kinds


def _show_examples(operation: Object, schemas: Object) -> None:
    """Those of a body's schemas again, where Swagger UI fills in a form from: one for each alternative."""
    for content in operation.get("requestBody", {}).get("content", {}).values():
        if examples := dict(_examples(content["schema"], schemas)):
            content["examples"] = examples


def _examples(schema: Object, schemas: Object) -> Iterator[tuple[str, Object]]:
    for alternative in schema.get("oneOf") or schema.get("anyOf") or [schema]:
        name = alternative.get("$ref", "").rpartition("/")[2]
        body = schemas.get(name, {})
        for value in body.get("examples", ()):
            yield name, {"summary": name, "description": body.get("description", ""), "value": value}


def _name_errors(operation: Object, path: str, method: str, is_inference: bool) -> None:
    responses = operation["responses"]
    for status, response in responses.items():
        if "$ref" in response:  # `errors.documented`; FastAPI has added a description, which stands there already
            responses[status] = {"$ref": response["$ref"]}
        # FastAPI's "anything", which Swagger UI would show as a string.
        if response.get("content") == {"application/json": {"schema": {}}}:
            response["content"] = {"application/json": {}}
    if "HTTPValidationError" in str(responses.get("422")):
        del responses["422"]
    for status in _statuses(operation, path, method, is_inference):
        responses.setdefault(status, {"$ref": f"#/components/responses/{status}"})
    operation["security"] = [] if is_open(method, path) else [{}, {"API key": []}]


def _statuses(operation: Object, path: str, method: str, is_inference: bool) -> list[str]:
    """The errors that follow from what an operation takes; those of its own are `documented` on its route."""
    parameters = operation.get("parameters", ())
    has_body = "requestBody" in operation
    has_query = any(parameter["in"] == "query" for parameter in parameters)
    has_deadline = any(parameter["name"] == "x-request-timeout" for parameter in parameters)
    names_a_model = has_body and is_inference
    refuses_with_422 = has_body and InvalidInput in shape_for(path, method).status
    rules = (
        (not is_open(method, path), "401"),
        (True, "403"),
        (has_body or has_query, "400"),
        (has_body, "408"),
        (has_body, "413"),
        (has_body, "415"),
        ("{" in path or names_a_model, "404"),
        (has_deadline or refuses_with_422, "422"),
        (has_deadline, "429"),
        (names_a_model, "503"),
        (has_deadline, "504"),
    )
    return [status for applies, status in rules if applies]
