"""/metrics of a server that has done work of every kind: conventions, labels, both formats."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_openmetrics
from prometheus_client.parser import text_string_to_metric_families as read_text

from tests.conftest import serving
from tests.gated import Gate, gated, small_server, until_waiting, words
from tests.tiny_checkpoints import tiny_bert
from vecmill.core.types import Lane
from vecmill.engine import engine as engine_module
from vecmill.engine import forward
from vecmill.telemetry.metrics import OPENMETRICS, TEXT_FORMAT, prefers_openmetrics

PROMETHEUS_ACCEPTS = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,"
    "application/openmetrics-text;version=0.0.1;q=0.5,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,"
    "text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
)
SAID = "said-by-a-client"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, minilm_folder: Path) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("metrics") / "tiny", minilm_folder)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    yield from gated(monkeypatch)


@pytest.fixture(scope="module")
async def worked(folder: Path) -> AsyncIterator[httpx.AsyncClient]:
    """A server after work of every kind."""
    async with serving(embed_model=str(folder), strict_model=True, cache_max_bytes=10_000_000) as client:
        await _work(client)
        yield client


async def _work(client: httpx.AsyncClient) -> None:
    headers = {"X-Request-ID": SAID, "X-Job-ID": SAID, "User-Agent": SAID}
    for lane in ("interactive", "bulk"):
        for path, body in (
            ("/v1/embeddings", {"input": ["one", "one", lane + " long" * 600], "priority": lane}),
            ("/embed", {"inputs": ["two", lane], "priority": lane}),
            ("/api/embed", {"model": "tiny", "input": "three " + lane}),
            ("/v1/rerank", {"model": "tiny", "query": "q", "documents": ["a", lane], "priority": lane}),
        ):
            assert (await client.post(path, json=body, headers=headers)).status_code == 200, path
    refused = [
        await client.post("/v1/embeddings", json={"input": "x", "model": SAID}),
        await client.post("/v1/embeddings", json={"input": SAID, "dimensions": 7}),
        await client.post("/v1/embeddings", json={"input": "x"}, headers={"X-Request-Timeout": "0.001"}),
        await client.post(f"/{SAID}", json={}),
        await client.post("/rerank", content=b"{" + SAID.encode()),
    ]
    assert {answer.status_code for answer in refused} == {400, 404, 504}
    job = {"project": SAID, "total_chunks": 1, "instance_id": SAID}
    assert (await client.post("/jobs", json=job)).status_code == 200
    await _batch(client)


async def _batch(client: httpx.AsyncClient) -> None:
    line = {"custom_id": SAID, "method": "POST", "url": "/v1/embeddings", "body": {"model": "tiny", "input": "four"}}
    file = {"file": ("lines.jsonl", json.dumps(line).encode())}
    uploaded = (await client.post("/v1/files", files=file, data={"purpose": "batch"})).json()
    body = {"input_file_id": uploaded["id"], "endpoint": "/v1/embeddings", "completion_window": "24h"}
    batch = (await client.post("/v1/batches", json=body)).json()
    async with asyncio.timeout(20):
        while batch["status"] not in ("completed", "failed"):
            await asyncio.sleep(0.02)
            batch = (await client.get(f"/v1/batches/{batch['id']}")).json()
    assert batch["status"] == "completed"


async def _families(client: httpx.AsyncClient) -> dict[str, Metric]:
    return {family.name: family for family in read_text((await client.get("/metrics")).text)}


def _sum(family: Metric, suffix: str = "", **labels: str) -> float:
    found = (
        sample.value
        for sample in family.samples
        if sample.name.endswith(suffix) and labels.items() <= sample.labels.items()
    )
    return sum(found)


# What `promtool check metrics` holds against a family. Source: prometheus/client_golang, prometheus/testutil/promlint.
TYPES = re.compile(r"(?:^|_)(counter|gauge|histogram|summary|untyped)(?:_|$)")
UNITS = {
    **dict.fromkeys(("milliseconds", "microseconds", "nanoseconds", "minutes", "hours", "days", "weeks"), "seconds"),
    **dict.fromkeys(("kilobytes", "megabytes", "gigabytes", "kibibytes", "mebibytes", "gibibytes", "bits"), "bytes"),
    **dict.fromkeys(("kelvin", "fahrenheit"), "celsius"),
    **dict.fromkeys(("milliwatts", "kilowatts"), "watts"),
    **dict.fromkeys(("megahertz", "gigahertz", "kilohertz"), "hertz"),
    **dict.fromkeys(("percent", "percents"), "ratio"),
}
ABBREVIATIONS = frozenset(("s", "ms", "us", "ns", "sec", "b", "kb", "mb", "gb", "tb", "pb", "m", "h", "d"))
CAMEL = re.compile("[a-z][A-Z]")


def _problems(family: Metric) -> list[str]:
    """`family` as the text format is read: a counter's name has lost its `_total`."""
    name = f"{family.name}_total" if family.type == "counter" else family.name
    labels = {label for sample in family.samples for label in sample.labels}
    parts = name.split("_")
    units = set(UNITS.values()) & set(parts)
    histogram = family.type in ("histogram", "summary")
    found = {
        "no help text": not family.documentation.strip(),
        "no type": family.type in ("unknown", "untyped"),
        "counter metrics should have a `_total` suffix": family.type == "counter"
        and not all(sample.name.endswith("_total") for sample in family.samples),
        "non-counter metrics should not have a `_total` suffix": family.type != "counter" and name.endswith("_total"),
        "creation times are series of their own": any(sample.name.endswith("_created") for sample in family.samples),
        "suffix reserved for histograms": not histogram and name.endswith(("_bucket", "_count", "_sum")),
        "label reserved for histograms": family.type != "histogram" and "le" in labels,
        "label reserved for summaries": family.type != "summary" and "quantile" in labels,
        "metric name should not include its type": TYPES.search(name),
        "colons are for recording rules": ":" in name,
        "names should be in snake_case": any(CAMEL.search(word) or word != word.lower() for word in (name, *labels)),
        "use base units": UNITS.keys() & set(parts),
        "metric names should not contain abbreviated units": ABBREVIATIONS & set(parts),
        "the unit is not at the end": any(not name.removesuffix("_total").endswith(unit) for unit in units),
    }
    return [problem for problem, is_one in found.items() if is_one]


