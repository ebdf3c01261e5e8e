"""The soak finds what it is there to find; a minute of load is held every night."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np
import pytest

from benchmarks.soak.__main__ import flat, trend
from benchmarks.soak.clients import Load
from benchmarks.soak.dialects import DOCUMENTS, QUERIES, TEXTS, Comparison, Corpus, Tolerance
from benchmarks.soak.wire import Call, Connection
from benchmarks.tests.runs import json_line, run_benchmark

HOUR = np.arange(0.0, 3600.0)
NOISE = np.random.default_rng(0).normal(0, 3, len(HOUR)).cumsum() / 50


@pytest.mark.parametrize(
    ("megabytes", "met"),
    [
        (600 + NOISE, True),
        (600 + NOISE + HOUR / 100, False),  # 36 MB/h
        (600 + HOUR / 360, True),  # 10 MB/h
        (600 + 500 * np.exp(-HOUR / 60), True),  # the start, over before the warm-up is
        (600 + 200 * (HOUR % 100 == 0), True),
    ],
    ids=["noise", "a leak", "less than the bound", "a start", "peaks"],
)
def test_memory_is_flat_or_it_is_not(megabytes: np.ndarray, met: bool) -> None:
    judged = flat(trend(HOUR.tolist(), megabytes.tolist(), 300, 3600), most_per_hour=20, most=16)
    assert judged["low"] <= judged["per_hour"] <= judged["high"]
    assert judged["met"] is met


def test_an_interval_holds_the_slope_about_as_often_as_it_says() -> None:
    random = np.random.default_rng(1)
    held = 0
    for _ in range(200):
        of = trend(HOUR.tolist(), (7 * HOUR / 3600 + random.normal(0, 5, len(HOUR))).tolist(), 0, 3600)
        held += of["low"] <= 7 <= of["high"]
    assert 180 <= held <= 198


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_vector_of_another_text_is_wrong(dtype: str) -> None:
    comparison = Comparison(Tolerance.of(dtype))
    rows = np.eye(3, 8, dtype=np.float32)
    assert comparison.vectors_are(rows.tolist(), rows)
    assert not comparison.vectors_are(rows[[0, 2, 1]], rows)
    assert not comparison.vectors_are(rows[:2], rows)
    assert not comparison.vectors_are(rows * np.nan, rows)
    assert comparison.scores_are({0: 0.5, 1: 0.25}, [0.5, 0.25])
    assert not comparison.scores_are({0: 0.5}, [0.5, 0.25])
    assert not comparison.scores_are({0: 0.5, 1: 0.35}, [0.5, 0.25])
    assert (comparison.vectors, comparison.scores, comparison.wrong) == (12, 6, 2 + 3 + 3 + 2 + 1)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    corpus = Corpus(0)
    corpus.vectors, corpus.scores = np.ones((TEXTS, 4), dtype=np.float32), [[0.5] * DOCUMENTS] * QUERIES
    return corpus


@asynccontextmanager
async def answering(answer: bytes, times: int = 1) -> AsyncIterator[str]:
    """The address of a server that sends these bytes so many times to whoever asks, and ends the connection."""

    async def answered(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(times):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer)
        writer.close()

    async with await asyncio.start_server(answered, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (b"HTTP/1.1 500 Oh\r\nContent-Length: 2\r\n\r\n{}", "5xx"),
        (b"HTTP/1.1 302 Over there\r\nContent-Length: 2\r\n\r\n{}", "unexpected"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 200\r\n\r\n{}", "broken"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n", "broken"),
        (b"", "broken"),
    ],
)
async def test_whatever_a_server_does_wrong_is_counted(corpus: Corpus, answer: bytes, problem: str) -> None:
    async with answering(answer) as url:
        load = Load(url, ["a", "b"], "c", corpus, Comparison(Tolerance.of("float32")))
        await load.run(connections=1, per_second=50, seconds=0.3)
    assert load.tally.problems[problem] > 0
    assert any(problem in each for each in load.tally.told)


async def test_an_answer_in_pieces_is_read_whole_and_the_connection_is_kept() -> None:
    pieces = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n[1\r\n3\r\n,2]\r\n0\r\n\r\n"
    async with answering(pieces, times=2) as url:
        connection = Connection(url, None)
        _, writer = await connection.open()
        for _ in range(2):
            assert (await connection.send(Call("GET", "/"))).json() == [1, 2]
            assert (await connection.open())[1] is writer
        connection.close()


@pytest.mark.nightly
@pytest.mark.timeout(400)
def test_a_minute_of_load_is_held() -> None:
    # Beside other tests on the same cores: how long /health takes is judged on a quiet machine.
    result = json_line(run_benchmark("soak", "--minutes", "1", "--most-health-ms", "1000"))
    assert result["settings"]["connections"] == 1000
    assert result["checks"].keys() >= {"5xx", "hang", "answers", "memory_mb", "descriptors", "threads", "health_p99_ms"}
    assert result["statuses"].keys() == {"200", "400", "401", "404", "422"}
    assert result["checks"]["answers"]["vectors"] > 100
    assert {"job completed", "batch completed", "pieces of /dashboard/events"} <= result["ended"].keys()
