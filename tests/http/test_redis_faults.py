"""What Redis can do to a server: jobs are 503 until it is over, embedding goes on, and all recovers by itself."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from time import monotonic
from typing import Any

import httpx
import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.conftest import serving
from tests.hostile.keys import ANN, BEN, ask
from tests.redis_server import redis_server
from tests.servers import free_port
from vecmill.core.errors import StartupError
from vecmill.storage.redis_connection import check_usable

REGISTRATION = {"project": "p", "total_chunks": 100, "instance_id": "codecart-1"}
LONGEST = 4.0  # seconds that any answer may take on a busy machine; a client's patience is longer
RECOVERED = 15.0
PASSWORD = "a-redis-password"
Client = redis.Redis


@pytest.fixture(scope="module")
def port() -> int:
    return free_port()


@pytest.fixture(scope="module")
async def server(port: int) -> AsyncIterator[httpx.AsyncClient]:
    """A server whose Redis comes and goes; one key has a limit."""
    async with serving(redis_url=f"redis://127.0.0.1:{port}/0", api_key=f"ann:{ANN} requests=4,ben:{BEN}") as client:
        yield client


@contextmanager
def frozen(client: Client, folder: Path) -> Iterator[None]:
    pid = int(client.info("server")["process_id"])
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@contextmanager
def full(client: Client, folder: Path) -> Iterator[None]:
    client.config_set("maxmemory", "1")
    yield
    client.config_set("maxmemory", "0")


@contextmanager
def read_only(client: Client, folder: Path) -> Iterator[None]:
    client.slaveof("127.0.0.1", 1)
    yield
    client.slaveof()


@contextmanager
def locked(client: Client, folder: Path) -> Iterator[None]:
    client.config_set("requirepass", PASSWORD)
    client.client_kill_filter(_type="normal", skipme=True)
    yield
    client.config_set("requirepass", "")


@contextmanager
def of_another_type(client: Client, folder: Path) -> Iterator[None]:
    """Another program has written under the same names."""
    kept = client.dump("vecmill:jobs:open")
    client.set("vecmill:jobs:open", "nonsense")
    yield
    client.delete("vecmill:jobs:open")
    if kept is not None:
        client.restore("vecmill:jobs:open", 0, kept)


Fault = Callable[[Client, Path], AbstractContextManager[None]]


@pytest.mark.parametrize(
    "fault",
    [frozen, full, of_another_type, *(pytest.param(fault, marks=pytest.mark.nightly) for fault in (read_only, locked))],
)
async def test_jobs_are_503_and_embedding_goes_on(
    server: httpx.AsyncClient, port: int, tmp_path: Path, fault: Fault
) -> None:
    with redis_server(tmp_path, port=port) as url, redis.Redis.from_url(url) as client:
        job = (await recovered(server, "POST", "/jobs", json=REGISTRATION))["job_id"]
        with fault(client, tmp_path):
            await assert_without_jobs(server, job)
        assert (await recovered(server, "POST", f"/jobs/{job}/progress", json={"current": 7}))["current"] == 7
        assert (await recovered(server, "POST", f"/jobs/{job}/complete"))["status"] == "completed"


async def test_redis_that_still_loads_its_data(server: httpx.AsyncClient, port: int, tmp_path: Path) -> None:
    slowly = ("--key-load-delay", "100000", "--loading-process-events-interval-bytes", "1024")
    with redis_server(tmp_path, "--rdbcompression", "no", port=port) as url, redis.Redis.from_url(url) as client:
        job = (await recovered(server, "POST", "/jobs", json=REGISTRATION))["job_id"]
        for number in range(30):
            client.set(f"of-another-program:{number}", "x" * 1500)
        client.save()
    process = await asyncio.create_subprocess_exec(
        *("redis-server", "--port", str(port), "--dir", str(tmp_path), "--save", "", *slowly),
        stdout=asyncio.subprocess.DEVNULL,
    )
    try:
        with redis.Redis(port=port, retry=Retry(NoBackoff(), 0)) as client:
            while (said := await asyncio.to_thread(answer_of, client)) == "ConnectionError":
                await asyncio.sleep(0.02)
            assert said == "BusyLoadingError"
            await assert_without_jobs(server, job)
        assert (await recovered(server, "POST", f"/jobs/{job}/complete"))["status"] == "completed"
    finally:
        process.terminate()
        await process.wait()


def answer_of(client: Client) -> str:
    try:
        return str(client.ping())
    except redis.RedisError as error:
        return type(error).__name__


async def test_redis_that_was_stopped_comes_back_empty(server: httpx.AsyncClient, port: int, tmp_path: Path) -> None:
    with redis_server(tmp_path, port=port):
        job = (await recovered(server, "POST", "/jobs", json=REGISTRATION))["job_id"]
        await recovered(server, "POST", f"/jobs/{job}/progress", json={"current": 7})
    await assert_without_jobs(server, job)
    with redis_server(tmp_path, port=port):
        assert (await recovered(server, "GET", f"/jobs/{job}"))["current"] == 7
        assert (await recovered(server, "POST", f"/jobs/{job}/complete"))["status"] == "completed"


async def assert_without_jobs(server: httpx.AsyncClient, job: str) -> None:
    """Each answer is quick: 503 and when to try again for jobs, a vector for texts, also for a key with a limit."""
    await timed(server, BEN, "POST", f"/jobs/{job}/progress", json={"current": 1})  # finds out
    for key, method, path, body in (
        (BEN, "POST", f"/jobs/{job}/progress", {"current": 1}),
        (ANN, "POST", "/jobs", REGISTRATION),
        (BEN, "POST", f"/jobs/{job}/complete", None),
    ):
        refused = await timed(server, key, method, path, json=body)
        assert refused.status_code == 503, refused.text
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["detail"].startswith("503")
        assert PASSWORD not in refused.text
    for key in (ANN, BEN, ANN):
        embedded = await timed(server, key, "POST", "/embed", json={"inputs": ["x"]}, headers={"X-Job-ID": job})
        assert embedded.status_code == 200
    assert (await server.get("/health")).status_code == 200


async def timed(server: httpx.AsyncClient, key: str, method: str, path: str, **content: Any) -> httpx.Response:
    began = monotonic()
    answer = await ask(server, key, method, path, **content)
    assert monotonic() - began < LONGEST
    return answer


async def recovered(server: httpx.AsyncClient, method: str, path: str, **content: Any) -> Any:
    """The JSON of the answer, once it is not 503 any more."""
    async with asyncio.timeout(RECOVERED):
        while (answer := await ask(server, BEN, method, path, **content)).status_code == 503:
            await asyncio.sleep(0.05)
    assert answer.is_success, answer.text
    return answer.json()


async def test_what_only_another_setting_helps_stops_the_start(tmp_path: Path) -> None:
    with redis_server(tmp_path) as url, redis.Redis.from_url(url) as client:
        client.config_set("requirepass", PASSWORD)
        for wrong, cure in (
            (url, "correct the user and the password"),
            (url.replace("//", "//:not-the-password@"), "correct the user and the password"),
            (url.replace("//", f"//:{PASSWORD}@").replace("/0", "/99"), "use `/0`"),
        ):
            with pytest.raises(StartupError, match=cure) as stopped:
                await check_usable(wrong)
            assert "\n" not in stopped.value.message
            assert "-password@" not in stopped.value.message.replace("user:password@", "")
        await check_usable(url.replace("//", f"//:{PASSWORD}@"))
    await check_usable(url)  # it is away, and may come


async def test_a_cluster_and_what_is_no_redis_stop_the_start(tmp_path: Path) -> None:
    with (
        redis_server(tmp_path, "--cluster-enabled", "yes", "--cluster-port", str(free_port())) as url,
        pytest.raises(StartupError, match="cluster"),
    ):
        await check_usable(url)

    async def web(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(10)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(web, "127.0.0.1", 0) as listening:
        place = listening.sockets[0].getsockname()[1]
        with pytest.raises(StartupError, match="no Redis"):
            await check_usable(f"redis://127.0.0.1:{place}/0")
