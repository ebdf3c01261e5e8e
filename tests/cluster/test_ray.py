"""Servers behind Ray Serve answer as one alone does: with replicas that die, are exchanged, or are not there yet.

Each cluster takes a minute to start where the machine is busy, so the tests share two of them.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest

from tests.cluster.ray_cluster import RunningCluster, ray_cluster
from tests.servers import free_port, running, vecmill_command

pytest.importorskip("ray", reason="needs the extra `ray`; `make test-ray` installs it")
pytestmark = [pytest.mark.nightly, pytest.mark.timeout(900)]

CLIENTS = 12
# What else is in a batch moves a vector in float32 by less than these tests allow, in bfloat16 often by more.
FLOAT32 = {"DTYPE": "float32"}
TIMEOUT = 240


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCluster]:
    """Three replicas."""
    environment = FLOAT32 | {"QUEUE_TIMEOUT": "200"}
    with ray_cluster(tmp_path_factory.mktemp("cluster"), {"replicas": 3}, environment) as running:
        yield running


@pytest.fixture(scope="module")
def alone() -> Iterator[str]:
    """The URL of a server without Ray."""
    port = free_port()
    environment = FLOAT32 | {"DEVICE": "cpu", "RERANK_MODEL": "none"}
    with running(vecmill_command(port), port, "/ready", environment) as server:
        yield server.url


def embed(url: str, texts: Sequence[str], **headers: str) -> httpx.Response:
    return httpx.post(
        f"{url}/v1/embeddings", json={"model": "any", "input": list(texts)}, headers=headers, timeout=TIMEOUT
    )


def vectors(response: httpx.Response) -> np.ndarray[Any, Any]:
    assert response.status_code == 200, response.text
    return np.array([entry["embedding"] for entry in response.json()["data"]])


def in_parallel(url: str, requests: Sequence[Sequence[str]], done: threading.Semaphore) -> list[httpx.Response]:
    def send(texts: Sequence[str]) -> httpx.Response:
        response = embed(url, texts)
        done.release()
        return response

    with ThreadPoolExecutor(CLIENTS) as threads:
        return list(threads.map(send, requests))


def after(done: threading.Semaphore, count: int, act: Any) -> threading.Thread:
    """Do something once so many requests are done."""

    def wait() -> None:
        for _ in range(count):
            done.acquire()
        act()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def kill(processes: Sequence[int]) -> None:
    for process in processes:
        os.kill(process, signal.SIGKILL)


def kill_under_load(cluster: RunningCluster, alone: str, name: str, count: int = 1) -> None:
    """Every request is answered, and as a server alone answers it."""
    requests = [[f"text {number} of {name}", f"another, {number}"] for number in range(160)]
    expected = vectors(embed(alone, [text for texts in requests for text in texts])).reshape(160, 2, -1)
    before = cluster.replicas()
    killed, done = before[:count], threading.Semaphore(0)
    killer = after(done, 40, lambda: kill(killed))

    answers = in_parallel(cluster.url, requests, done)
    killer.join()

    assert [answer.text for answer in answers if answer.status_code != 200] == []
    assert np.allclose(np.array([vectors(answer) for answer in answers]), expected, atol=1e-5)
    assert not set(killed) & set(cluster.replicas())
    wait_for(lambda: len(cluster.replicas()) == len(before))


def test_one_of_three_is_killed_under_load(cluster: RunningCluster, alone: str) -> None:
    kill_under_load(cluster, alone, "three")


def wait_for(condition: Any, seconds: float = 240) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.2)


def test_errors_have_the_shape_of_their_dialect_as_those_of_a_server_alone(cluster: RunningCluster, alone: str) -> None:
    for path, body in [
        ("/v1/embeddings", b"{bad"),
        ("/v1/embeddings", b'{"input": [1.5]}'),
        ("/embed", b'{"inputs": {}}'),
        ("/v2/embed", b"[]"),
        ("/api/embed", b'{"model": 1}'),
        ("/nothing", b"{}"),
        ("/v1/embeddings", b" " * 34_000_000),
    ]:
        answers = [httpx.post(url + path, content=body, timeout=TIMEOUT) for url in (cluster.url, alone)]
        assert answers[0].status_code == answers[1].status_code >= 400
        assert answers[0].json() == answers[1].json()


def test_bodies_and_answers_stream(cluster: RunningCluster) -> None:
    """A file is larger than a request may be; events come before their stream ends."""
    line = b'{"custom_id": "%d", "method": "POST", "url": "/v1/embeddings", "body": {"input": "x"}}\n'
    content = b"".join(line % number for number in range(450_000))

    sent = httpx.post(
        f"{cluster.url}/v1/files", files={"file": ("a.jsonl", content)}, data={"purpose": "batch"}, timeout=TIMEOUT
    )
    fetched = httpx.get(f"{cluster.url}/v1/files/{sent.json()['id']}/content", timeout=TIMEOUT)

    assert len(content) > 33_554_432
    assert fetched.content == content
    with httpx.stream("GET", f"{cluster.url}/jobs/events", timeout=TIMEOUT) as events:
        assert events.headers["content-type"].startswith("text/event-stream")
        assert next(events.iter_bytes())


def test_jobs_are_found_again_by_whoever_asks(cluster: RunningCluster) -> None:
    registered = [
        httpx.post(f"{cluster.url}/jobs", json={"project": "p", "total_chunks": 5}, timeout=TIMEOUT) for _ in range(4)
    ]

    for answer in registered:
        assert answer.is_success, answer.text
        found = httpx.get(f"{cluster.url}/jobs/{answer.json()['job_id']}", timeout=TIMEOUT)
        assert found.status_code == 200


def test_equal_bulk_meets_its_cache_and_different_bulk_is_divided(cluster: RunningCluster) -> None:
    requests = [[f"chunk {number} part {part} of an index" for part in range(16)] for number in range(24)]
    # The one that took the place of the killed one may still be loading.
    wait_for(lambda: len({embed(cluster.url, texts).headers["x-replica"] for texts in requests}) == 3)
    first = [embed(cluster.url, texts).headers["x-replica"] for texts in requests]

    again = [embed(cluster.url, texts).headers["x-replica"] for texts in requests]

    assert again == first
    assert len(set(first)) == 3


def test_a_replica_is_asked_by_its_name(cluster: RunningCluster) -> None:
    """For what is each one's own: its metrics."""
    name = httpx.get(f"{cluster.url}/health", timeout=TIMEOUT).headers["x-replica"]

    named = [httpx.get(f"{cluster.url}/metrics", headers={"X-Replica": name}, timeout=TIMEOUT) for _ in range(6)]
    unknown = httpx.get(f"{cluster.url}/metrics", headers={"X-Replica": "nobody"}, timeout=TIMEOUT)

    assert {answer.headers["x-replica"] for answer in named} == {name}
    assert unknown.status_code == 404
    assert "X-Replica" in unknown.text


