"""Traces: a real collector's end of OTLP, and requests as clients send them."""

from __future__ import annotations

import asyncio
import re
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from opentelemetry.sdk.trace.export import ConsoleSpanExporter
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes
from opentelemetry.semconv.attributes import error_attributes, http_attributes, server_attributes, url_attributes
from opentelemetry.semconv.schemas import Schemas

from tests.conftest import serving
from tests.tiny_checkpoints import tiny_bert
from vecmill import __version__
from vecmill.core.errors import StartupError
from vecmill.http import tracing
from vecmill.http.tracing import open_tracing

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
CONTEXT = f"00-{TRACE}-{PARENT}-01"
KEY, TEXT = "a-key-that-nobody-may-see", "a text that nobody may see"
SERVER, INTERNAL = Span.SPAN_KIND_SERVER, Span.SPAN_KIND_INTERNAL


class Collector:
    """Takes spans as OTLP over HTTP."""

    def __init__(self) -> None:
        self.requests: list[ExportTraceServiceRequest] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.path == "/v1/traces"
                body = self.rfile.read(int(self.headers["Content-Length"]))
                collector.requests.append(ExportTraceServiceRequest.FromString(body))
                answer = ExportTraceServiceResponse().SerializeToString()
                self.send_response(200)
                self.send_header("Content-Type", "application/x-protobuf")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, format: str, *args: object) -> None:
                """Nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def spans(self) -> list[Span]:
        return [
            span
            for request in self.requests
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]

    def roots(self) -> list[Span]:
        return [span for span in self.spans if span.kind == SERVER]

    def below(self, root: Span) -> dict[str, Span]:
        return {span.name: span for span in self.spans if span.parent_span_id == root.span_id}


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, minilm_folder: Path) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("traces") / "tiny", minilm_folder)


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in pairs}


async def test_a_request_is_a_span_of_the_clients_trace_with_its_stages_below(
    collector: Collector, folder: Path
) -> None:
    headers = {"traceparent": CONTEXT, "X-Request-ID": "req-1", "Authorization": f"Bearer {KEY}"}
    async with serving(embed_model=str(folder), otlp_endpoint=collector.url, api_key=KEY) as client:
        body = {"input": [TEXT, "another"], "model": "tiny", "dimensions": 31}
        assert (await client.post("/v1/embeddings", json=body, headers=headers)).status_code == 400
        body = {"query": TEXT, "documents": ["one", "two"], "model": "tiny"}
        assert (await client.post("/v1/rerank/", json=body, headers=headers)).status_code == 200
        answer = await client.post("/v1/embeddings", json={"input": TEXT}, headers=headers)
        assert answer.status_code == 200
        await client.get("/health", headers=headers)
    reranked, embedded = collector.roots()[-2:]
    for root, name, route in (
        (embedded, "embeddings tiny", "/v1/embeddings"),
        (reranked, "rerank tiny", "/v1/rerank"),
    ):
        assert (root.name, root.trace_id.hex(), root.parent_span_id.hex()) == (name, TRACE, PARENT)
        found = _attributes(root.attributes)
        assert found["http.route"] == found["url.path"] == route
        assert (found["http.request.method"], found["http.response.status_code"]) == ("POST", 200)
        assert (found["gen_ai.operation.name"], found["gen_ai.provider.name"]) == (name.split()[0], "vecmill")
        assert found["gen_ai.request.model"] == found["gen_ai.response.model"] == "tiny"
        assert found["gen_ai.usage.input_tokens"] > 2
        assert (found["vecmill.request_id"], found["vecmill.lane"]) == ("req-1", "interactive")
        stages = collector.below(root)
        assert [name for name in stages if name != "admission"] == ["tokenize", "queue", "forward", "encode"]
        moments = [
            moment for span in stages.values() for moment in (span.start_time_unix_nano, span.end_time_unix_nano)
        ]
        assert moments == sorted(moments)
        assert root.start_time_unix_nano <= moments[0]
        assert moments[-1] <= root.end_time_unix_nano
        assert all(span.trace_id == root.trace_id and span.kind == INTERNAL for span in stages.values())
    resource = _attributes(collector.requests[0].resource_spans[0].resource.attributes)
    assert (resource["service.name"], resource["service.version"]) == ("vecmill", __version__)
    assert collector.requests[0].resource_spans[0].scope_spans[0].schema_url == tracing.SCHEMA_URL
    sent = b"".join(request.SerializeToString() for request in collector.requests)
    assert KEY.encode() not in sent
    assert TEXT.encode() not in sent


async def test_what_fails_is_told_and_what_only_reads_is_not(collector: Collector, folder: Path) -> None:
    async with serving(embed_model=str(folder), strict_model=True, otlp_endpoint=collector.url) as client:
        for path in ("/health", "/metrics", "/v1/models"):
            await client.get(path)
        assert (await client.post("/v1/embeddings", json={"input": TEXT, "model": TEXT})).status_code == 404
        assert (await client.post(f"/{'secret-path'}", json={})).status_code == 404
        late = {"X-Request-Timeout": "0.001"}
        assert (await client.post("/v1/embeddings", json={"input": TEXT}, headers=late)).status_code == 504
        await client.request("BREW", "/v1/embeddings", headers={"traceparent": "00-nonsense-01"})
    unknown, nowhere, late_span, brewed = collector.roots()
    assert _attributes(unknown.attributes)["error.type"] == "ModelNotFound"
    assert unknown.status.code == Status.STATUS_CODE_UNSET  # the client's mistake
    assert (nowhere.name, "url.path" in _attributes(nowhere.attributes)) == ("POST", False)
    assert late_span.status.code == Status.STATUS_CODE_ERROR
    assert _attributes(late_span.attributes)["vecmill.outcome"] == "timeout"
    assert _attributes(brewed.attributes)["http.request.method"] == "_OTHER"
    assert brewed.name in ("HTTP", "HTTP /v1/embeddings")
    assert not brewed.parent_span_id
    sent = b"".join(request.SerializeToString() for request in collector.requests)
    assert TEXT.encode() not in sent
    assert b"secret-path" not in sent


@pytest.mark.parametrize(
    ("headers", "parent"),
    [
        ([("traceparent", CONTEXT), ("tracestate", "a=1"), ("tracestate", "b=2"), ("baggage", TEXT)], True),
        ([("traceparent", CONTEXT), ("tracestate", f"{TEXT}=,;{TEXT}")], True),
        ([("traceparent", CONTEXT), ("tracestate", f"{TEXT}," * 500)], True),
        ([("traceparent", CONTEXT), ("tracestate", ",".join(f"key{number}=1" for number in range(40)))], True),
        ([("traceparent", CONTEXT), ("tracestate", "a=1,a=2")], True),
        ([("traceparent", CONTEXT), ("traceparent", CONTEXT)], False),
        ([("traceparent", CONTEXT + TEXT * 100)], False),
        ([("traceparent", "00-" + "0" * 32 + "-" + "0" * 16 + "-01"), ("tracestate", TEXT)], False),
        ([("traceparent", "\xb2\xff" + TEXT), ("tracestate", "\xff")], False),
    ],
)
def test_a_malformed_context_is_left_out_and_nobody_hears_of_it(
    headers: list[tuple[str, str]], parent: bool, caplog: pytest.LogCaptureFixture
) -> None:
    traced = tracing.Tracing([ConsoleSpanExporter(out=StringIO())])
    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers]
    span = traced.begin({"type": "http", "method": "POST", "scheme": "http", "headers": raw}, 0.0)
    assert (span.trace_id == TRACE) == parent
    if ("tracestate", "b=2") in headers:
        assert span.headers()["tracestate"] == "a=1,b=2"
    traced.close()
    assert caplog.text == ""


async def test_the_environment_asks_for_traces_as_well(
    collector: Collector, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    monkeypatch.setenv("OTEL_SERVICE_NAME", "spark")
    async with serving(embed_model=str(folder)) as client:
        await client.post("/embed", json={"inputs": "x"})
    assert [root.name for root in collector.roots()] == ["embeddings tiny"]
    resource = _attributes(collector.requests[0].resource_spans[0].resource.attributes)
    assert resource["service.name"] == "spark"


async def test_several_exporters_are_sent_to(
    collector: Collector, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "console, OTLP")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", f"{collector.url}/v1/traces")
    async with serving(embed_model=str(folder)) as client:
        await client.post("/embed", json={"inputs": "x"})
    assert [root.name for root in collector.roots()] == ["embeddings tiny"]
    assert '"name": "embeddings tiny"' in capsys.readouterr().out


def test_an_exporter_that_is_not_there_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    assert open_tracing(None, {"OTEL_TRACES_EXPORTER": "zipkin"}) is None
    assert "OTEL_TRACES_EXPORTER=zipkin" in caplog.text


async def test_a_collector_that_is_away_delays_nothing(folder: Path) -> None:
    async with serving(embed_model=str(folder), otlp_endpoint="http://127.0.0.1:9") as client:
        assert (await client.post("/embed", json={"inputs": "x"})).status_code == 200
        began = asyncio.get_running_loop().time()
    assert asyncio.get_running_loop().time() - began < 10 * tracing.FLUSH_SECONDS


def test_every_name_is_one_of_the_conventions() -> None:
    """Of those names the newest, the dimensions', came with 1.38.0."""
    known = {
        value
        for module in (gen_ai_attributes, error_attributes, http_attributes, server_attributes, url_attributes)
        for name, value in vars(module).items()
        if name.isupper() and isinstance(value, str)
    }
    pattern = re.compile(r"(http|url|error|server|gen_ai)\.[a-z_.]+")
    named = {value for value in vars(tracing).values() if isinstance(value, str) and pattern.fullmatch(value)}
    assert named <= known
    assert "gen_ai.embeddings.dimension.count" in named
    assert tuple(map(int, tracing.CONVENTIONS.split("."))) >= (1, 38, 0)
    assert tracing.SCHEMA_URL in {schema.value for schema in Schemas}


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"OTEL_SERVICE_NAME": "spark"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": ""},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_SDK_DISABLED": "true"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_TRACES_EXPORTER": "none"},
    ],
)
def test_nothing_is_traced_unless_it_is_asked_for(environment: dict[str, str]) -> None:
    assert open_tracing(None, environment) is None


def test_without_the_extra_the_setting_stops_the_start_and_the_environment_warns(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(StartupError, match=r"pip install 'vecmill\[otel\]'"):
        open_tracing("http://127.0.0.1:9", {})
    assert open_tracing(None, {"OTEL_TRACES_EXPORTER": "otlp"}) is None
    assert "vecmill[otel]" in caplog.text
