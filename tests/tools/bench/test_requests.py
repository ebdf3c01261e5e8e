"""What goes over the wire."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from tests.tools.bench.command_line import bench_json
from tests.tools.bench.scripted_server import Reply, scripted, vectors
from vecmill.tools.bench.load_generator import BulkLoad, Outcomes, TargetClient, run, search
from vecmill.tools.bench.report import warnings
from vecmill.tools.bench.target import BenchTarget, TargetApi

LEVEL = ("--texts", 2, "--batch", 2, "--connections", 1)


def test_every_request_carries_model_and_key() -> None:
    with scripted(lambda number, body: vectors(body)) as server:
        bench_json(server.url, *LEVEL, "--model", "a/b", "--api-key", "secret")
    assert len(server.asked) == 2
    for path, headers, body in server.asked:
        assert path == "/v1/embeddings"
        assert headers["authorization"] == "Bearer secret"
        assert headers["accept-encoding"] == "identity"
        assert body["model"] == "a/b"
        assert body["encoding_format"] == "base64"
        assert len(body["input"]) == 2


def test_the_key_may_come_from_the_environment() -> None:
    with scripted(lambda number, body: vectors(body)) as server:
        bench_json(server.url, *LEVEL)
    assert {headers["authorization"] for _, headers, _ in server.asked} == {"Bearer from-outside"}
    assert all("model" not in body for _, _, body in server.asked)


def test_infinity() -> None:
    with scripted(lambda number, body: vectors(body)) as server:
        found = bench_json(server.url, *LEVEL, "--dialect", "infinity")
    assert {path for path, _, _ in server.asked} == {"/embeddings"}
    assert found["dimensions"] == 2
    assert found["levels"][0]["tokens_per_second"] > 0


def test_tei_says_its_tokens_in_a_header() -> None:
    def answer(number: int, body: Any) -> Reply:
        assert body["truncate"] is True
        return Reply([[1.0, 2.0, 3.0]] * len(body["inputs"]), headers={"x-compute-tokens": "14"})

    with scripted(answer) as server:
        found = bench_json(server.url, *LEVEL, "--dialect", "tei")
    assert {path for path, _, _ in server.asked} == {"/embed"}
    level = found["levels"][0]
    assert level["tokens_per_second"] == pytest.approx(7 * level["texts_per_second"])


def test_the_first_answer_is_checked_and_not_measured() -> None:
    with scripted(lambda number, body: vectors(body)) as server:
        found = bench_json(server.url, *LEVEL, "--texts", 6)
    assert len(server.asked) == 4
    assert found["levels"][0]["outcomes"]["requests"] == 3


@pytest.mark.parametrize(
    ("url", "dialect", "endpoint"),
    [
        ("localhost:80", TargetApi.OPENAI, "http://localhost:80/v1/embeddings"),
        ("https://host/v1/", TargetApi.OPENAI, "https://host/v1/embeddings"),
        ("https://host/v1", TargetApi.RERANK, "https://host/v1/rerank"),
        ("https://host/v1", TargetApi.INFINITY, "https://host/v1/embeddings"),
        ("https://host/prefix/", TargetApi.TEI, "https://host/prefix/embed"),
    ],
)
def test_endpoints(url: str, dialect: TargetApi, endpoint: str) -> None:
    assert BenchTarget(url, dialect).endpoint == endpoint


def test_a_person_does_not_wait_for_answers() -> None:
    together = threading.Barrier(3)  # each query is answered when all three are there

    def answer(number: int, body: Any) -> Reply:
        together.wait(timeout=30)
        return vectors(body)

    async def ask(url: str) -> Outcomes:
        async with TargetClient(BenchTarget(url)) as client:
            return await search(client, seconds=0.03, interval=0.01)

    with scripted(answer) as server:
        outcomes = run(ask(server.url))
    assert outcomes.requests == 3
    assert outcomes.errors == {}
    assert outcomes.latency_ms is not None
    assert outcomes.latency_ms.max >= 20  # the first was due 20 ms before the last was sent
    assert len({body["input"][0] for _, _, body in server.asked}) == 3


def test_a_busy_load_generator_is_said() -> None:
    outcomes = Outcomes(1, None, {}, {}, None)
    calm, busy = (BulkLoad(n, outcomes, 1, 1.0, 1.0, 1.0, None, cpu) for n, cpu in ((1, 0.5), (8, 0.95)))
    (said,) = warnings([calm, busy])
    assert said.startswith("with 8 connections the load generator itself used 95% of a core")
