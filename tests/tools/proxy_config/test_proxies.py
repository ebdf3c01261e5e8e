"""HAProxy and nginx in front of two servers that share nothing: where each request goes, and how."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType

import httpx
import pytest

from tests.faults.service import Service, until
from tests.tools.proxy_config.proxies import Proxy, proxy

BIG = 12_000  # bytes: more than a search has


def texts(size: int) -> list[str]:
    """That are so many bytes long together, at the least."""
    return ["word " * 20] * (size // 100 + 1)


class Counts:
    """How many requests each server has answered or refused since the last look."""

    def __init__(self, replicas: Sequence[Service]) -> None:
        self._replicas = replicas
        self._seen = self._all()

    def new(self) -> list[int]:
        """Their number, of each server."""
        before, self._seen = self._seen, self._all()
        return [now - earlier for now, earlier in zip(self._seen, before, strict=True)]

    def _all(self) -> list[int]:
        found = [each.get("/stats") for each in self._replicas]
        return [one["requests"] + one["client_errors"] + one["refused"] for one in found]


@pytest.fixture
def counts(replicas: Sequence[Service]) -> Counts:
    return Counts(replicas)


def ask(
    running: Proxy, number: int, headers: Mapping[str, str] = MappingProxyType({}), size: int = 0
) -> httpx.Response:
    body = {"input": [f"text {number}", *texts(size)][: None if size else 1]}
    answer = running.http.post("/v1/embeddings", json=body, headers={"Cache-Control": "no-store", **headers})
    assert answer.status_code == 200, answer.text
    return answer


def test_searches_are_spread(behind: Proxy, counts: Counts) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: ask(behind, number), range(24)))
    assert min(counts.new()) >= 6


def test_a_jobs_texts_stay_on_one_replica(behind: Proxy, counts: Counts) -> None:
    owners = []
    for job in range(14):  # all on one replica by chance: once in 8,000 times
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda number: ask(behind, number, {"X-Job-ID": f"job-{job}"}), range(4)))  # noqa: B023
        new = counts.new()
        assert sorted(new) == [0, 4]
        owners.append(new.index(4))
    assert set(owners) == {0, 1}


@pytest.mark.parametrize("headers", [{"X-Priority": "bulk"}, {"X-Priority": "5"}, {}])
def test_other_bulk_stays_with_its_client(behind: Proxy, counts: Counts, headers: dict[str, str]) -> None:
    for number in range(6):
        ask(behind, number, headers, 0 if headers else BIG)
    assert sorted(counts.new()) == [0, 6]


def test_what_says_that_it_is_a_search_is_one(behind: Proxy, counts: Counts) -> None:
    headers = {"X-Priority": "interactive", "X-Job-ID": "j"}
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: ask(behind, n, headers, BIG), range(16)))
    assert min(counts.new()) >= 3


def test_jobs_files_and_batches_are_found_again_without_redis(behind: Proxy) -> None:
    for key in ("", "Bearer one"):
        headers = {"Authorization": key} if key else {}
        http = httpx.Client(base_url=behind.http.base_url, headers=headers)
        with http:
            job = http.post("/jobs", json={"project": "p", "total_chunks": 8, "instance_id": "i"}).json()["job_id"]
            assert http.post(f"/jobs/{job}/progress", json={"current": 4}).is_success
            assert http.get(f"/jobs/{job}").json()["current"] == 4
            assert http.delete(f"/jobs/{job}").is_success
            line = {"custom_id": "1", "method": "POST", "url": "/v1/embeddings", "body": {"input": "a"}}
            files = {"file": ("in.jsonl", json.dumps(line).encode())}
            uploaded = http.post("/v1/files", files=files, data={"purpose": "batch"}).json()["id"]
            wanted = {"input_file_id": uploaded, "endpoint": "/v1/embeddings", "completion_window": "24h"}
            batch = http.post("/v1/batches", json=wanted).json()["id"]
            until(lambda: http.get(f"/v1/batches/{batch}").json()["status"] == "completed")  # noqa: B023


def test_events_come_as_they_are_sent(behind: Proxy) -> None:
    with behind.http.stream("GET", "/jobs/events") as events:
        assert events.status_code == 200
        assert next(events.iter_lines())


def test_an_upload_arrives_while_it_is_sent(behind: Proxy, replicas: Sequence[Service]) -> None:
    folders = [each.state / "files" for each in replicas]
    before = sum(_bytes(folders))
    begin = b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--x\r\n'
    begin += b'Content-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n' + b"y" * 600_000
    head = f"POST /v1/files HTTP/1.1\r\nHost: {behind.listen}\r\nContent-Type: multipart/form-data; boundary=x\r\n"
    head += f"Content-Length: {len(begin) + 100_000}\r\n\r\n"
    host, _, port = behind.listen.partition(":")
    with socket.create_connection((host, int(port)), 10) as connection:
        connection.sendall(head.encode() + begin)
        until(lambda: sum(_bytes(folders)) >= before + 300_000, 10)


def _bytes(folders: Sequence[Path]) -> Iterator[int]:
    for folder in folders:
        yield from (path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_bodies_have_the_servers_limits(behind: Proxy, counts: Counts) -> None:
    answer = behind.http.post("/v1/embeddings", content=b" " * 200_001)
    assert (answer.status_code, answer.headers["content-type"]) == (413, "application/json")
    assert "split the request" in answer.json()["error"]["message"]
    assert answer.headers["X-Request-ID"]
    assert behind.http.post("/v1/files", content=b" " * 1_100_000).status_code == 413
    assert counts.new() == [0, 0]
    ask(behind, 1, size=150_000)


def test_a_request_has_one_id_in_all_logs(behind: Proxy, replicas: Sequence[Service]) -> None:
    name = f"mine-{behind.kind}"
    answer = ask(behind, 1, {"X-Request-ID": name})
    assert answer.headers["X-Request-ID"] == name
    made = ask(behind, 2, {"X-Request-ID": "no good"}).headers["X-Request-ID"]
    assert made != "no good"
    for request_id in (name, made):
        until(lambda: any(f'"request_id":"{request_id}"' in each.log() for each in replicas))  # noqa: B023


def test_the_servers_learn_who_asks(behind: Proxy, replicas: Sequence[Service]) -> None:
    """The client's own address is 127.0.0.1, whose word the servers take here: so they look at the one before it."""
    ask(behind, 1, {"X-Forwarded-For": "203.0.113.9"})
    assert any("203.0.113.9" in json.dumps(each.get("/dashboard/snapshot")["who"]) for each in replicas)


def test_errors_are_the_servers_own(behind: Proxy) -> None:
    wrong = behind.http.post("/v1/embeddings", json={"input": "x", "dimensions": 5000})
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "dimensions")
    assert behind.http.post("/v2/embed", json={}).json().keys() == {"message"}


@pytest.mark.parametrize("kind", ["haproxy", "nginx"])
def test_without_a_server_the_answer_says_when_to_try_again(kind: str, tmp_path: Path) -> None:
    with proxy(kind, tmp_path, ["http://127.0.0.1:9"], ready=False) as running:
        answer = running.http.post("/v1/embeddings", json={"input": "x"}, headers={"X-Request-ID": "mine"})
    assert answer.status_code in (502, 503)
    assert answer.headers["Retry-After"] == "1"
    assert answer.headers["X-Request-ID"] == "mine"
    assert "temporarily" in answer.json()["error"]["message"]
