"""Traces by OpenTelemetry: for each request a span of the server, and one below it for each stage.

Names are those of version CONVENTIONS of the semantic conventions, and all are in this file: those of HTTP servers, and
those of GenAI embeddings. The latter are in development, so that another version is another set of names. Neither texts
nor keys are in a span. Nothing of OpenTelemetry is imported until traces are asked for.

The spans of the stages are made when the request is over, from the times that its record has: a request that is not
traced pays nothing for them.

Sources: https://github.com/open-telemetry/semantic-conventions/blob/v1.38.0/docs/gen-ai/gen-ai-spans.md#embeddings and
https://github.com/open-telemetry/semantic-conventions/blob/v1.38.0/docs/http/http-spans.md; https://www.w3.org/TR/trace-context/
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator, Mapping
from threading import Thread
from time import perf_counter, time_ns
from typing import TYPE_CHECKING, Any

from starlette.datastructures import Headers
from starlette.types import Scope

from vecmill import __version__
from vecmill.core.errors import StartupError
from vecmill.core.types import Outcome, RequestRecord
from vecmill.http.middleware import plain_path

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import Span, TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter

logger = logging.getLogger(__name__)

CONVENTIONS = "1.38.0"
SCHEMA_URL = f"https://opentelemetry.io/schemas/{CONVENTIONS}"

# HTTP server spans, stable.
REQUEST_METHOD = "http.request.method"
ROUTE = "http.route"
STATUS_CODE = "http.response.status_code"
SCHEME = "url.scheme"
PATH = "url.path"
ERROR_TYPE = "error.type"
SERVER_ADDRESS = "server.address"
SERVER_PORT = "server.port"
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"})
OTHER_METHOD, OTHER_METHOD_NAME = "_OTHER", "HTTP"  # as the attribute, and in a span's name

# GenAI embeddings spans, in development. `rerank` is not among the well-known operations.
OPERATION = "gen_ai.operation.name"
OPERATIONS = {"embed": "embeddings", "rerank": "rerank"}
PROVIDER = "gen_ai.provider.name"
REQUEST_MODEL = "gen_ai.request.model"
RESPONSE_MODEL = "gen_ai.response.model"
INPUT_TOKENS = "gen_ai.usage.input_tokens"
DIMENSIONS = "gen_ai.embeddings.dimension.count"

# What no convention has a word for.
REQUEST_ID = "vecmill.request_id"
DIALECT = "vecmill.dialect"
LANE = "vecmill.lane"
TEXTS = "vecmill.texts"
CACHED_TEXTS = "vecmill.cached_texts"
TRUNCATED_TEXTS = "vecmill.truncated_texts"
OUTCOME = "vecmill.outcome"

CONTEXT = ("traceparent", "tracestate")
# They warn of each header that is malformed, and repeat it: whatever a client sends would be in the log.
LOGGERS_OF_CONTEXT = ("opentelemetry.trace.span", "opentelemetry.trace.propagation.tracecontext")
TRACES_PATH = "/v1/traces"
FLUSH_SECONDS = 3.0
"""That the end of the server waits for spans which a collector does not take."""
LONG_ADMISSION = 0.001
"""Seconds of waiting for room from which on it is a span of its own."""
SERVER_FAULTS = 500
EXTRA = "pip install 'vecmill[otel]'"

# What asks for traces, of the SDK's own variables.
# Source: https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/
DISABLED = "OTEL_SDK_DISABLED"
EXPORTER = "OTEL_TRACES_EXPORTER"
SENT = frozenset({"otlp", "console"})
"""What EXPORTER, a list, may have of the exporters that there are."""
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")


def open_tracing(endpoint: str | None, environment: Mapping[str, str]) -> Tracing | None:
    """Traces as OTLP_ENDPOINT, or else the environment, asks for them; None where nothing does.

    Raises:
        StartupError: OTLP_ENDPOINT is set and the extra `otel` is missing, or a variable has an impossible value.
    """
    kinds = {kind.strip() for kind in environment.get(EXPORTER, "").lower().split(",")} - {""}
    wanted = endpoint is not None or bool(kinds & SENT) or any(environment.get(name) for name in ENDPOINTS)
    if kinds - SENT - {"none"}:
        logger.warning("%s=%s: traces are sent by otlp and console only", EXPORTER, environment[EXPORTER])
    if not wanted or "none" in kinds or environment.get(DISABLED, "").strip().lower() == "true":
        return None
    protocol = next((environment[name] for name in PROTOCOLS if environment.get(name)), "")
    if protocol.strip().lower() == "grpc":
        logger.warning("traces are sent as http/protobuf, which is all that the extra `otel` speaks, and not as grpc")
    try:
        return Tracing(list(_exporters(endpoint, kinds)))
    except ModuleNotFoundError:
        if endpoint is not None:
            raise StartupError(f"OTLP_ENDPOINT needs the extra `otel`: {EXTRA}.") from None
        logger.warning("the environment asks for traces (OTEL_...), but the extra `otel` is missing: %s", EXTRA)
        return None
    except ValueError as error:
        raise StartupError(
            f"A variable of OpenTelemetry (OTEL_...) has a value that it does not take: {error}"
        ) from None


def _exporters(endpoint: str | None, kinds: set[str]) -> Iterator[SpanExporter]:
    if "console" in kinds:
        from opentelemetry.sdk.trace.export import ConsoleSpanExporter

        yield ConsoleSpanExporter(out=sys.stdout)
    if endpoint is None and kinds == {"console"}:
        return
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    base = None if endpoint is None else endpoint.rstrip("/").removesuffix(TRACES_PATH)
    yield OTLPSpanExporter(endpoint=base and base + TRACES_PATH)


class Tracing:
    """The tracer of one server. Its spans are sent by a thread of the SDK's, in batches."""

    def __init__(self, exporters: Iterable[SpanExporter]) -> None:
        """OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES win over what the server calls itself."""
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        for logger_name in LOGGERS_OF_CONTEXT:
            logging.getLogger(logger_name).setLevel(logging.ERROR)
        named = OTELResourceDetector().detect().attributes
        own = {"service.name": "vecmill", "service.version": __version__}
        resource = Resource.create({name: value for name, value in own.items() if name not in named})
        # The process has its own order of ending, in which `close` stands.
        self._provider: TracerProvider = TracerProvider(resource=resource, shutdown_on_exit=False)
        for exporter in exporters:
            self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("vecmill", __version__, schema_url=SCHEMA_URL)
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, scope: Scope, started: float) -> RequestSpan:
        """The span of a request that began at `started` (perf_counter), in its client's trace if it names one."""
        from opentelemetry.trace import SpanKind

        headers = Headers(scope=scope)
        carrier = {name: ",".join(values) for name in CONTEXT if (values := headers.getlist(name))}
        method = scope["method"] if scope["method"] in METHODS else OTHER_METHOD
        offset = time_ns() - round(1e9 * perf_counter())
        span: Any = self._tracer.start_span(
            OTHER_METHOD_NAME if method is OTHER_METHOD else method,
            self._propagator.extract(carrier),
            SpanKind.SERVER,
            {REQUEST_METHOD: method, SCHEME: scope["scheme"], **_server(scope)},
            start_time=offset + round(1e9 * started),
        )
        return RequestSpan(self, span, offset)

    def stage(self, parent: Span, name: str, start: int, end: int) -> None:
        """One span below another, of the past; in nanoseconds since the epoch."""
        from opentelemetry.trace import set_span_in_context

        self._tracer.start_span(name, set_span_in_context(parent), start_time=start).end(end)

    def carried(self, span: Span) -> dict[str, str]:
        """The headers of a request that is made on behalf of a span."""
        from opentelemetry.trace import set_span_in_context

        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, set_span_in_context(span))
        return carrier

    def close(self) -> None:
        """Send what is left, in FLUSH_SECONDS at most. Blocks."""
        ending = Thread(target=self._provider.shutdown, name="end of traces", daemon=True)
        ending.start()
        ending.join(FLUSH_SECONDS)


