"""One line of the log for each request, and the times that its answer says."""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from time import thread_time
from typing import Any

import httpx
import pytest

from tests.conftest import Sharing, serving
from vecmill.telemetry.logs import JsonFormatter, TextFormatter, configure_logging

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
TEXT = "a text that nobody may see"


@contextmanager
def log(formatter: logging.Formatter, level: int = logging.INFO) -> Iterator[io.StringIO]:
    """What the lines of requests say meanwhile."""
    stream, logger = io.StringIO(), logging.getLogger("vecmill.http.request_log")
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter)
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        yield stream
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


async def test_a_request_has_one_line_with_all_that_is_known_of_it() -> None:
    async with serving(api_key="editor:the-first-secret", cache_max_bytes=10_000_000) as client:
        headers = {"X-Request-ID": "req-1", "api-key": "the-first-secret"}
        with log(JsonFormatter()) as stream:
            answer = await client.post("/v1/embeddings", json={"input": [TEXT, "b"]}, headers=headers)
        assert answer.status_code == 200
        (line,) = lines(stream)
        assert (
            line.items()
            >= {
                "level": "info",
                "message": "request",
                "request_id": "req-1",
                "method": "POST",
                "path": "/v1/embeddings",
                "status": 200,
                "key": "editor",
                "dialect": "openai",
                "model": MINILM,
                "lane": "interactive",
                "texts": 2,
                "tokens": answer.json()["usage"]["prompt_tokens"],
                "cached": 0,
            }.items()
        )
        stages = [line[f"{stage}_ms"] for stage in ("tokenize", "queue", "forward")]
        assert all(milliseconds >= 0 for milliseconds in stages)
        assert 0 < sum(stages) <= line["total_ms"] + 0.05
        assert TEXT not in stream.getvalue()
        assert "secret" not in stream.getvalue()


async def test_on_a_console_it_is_one_line_too(client: httpx.AsyncClient) -> None:
    with log(TextFormatter()) as stream:
        await client.post("/v1/rerank", json={"query": TEXT, "documents": ["a", "b"]})
    assert re.fullmatch(
        r"\d\d:\d\d:\d\d info     request request_id=\w{16} method=POST path=/v1/rerank status=200 dialect=cohere "
        rf"model={MINILM} lane=interactive texts=2 tokens=\d+ cached=0 tokenize_ms=[\d.]+ queue_ms=[\d.]+ "
        r"forward_ms=[\d.]+ total_ms=[\d.]+\n",
        stream.getvalue(),
    )


async def test_reads_are_told_of_at_debug_and_refusals_once(client: httpx.AsyncClient) -> None:
    async def ask() -> None:
        await client.get("/health")
        await client.post("/v1/embeddings", json={"input": [], "nothing": TEXT})
        await client.get("/nothing")
        await client.post("/embed", json={"inputs": "x"}, headers={"X-Request-Timeout": "0.001"})

    with log(JsonFormatter()) as stream:
        await ask()
    refused, missing, late = lines(stream)
    assert refused.items() >= {"message": "request refused", "level": "info", "status": 400}.items()
    assert refused.items() >= {"error": "EmptyInput", "param": "input", "dialect": "openai", "model": MINILM}.items()
    assert missing.items() >= {"message": "request", "status": 404, "path": "/nothing"}.items()
    assert (
        late.items() >= {"level": "warning", "status": 504, "error": "DeadlineExceeded", "lane": "interactive"}.items()
    )
    with log(JsonFormatter(), logging.DEBUG) as stream:
        await ask()
    assert [line["path"] for line in lines(stream)] == ["/health", "/v1/embeddings", "/nothing", "/embed"]


def test_each_line_says_which_replica_wrote_it_where_it_has_a_name(capfd: pytest.CaptureFixture[str]) -> None:
    handlers = logging.root.handlers
    levels = {name: logging.getLogger(name).level for name in ("root", "vecmill", "uvicorn.error")}
    try:
        for replica, written in (("one two", ' replica="one two"'), (None, "")):
            configure_logging("text", "info", replica)
            logging.getLogger("vecmill").warning("a line")
            assert capfd.readouterr().err.endswith(f"a line{written}\n")
        configure_logging("json", "info", "one")
        logging.getLogger("uvicorn.error").warning("of another's")
        assert json.loads(capfd.readouterr().err)["replica"] == "one"
    finally:
        logging.root.handlers = handlers
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


async def test_without_log_requests_only_refusals_have_a_line(shared: Sharing) -> None:
    client = await shared(log_requests=False)
    with log(JsonFormatter()) as stream:
        await client.post("/embed", json={"inputs": "x"})
        await client.post("/embed", json={"inputs": []})
    assert [line["message"] for line in lines(stream)] == ["request refused"]


async def test_a_fault_has_its_line_and_its_answer_the_same_id(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **named: object) -> None:
        raise RuntimeError("a fault")

    monkeypatch.setattr("vecmill.http.dialects.bodies.vectors_response", broken)
    with log(JsonFormatter()) as stream:
        answer = await client.post("/v1/embeddings", json={"input": "x"})
    (line,) = lines(stream)
    assert (answer.status_code, line["status"], line["model"]) == (500, 500, MINILM)
    assert line["request_id"] == answer.headers["x-request-id"]


def test_a_line_costs_little() -> None:
    fields: dict[str, object] = {"request_id": "0" * 16, "method": "POST", "path": "/v1/embeddings", "model": MINILM}
    fields |= {f"stage_{number}_ms": 0.25 for number in range(10)}
    logger = logging.getLogger("vecmill.http.request_log")
    logger.propagate = False  # pytest would keep the records
    try:
        for formatter in (JsonFormatter(), TextFormatter()):
            with log(formatter) as stream:
                began = thread_time()  # not what other processes take
                for _ in range(500):
                    logger.info("request", extra=fields)
                seconds = thread_time() - began
            assert len(stream.getvalue().splitlines()) == 500
            assert seconds / 500 < 10 * 50e-6
    finally:
        logger.propagate = True


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/embeddings", {"input": "x"}),
        ("/embed", {"inputs": "x"}),
        ("/v1/rerank", {"query": "q", "documents": ["a"]}),
        ("/api/embed", {"model": "m", "input": "x"}),
    ],
)
async def test_answers_say_where_the_time_went(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> None:
    answer = await client.post(path, json=body)
    timing = dict(part.split(";dur=") for part in answer.headers["server-timing"].split(", "))
    assert list(timing) == ["tokenize", "queue", "forward", "total"]
    stages = [float(timing[name]) for name in ("tokenize", "queue", "forward")]
    assert abs(sum(stages) - float(timing["total"])) < 0.05
    assert timing["total"] == answer.headers["x-total-time"]
    assert float(answer.headers["x-rest-of-pass"]) == 0.0  # nothing else runs