async def test_every_family_follows_the_conventions(worked: httpx.AsyncClient) -> None:
    text = (await worked.get("/metrics")).text
    assert len(re.findall(r"^# TYPE (\S+)", text, re.M)) == len(set(re.findall(r"^# TYPE (\S+)", text, re.M)))
    families = await _families(worked)
    assert {name: problems for name, family in families.items() if (problems := _problems(family))} == {}


def test_the_rules_find_what_promtool_finds() -> None:
    bad = """# HELP a_gauge x
# TYPE a_gauge gauge
a_gauge 1
# TYPE texts_total gauge
texts_total 1
# HELP wait_milliseconds x
# TYPE wait_milliseconds gauge
wait_milliseconds{camelCase="1"} 1
# HELP size_mb x
# TYPE size_mb gauge
size_mb{le="1"} 1
"""
    found = {family.name: len(_problems(family)) for family in read_text(bad)}
    assert found == {"a_gauge": 1, "texts_total": 2, "wait_milliseconds": 2, "size_mb": 2}


COUNTERS = (
    "requests texts tokens cached_texts cached_tokens computed_texts computed_tokens joined_texts abandoned_texts "
    "expired_texts truncated_texts cache_dropped cache_lost batch_lines out_of_memory_splits errors"
)


async def test_what_only_grows_is_a_counter(worked: httpx.AsyncClient) -> None:
    families = await _families(worked)
    assert {f"vecmill_{name}" for name in COUNTERS.split()} == {
        name for name, family in families.items() if family.type == "counter" and name.startswith("vecmill_")
    }


async def test_the_process_and_the_build_are_told_of(worked: httpx.AsyncClient) -> None:
    families = await _families(worked)
    [build] = families["vecmill_build_info"].samples
    assert (build.value, set(build.labels)) == (1, {"version", "python_version", "torch_version", "replica"})
    process = "cpu_seconds resident_memory_bytes virtual_memory_bytes start_time_seconds open_fds max_fds"
    assert {f"process_{name}" for name in process.split()} <= set(families)


