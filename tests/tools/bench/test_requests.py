"""What goes over the wire."""

from __future__ import annotations

import threading
from itertools import islice
from pathlib import Path
from typing import Any

import orjson
import pytest

from tests.tools.bench.command_line import bench, bench_json
from tests.tools.bench.scripted_server import Reply, scripted, vectors
from vecmill.tools.bench.load_generator import BulkLoad, Outcomes, TargetClient, run, search
from vecmill.tools.bench.report import warnings
from vecmill.tools.bench.target import BenchTarget, TargetApi
from vecmill.tools.bench.workload import Requests

LEVEL = ("--texts", 2, "--batch", 2, "--connections", 1)


def texts_of(asked: list[tuple[str, dict[str, str], Any]]) -> list[str]:
    return [text for _, _, body in asked for text in body["input"]]


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


@pytest.mark.parametrize(
    "options",
    [
        ("--texts", 7, "--connections", "1,2,3"),
        ("--seconds", 0.3, "--connections", "1,2"),
        ("--seconds", 0.3, "--mixed", "--query-interval", 0.01),
    ],
)
def test_no_text_is_sent_twice_in_a_run(options: tuple[object, ...], tmp_path: Path) -> None:
    """Though the folder has only two, one of them twice."""
    for name, text in (("a", "one\n"), ("b", "two\n"), ("c", "one\n")):
        (tmp_path / name).write_text(text, "utf-8")
    with scripted(lambda number, body: vectors(body)) as server:
        bench_json(server.url, "--folder", tmp_path, "--batch", 2, *options)
    texts = texts_of(server.asked)
    assert len(texts) > 20
    assert len(set(texts)) == len(texts)
    assert all(headers["cache-control"] == "no-store" for _, headers, _ in server.asked)


def test_texts_stay_within_their_length(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x" * 40, "utf-8")
    with scripted(lambda number, body: vectors(body)) as server:
        bench_json(server.url, "--folder", tmp_path, "--longest", 40, "--batch", 2, "--texts", 30, "--connections", 1)
    assert {len(text) for text in texts_of(server.asked)} == {40}
    assert len(set(texts_of(server.asked))) == len(texts_of(server.asked))


def test_the_bulk_beside_a_person_begins_with_the_texts_of_the_bulk_alone() -> None:
    target = BenchTarget("host")
    requests = Requests(target, ["a", "b", "c"], 2)
    alone, beside = (list(requests.of_texts(3)) for _ in range(2))
    assert [orjson.loads(one.body)["input"] for one in alone] == [["a", "b"], ["c"]]
    assert [orjson.loads(one.body)["input"] for one in beside] == [["# 1\na", "# 2\nb"], ["# 3\nc"]]


def test_cached_sends_the_same_texts_again_and_asks_for_no_freshness(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("one\n", "utf-8")
    with scripted(lambda number, body: vectors(body)) as server:
        found = bench_json(server.url, *LEVEL, "--cached", "--folder", tmp_path)
    assert set(texts_of(server.asked)) == {"one"}
    assert all("cache-control" not in headers for _, headers, _ in server.asked)
    assert found["cached"] is True


def counted(body: Any, **usage: object) -> Reply:
    return Reply({**vectors(body).body, "usage": {"prompt_tokens": 10, **usage}})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("answer", "share", "said"),
    [
        (lambda body: counted(body, prompt_tokens_details={"cached_tokens": 4}), 0.4, "40.0% of the tokens"),
        (lambda body: counted(body, prompt_tokens_details={"cached_tokens": 0}), 0.0, "0.0% of the tokens"),
        (lambda body: counted(body, prompt_tokens_details=None), None, "unknown: the server does not say"),
        (vectors, None, "unknown: the server does not say"),
        (lambda body: Reply(counted(body).body, headers={"X-Cached-Tokens": "5"}), 0.5, "50.0% of the tokens"),
        (lambda body: Reply(counted(body).body, headers={"X-Cached-Tokens": "\u00b2"}), None, "unknown"),
    ],
)
def test_the_share_that_came_from_the_cache(answer: Any, share: float | None, said: str) -> None:
    with scripted(lambda number, body: answer(body)) as server:
        found = bench_json(server.url, *LEVEL)
        shown = bench(server.url, *LEVEL)
    assert found["levels"][0]["outcomes"]["cached_share"] == share
    assert f"\ncached    {said}" in shown.stdout


def test_one_answer_that_does_not_say_makes_the_share_unknown() -> None:
    def answer(number: int, body: Any) -> Reply:
        return counted(body, prompt_tokens_details={"cached_tokens": 9}) if number < 3 else vectors(body)

    with scripted(answer) as server:
        found = bench_json(server.url, "--batch", 1, "--texts", 4, "--connections", 1)
    assert found["levels"][0]["outcomes"]["cached_share"] is None


def test_shares_that_differ_are_named_by_level() -> None:
    def answer(number: int, body: Any) -> Reply:
        return counted(body, prompt_tokens_details={"cached_tokens": 1 if number < 2 else 2})

    with scripted(answer) as server:
        shown = bench(server.url, "--batch", 2, "--texts", 2, "--connections", "1,2")
    assert "cached    1 connection 10.0% of the tokens, 2 connections 20.0% of the tokens\n" in shown.stdout


def test_ollama() -> None:
    def answer(number: int, body: Any) -> Reply:
        return Reply({"model": "m", "embeddings": [[0.6, 0.8]] * len(body["input"]), "prompt_eval_count": 14})

    with scripted(answer) as server:
        found = bench_json(server.url, *LEVEL, "--dialect", "ollama", "--model", "m")
    assert {path for path, _, _ in server.asked} == {"/api/embed"}
    assert found["dimensions"] == 2
    level = found["levels"][0]
    assert level["tokens_per_second"] == pytest.approx(7 * level["texts_per_second"])
    assert level["outcomes"]["cached_share"] is None


def test_queries_are_all_different_and_texts_without_end() -> None:
    queries = list(islice(Requests(BenchTarget("host"), ()).of_queries(), 5000))
    assert len(set(queries)) == 5000
    assert list(Requests(BenchTarget("host"), []).of_texts()) == []