class RequestSpan:
    """The span of one request."""

    __slots__ = ("_offset", "_span", "_tracing")

    def __init__(self, tracing: Tracing, span: Span, offset: int) -> None:
        """`offset`: the nanoseconds since the epoch when `perf_counter` was 0."""
        self._tracing, self._span, self._offset = tracing, span, offset

    @property
    def trace_id(self) -> str:
        """In hexadecimal, for the log."""
        return f"{self._span.get_span_context().trace_id:032x}"

    def headers(self) -> dict[str, str]:
        """`traceparent` and `tracestate` of a request that is made on its behalf."""
        return self._tracing.carried(self._span)

    def end(self, scope: Scope, status: int, ended: float) -> None:
        """The request was answered with a status at `ended` (perf_counter)."""
        records: list[RequestRecord] = scope["state"]["records"]
        if self._span.is_recording():
            self._describe(scope, status, records)
            for record in records:
                for name, start, stop in _stages(record, ended):
                    self._tracing.stage(self._span, name, self._at(start), self._at(stop))
        self._span.end(self._at(ended))

    def _describe(self, scope: Scope, status: int, records: list[RequestRecord]) -> None:
        from opentelemetry.trace import StatusCode

        span, state = self._span, scope["state"]
        span.set_attributes({REQUEST_ID: state["request_id"], STATUS_CODE: status})
        if route := _route(scope, records):
            # The path itself only where no part of it is the client's.
            span.set_attributes({ROUTE: route} if "{" in route else {ROUTE: route, PATH: route})
            span.update_name(f"{scope['method'] if scope['method'] in METHODS else OTHER_METHOD_NAME} {route}")
        for record in records:
            span.set_attributes(_attributes(record))
            if record.model:
                span.update_name(f"{OPERATIONS[record.operation]} {record.model}")
        if refusal := state.get("refusal"):
            span.set_attribute(ERROR_TYPE, refusal[0])
        if status >= SERVER_FAULTS:
            span.set_status(StatusCode.ERROR)

    def _at(self, moment: float) -> int:
        return self._offset + round(1e9 * moment)