REQUEST = {"operation", "model", "lane", "dialect", "outcome"}
MODEL = {"task", "model", "lane"}
PASS = {*MODEL, "outcome"}
LABELS = {
    **dict.fromkeys(("requests", "texts", "tokens", "cached_texts", "cached_tokens", "truncated_texts"), REQUEST),
    **dict.fromkeys(("request_duration_seconds", "request_queue_duration_seconds"), REQUEST),
    **dict.fromkeys(("request_tokenize_duration_seconds", "request_forward_duration_seconds"), REQUEST),
    **dict.fromkeys(("batch_rows", "batch_tokens", "batch_fill_ratio", "batch_duration_seconds"), PASS),
    **dict.fromkeys(("queued_texts", "queued_tokens", "computed_texts", "computed_tokens", "joined_texts"), MODEL),
    **dict.fromkeys(("abandoned_texts", "expired_texts", "out_of_memory_splits"), MODEL),
    "requests_in_flight": {"operation", "model", "lane"},
    "max_batch_tokens": {"task", "model"},
    "errors": {"dialect", "status", "error"},
}


async def test_work_is_told_apart_by_model_lane_dialect_and_outcome(worked: httpx.AsyncClient) -> None:
    families = await _families(worked)
    for name, labels in LABELS.items():
        family = families[f"vecmill_{name}"]
        assert family.samples, name
        assert all(set(sample.labels) - {"le"} == labels for sample in family.samples), name
    requests = families["vecmill_requests"]
    for dialect in ("openai", "tei", "ollama", "batch"):
        assert _sum(requests, operation="embed", model="tiny", dialect=dialect, outcome="ok") >= 1
    assert _sum(requests, operation="rerank", model="tiny", lane="bulk", outcome="ok") == 1
    assert _sum(requests, outcome="refused", model="") == 1  # no such model
    assert _sum(requests, outcome="refused", model="tiny") == 1  # no such dimensions
    assert _sum(requests, outcome="timeout", model="tiny") == 1
    duration = families["vecmill_request_duration_seconds"]
    assert _sum(duration, "_count", outcome="timeout") == 1
    assert _sum(families["vecmill_errors"], dialect="none", status="404") == 1
    assert _sum(families["vecmill_batch_fill_ratio"], "_count", model="tiny", outcome="ok") > 0


async def test_nothing_that_a_client_says_is_a_label(worked: httpx.AsyncClient) -> None:
    before = (await worked.get("/metrics")).text
    assert SAID not in before
    assert "127.0.0.1" not in before
    for number in range(20):
        name = f"{SAID}-{number}"
        headers = {"X-Job-ID": name, "X-Request-ID": name, "User-Agent": name, "X-Priority": name}
        await worked.post(
            "/v1/embeddings", json={"input": "x", "model": name}, headers={**headers, "X-Priority": "bulk"}
        )
        await worked.post("/v1/embeddings", json={"input": "x"}, headers=headers)
        await worked.post("/v1/embeddings", json={"input": name, name: 1, "encoding_format": name})
        await worked.get(f"/{name}")
        await worked.request("DELETE", f"/v1/files/{name}")
        await worked.request(f"M{number}", "/v1/embeddings")
    after = (await worked.get("/metrics")).text
    assert SAID not in after
    grown = len(after.splitlines()) - len(before.splitlines())
    assert grown < 60, "series for each thing that is said"


async def test_openmetrics_where_accept_asks_for_it(worked: httpx.AsyncClient) -> None:
    text = await worked.get("/metrics")
    asked = await worked.get("/metrics", headers={"Accept": PROMETHEUS_ACCEPTS})
    assert (text.headers["content-type"], asked.headers["content-type"]) == (TEXT_FORMAT, OPENMETRICS)
    assert "Accept" in asked.headers["vary"]
    assert asked.text.endswith("# EOF\n")
    families = {family.name: family.type for family in read_openmetrics(asked.text)}  # type: ignore[no-untyped-call]
    assert len(families) == len([*read_text(text.text)])
    assert families["vecmill_build"] == "info"
    counters = {name for name, kind in families.items() if kind == "counter"}
    assert {f"vecmill_{name}" for name in COUNTERS.split()} <= counters
    assert "_created" not in asked.text + text.text