def test_a_rolling_upgrade_fails_no_request(cluster: RunningCluster) -> None:
    before = set(cluster.replicas())
    stop = threading.Event()
    statuses: list[int] = []

    def send() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            statuses.append(embed(cluster.url, [f"while servers change {threading.get_ident()} {number}"]).status_code)

    threads = [threading.Thread(target=send) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        cluster.redeploy({"replicas": 2, "settings": {"MAX_CLIENT_BATCH_SIZE": 1000}})
        wait_for(lambda: not before & set(cluster.replicas()) and len(cluster.replicas()) == 2, 400)
    finally:
        stop.set()
        for thread in threads:
            thread.join()

    assert set(statuses) == {200}
    assert httpx.get(f"{cluster.url}/capabilities", timeout=TIMEOUT).json()["max_client_batch_size"] == 1000


def test_one_of_two_is_killed_under_load(cluster: RunningCluster, alone: str) -> None:
    """After the upgrade, which left two."""
    kill_under_load(cluster, alone, "two")


def test_all_are_killed_under_load(cluster: RunningCluster, alone: str) -> None:
    """What comes meanwhile waits for those that take their place, as long as for room at a full server."""
    kill_under_load(cluster, alone, "all", len(cluster.replicas()))


@pytest.fixture(scope="module")
def placed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCluster]:
    """Two placements, the second of which starts when it is asked for."""
    arguments = {
        "placements": [
            {
                "name": "first",
                "settings": {
                    "MODEL_ALIASES": "one=sentence-transformers/all-MiniLM-L6-v2",
                    "MAX_CONCURRENT_REQUESTS": 1,
                },
            },
            {
                "name": "second",
                "settings": {"MODEL_ALIASES": "two=sentence-transformers/all-MiniLM-L6-v2"},
                "min_replicas": 0,
                "max_replicas": 1,
            },
        ],
    }
    environment = {"EMBED_MODEL": "all-MiniLM-L6-v2", "QUEUE_TIMEOUT": "0"}
    with ray_cluster(tmp_path_factory.mktemp("placed"), arguments, environment) as running:
        yield running


def test_from_zero_it_is_503_with_retry_after_until_the_model_is_there(placed: RunningCluster) -> None:
    def ask() -> httpx.Response:
        body = {"model": "two", "input": "somebody needs it"}
        return httpx.post(f"{placed.url}/v1/embeddings", json=body, timeout=TIMEOUT)

    began = time.monotonic()
    first = ask()
    waited = time.monotonic() - began

    assert first.status_code == 503
    assert int(first.headers["retry-after"]) >= 1
    assert first.json()["error"]["message"].startswith("503: no replica with this model runs yet")
    assert waited < 30
    wait_for(lambda: ask().status_code == 200)
    assert len(placed.replicas("second")) == 1
    listed = httpx.get(f"{placed.url}/v1/models", timeout=TIMEOUT).json()["data"]
    assert [model["id"] for model in listed] == ["sentence-transformers/all-MiniLM-L6-v2"]


def test_a_full_server_is_429_with_retry_after_in_the_shape_of_the_dialect(placed: RunningCluster) -> None:
    texts = [f"much to do {number} " * 60 for number in range(64)]

    def send(number: int) -> httpx.Response:
        # What the OpenAI SDK sends: it tries again after a 429, others after a 503.
        return embed(placed.url, [f"{number} {text}" for text in texts], **{"user-agent": "OpenAI/Python 2.9"})

    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(send, range(8)))

    refused = [answer for answer in answers if answer.status_code != 200]
    assert {answer.status_code for answer in refused} == {429}, {answer.text for answer in refused}
    assert all(int(answer.headers["retry-after"]) >= 1 and answer.json()["error"] for answer in refused)
    assert any(answer.status_code == 200 for answer in answers)