def _server(scope: Scope) -> dict[str, Any]:
    """The address that the request came in by."""
    address, port = scope.get("server") or (None, None)
    return {name: value for name, value in {SERVER_ADDRESS: address, SERVER_PORT: port}.items() if value is not None}


def _route(scope: Scope, records: list[RequestRecord]) -> str | None:
    """The pattern that the path was found by; None where nothing was: a path by itself may say anything."""
    route = getattr(scope.get("route"), "path", None)
    if isinstance(route, str):
        return route
    return plain_path(scope["path"]) if records else None  # it was spelled in another way


def _attributes(record: RequestRecord) -> dict[str, Any]:
    known = {
        OPERATION: OPERATIONS[record.operation],
        PROVIDER: "vecmill",
        REQUEST_MODEL: record.model,
        RESPONSE_MODEL: record.model,
        DIMENSIONS: record.dimensions,
        INPUT_TOKENS: record.tokens,
        DIALECT: record.dialect,
        LANE: record.lane and record.lane.value,
        TEXTS: record.texts,
        CACHED_TEXTS: record.cached,
        TRUNCATED_TEXTS: record.truncated,
        OUTCOME: record.outcome.value,
    }
    return {name: value for name, value in known.items() if value not in (None, "")}


def _stages(record: RequestRecord, ended: float) -> Iterator[tuple[str, float, float]]:
    """Name, begin and end of each stage, by `perf_counter`. Waiting for room comes before tokenizing."""
    admitted = record.arrived + record.admission
    tokenized = admitted + record.tokenize
    if record.outcome is not Outcome.OK:
        failed = record.arrived + record.total
        if record.tokenize:
            yield "tokenize", admitted, tokenized
        if record.lane is not None:
            yield "queue", tokenized if record.tokenize else record.arrived, failed
        return
    started = tokenized + record.queue - record.admission
    done = started + record.forward
    if record.admission >= LONG_ADMISSION:
        yield "admission", record.arrived, admitted
    yield "tokenize", admitted, tokenized
    yield "queue", tokenized, started
    yield "forward", started, done
    yield "encode", done, ended