@pytest.mark.parametrize(
    ("accept", "openmetrics"),
    [
        ("", False),
        ("*/*", False),
        ("text/plain", False),
        (PROMETHEUS_ACCEPTS, True),
        ("application/openmetrics-text", True),
        ("Application/OpenMetrics-Text; version=no; q=1.000", True),
        ("application/openmetrics-text;q=0, */*", False),
        ("application/openmetrics-text;q=0.2, text/plain;q=0.9", False),
        ("application/openmetrics-text;q=nan", False),
        ("application/openmetrics-text;q=" + "9" * 400, False),
        (";;,,;q=,=", False),
    ],
)
def test_accept_decides_by_its_weights(accept: str, openmetrics: bool) -> None:
    assert prefers_openmetrics(accept) is openmetrics


async def test_what_waits_and_what_is_in_flight_is_told_by_model_and_lane(gate: Gate, folder: Path) -> None:
    async with small_server(folder) as (client, services):
        bulk = [words(20 + number) for number in range(10)]
        index = asyncio.create_task(client.post("/embed", json={"inputs": bulk}))
        await until_waiting(services, Lane.BULK, 8)  # two are with the device
        search = asyncio.create_task(client.post("/v1/embeddings", json={"input": [words(5), words(6)]}))
        await until_waiting(services, Lane.INTERACTIVE, 1)
        families = await _families(client)
        tokens, texts = families["vecmill_queued_tokens"], families["vecmill_queued_texts"]
        assert _sum(texts, task="embed", model="tiny", lane="bulk") == 8
        assert _sum(tokens, task="embed", model="tiny", lane="bulk") == sum(20 + number for number in range(2, 10))
        assert _sum(tokens, task="embed", model="tiny", lane="interactive") == 6
        in_flight = families["vecmill_requests_in_flight"]
        assert _sum(in_flight, operation="embed", model="tiny", lane="bulk") == 1
        assert _sum(in_flight, operation="embed", model="tiny", lane="interactive") == 1
        assert _sum(families["vecmill_http_requests_in_flight"]) == 3  # and the one that asks
        gate.open()
        await asyncio.gather(index, search)
        families = await _families(client)
        for name in ("queued_tokens", "queued_texts", "requests_in_flight"):
            assert [sample.value for sample in families[f"vecmill_{name}"].samples] == [0, 0]


async def test_how_a_request_ended_is_told(gate: Gate, folder: Path) -> None:
    async with small_server(folder, max_concurrent_requests=1, queue_timeout=0) as (client, services):
        held = asyncio.create_task(client.post("/embed", json={"inputs": [words(20 + n) for n in range(10)]}))
        await until_waiting(services, Lane.BULK, 8)
        assert (await client.post("/embed", json={"inputs": [words(9)] * 9})).status_code == 503
        held.cancel()
        await asyncio.gather(held, return_exceptions=True)
        requests = (await _families(client))["vecmill_requests"]
        assert _sum(requests, lane="bulk", outcome="overloaded") == 1
        assert _sum(requests, lane="bulk", outcome="cancelled") == 1
        gate.open()


async def test_a_forward_pass_that_fails_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = forward.launch

    def failing(model: Any, rows: Any, *args: Any) -> Any:
        if any(len(row) == 20 for row in rows):
            raise RuntimeError("the device says no")
        return launch(model, rows, *args)

    monkeypatch.setattr(engine_module, "launch", failing)
    async with small_server(folder) as (client, _):
        assert (await client.post("/embed", json={"inputs": words(20)})).status_code == 503
        assert (await client.post("/embed", json={"inputs": words(8)})).status_code == 200
        families = await _families(client)
    assert _sum(families["vecmill_requests"], outcome="error") == 1
    assert _sum(families["vecmill_batch_tokens"], "_sum", outcome="error") == 20
    assert _sum(families["vecmill_batch_tokens"], "_sum", outcome="ok") == 8
