"""Servers that share a Redis know of each other: what each says, what the others are told, and what is kept out.

Two applications in this process and a real Redis. What a server of another version, one that was killed or a stranger
would leave there is written by the test.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from time import time
from typing import Any

import httpx
import orjson
import pytest
import redis

from tests.conftest import serving
from tests.hostile.keys import ADMIN, ANN, LOCKED, bearer
from tests.redis_server import redis_server
from tests.servers import free_port
from vecmill import __version__
from vecmill.http.dashboard import replicas

PLACES = [f"vecmill:replica:{number}" for number in range(128)]
MODEL = "sentence-transformers/all-MiniLM-L6-v2"
HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with redis_server(tmp_path_factory.mktemp("redis")) as url:
        yield url


@pytest.fixture(scope="module", autouse=True)
def hurried() -> Iterator[None]:
    """They write and look often, and wait for what Redis says."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replicas, "BEAT_SECONDS", 0.2)
        patch.setattr(replicas, "FRESH_SECONDS", 0.0)
        patch.setattr(replicas, "PATIENCE", 10.0)
        yield


@pytest.fixture(scope="module")
async def both(redis_url: str) -> AsyncIterator[tuple[httpx.AsyncClient, httpx.AsyncClient]]:
    async with AsyncExitStack() as stack:
        first, second = [
            await stack.enter_async_context(
                serving(redis_url=redis_url, replica=name, replica_url=f"http://{name}.example:8080")
            )
            for name in ("one", "two")
        ]
        yield first, second


@pytest.fixture
def store(redis_url: str) -> Iterator[redis.Redis]:
    """Redis; what a test writes to the last places is gone afterwards."""
    with redis.Redis.from_url(redis_url) as store:
        yield store
        store.delete(*PLACES[64:])


def leave(store: redis.Redis, record: object, *, place: int = 100, age: float = 0.0) -> None:
    """A record as a server would have written it `age` seconds ago."""
    store.set(PLACES[place], orjson.dumps(record), px=int(1000 * (900 - age)))


async def listed(client: httpx.AsyncClient) -> dict[str, Any]:
    """What it says of the replicas now."""
    answer = await client.get("/dashboard/replicas")
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def until(check: Callable[[], Awaitable[bool]]) -> None:
    """Wait until it is so."""
    async with asyncio.timeout(20):
        while not await check():
            await asyncio.sleep(0.05)


async def names(client: httpx.AsyncClient) -> list[str]:
    return [item["replica"] for item in (await listed(client))["items"]]


async def named(client: httpx.AsyncClient, name: str) -> dict[str, Any]:
    (found,) = [item for item in (await listed(client))["items"] if item["replica"] == name]
    return dict(found)


async def test_each_is_told_of_both_and_their_totals(
    both: tuple[httpx.AsyncClient, httpx.AsyncClient],
) -> None:
    first, second = both
    registered: list[str] = []

    async def register() -> bool:
        answer = await second.post("/jobs", json={"project": "code", "total_chunks": 9, "instance_id": "editor"})
        registered.extend([answer.json()["job_id"]] if answer.status_code == 200 else [])  # Redis may be slow
        return bool(registered)

    await until(register)
    (job,) = registered
    await second.post("/embed", json={"inputs": ["a", "b"]}, headers={"x-job-id": job})

    async def told() -> bool:
        return bool((await listed(first))["items"][1]["texts_per_second"] > 0)

    await until(told)
    found = await listed(first)
    assert [(item["replica"], item["this"], item["status"]) for item in found["items"]] == [
        ("one", True, "ok"),
        ("two", False, "ok"),
    ]
    assert (found["count"], found["unreadable"], found["problem"]) == (2, 0, None)
    one, two = found["items"]
    assert (two["version"], two["url"]) == (__version__, "http://two.example:8080")
    assert [model["id"] for model in two["models"]] == [MODEL]
    assert two["models"][0]["us_per_token"] > 0
    assert 0 < two["memory"]["ours_bytes"] < two["memory"]["total_bytes"]
    assert two["texts_per_second"] > 0
    assert two["queue"] == {"texts": 0, "tokens": 0}
    assert found["totals"]["texts_per_second"] == pytest.approx(one["texts_per_second"] + two["texts_per_second"])
    assert (found["totals"]["ready"], found["totals"]["queue"]) == (2, {"texts": 0, "tokens": 0})
    shown = (await first.get("/dashboard/snapshot")).json()
    assert shown["replica"] == "one"
    assert [item["replica"] for item in shown["replicas"]["items"]] == ["one", "two"]

    async def says_where() -> bool:
        items = (await first.get("/dashboard/snapshot")).json()["jobs"]["items"]
        return [item["replica"] for item in items if item["id"] == job] == ["two"]

    await until(says_where)


async def test_each_says_who_it_is_wherever_it_answers(both: tuple[httpx.AsyncClient, httpx.AsyncClient]) -> None:
    for client, name in zip(both, ("one", "two"), strict=True):
        for path in ("/health", "/capabilities"):
            assert (await client.get(path)).json()["replica"] == name
        refused = await client.post("/v1/embeddings", json={"input": []})
        assert (refused.status_code, refused.headers["x-replica"]) == (400, name)
        for accept in ("text/plain", "application/openmetrics-text"):
            lines = (await client.get("/metrics", headers={"accept": accept})).text.splitlines()
            samples = [line for line in lines if not line.startswith("#")]
            assert [line for line in samples if f'replica="{name}"' not in line] == []


async def test_one_that_was_killed_is_gone_since_it_was_last_heard_of(
    both: tuple[httpx.AsyncClient, httpx.AsyncClient], store: redis.Redis
) -> None:
    leave(store, {"replica": "lost", "id": "a", "status": "ok", "texts_per_second": 1000}, age=60)
    found = await listed(both[0])
    lost = found["items"][-1]
    assert (lost["replica"], lost["status"]) == ("lost", "gone")
    assert lost["texts_per_second"] is None
    assert lost["gone_since"] == pytest.approx(time() - 60, abs=5)
    assert found["totals"]["ready"] == 2
    assert found["totals"]["texts_per_second"] < 1000

    leave(store, {"replica": "lost", "id": "b", "status": "loading"}, place=101)
    assert (await named(both[0], "lost"))["status"] == "loading"  # the same one, back again


async def test_one_of_another_version_is_shown_with_what_is_known(
    both: tuple[httpx.AsyncClient, httpx.AsyncClient], store: redis.Redis
) -> None:
    leave(
        store, {"replica": "newer", "id": "c", "version": "99.0", "status": "resting", "models": {"id": 1}, "new": []}
    )
    newer = await named(both[0], "newer")
    assert (newer["version"], newer["status"], newer["models"], newer["texts_per_second"]) == (
        "99.0",
        "resting",
        [],
        None,
    )
    assert (await listed(both[0]))["totals"]["texts_per_second"] is None  # not known


async def test_what_is_no_record_is_counted_and_left_out(
    both: tuple[httpx.AsyncClient, httpx.AsyncClient], store: redis.Redis
) -> None:
    good = {"replica": "good", "id": "d"}
    no_records: list[object] = [[], "text", 1, None, {}, {"replica": 1, "id": "e"}, {"replica": "x"}]
    for place, record in enumerate(no_records, 100):
        leave(store, record, place=place)
    for place, content in enumerate([b"not JSON", b"\xff", b"[" * 8000, b'{"replica": "big"}' + b" " * 1_000_000], 110):
        store.set(PLACES[place], content, ex=900)
    store.rpush(PLACES[114], "a list")
    store.set(PLACES[115], orjson.dumps(good))  # it never expires: no server wrote it
    leave(store, good | {"id": 1}, place=116)
    leave(store, good | {"id": "x" * 100}, place=117)
    found = await listed(both[0])
    assert found["unreadable"] == 15
    assert [item["replica"] for item in found["items"]] == ["one", "two"]


async def test_what_is_wrong_in_a_record_is_unknown_and_text_stays_text(
    both: tuple[httpx.AsyncClient, httpx.AsyncClient], store: redis.Redis
) -> None:
    record: dict[str, object] = {
        "replica": HOSTILE,
        "id": "f",
        "url": "javascript:alert(1)",
        "version": "v" * 1000,
        "status": "a\nb\u202e",
        "uptime_seconds": -1,
        "texts_per_second": "12",
        "requests_per_second": 1e30,
        "searches_p95_ms": True,
        "queue": [1, 2],
        "memory": {"ours_bytes": {"a": 1}, "total_bytes": 1e300},
        "models": [{"id": "m" * 1000, "queued_tokens": None}, 1, *[{"id": "x"}] * 100],
        "jobs": {"job": "now", "other": -1},
    }
    leave(store, record)
    shown = await named(both[0], HOSTILE)
    assert shown["url"] is None
    assert (len(shown["version"]), shown["status"]) == (40, "a\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}")
    numbers = ("uptime_seconds", "texts_per_second", "requests_per_second", "searches_p95_ms")
    assert [shown[name] for name in numbers] == [None] * 4
    assert shown["queue"] == {"texts": None, "tokens": None}
    assert shown["memory"] == {"ours_bytes": None, "total_bytes": None}
    assert (len(shown["models"]), len(shown["models"][0]["id"])) == (16, 200)
    assert (await both[0].get("/dashboard/snapshot")).status_code == 200


async def test_two_that_were_given_one_name_are_both_shown_and_warned_of(
    both: tuple[httpx.AsyncClient, httpx.AsyncClient], store: redis.Redis
) -> None:
    leave(store, {"replica": "one", "id": "g", "status": "ok"})
    assert [item["replica"] for item in (await listed(both[0]))["items"]] == ["one", "one", "two"]
    warnings = (await both[0].get("/dashboard/snapshot")).json()["warnings"]
    assert "set REPLICA for each" in next(each["text"] for each in warnings if each["name"] == "replica")


async def test_one_that_leaves_is_no_longer_listed_and_another_takes_its_place(
    both: tuple[httpx.AsyncClient, httpx.AsyncClient], store: redis.Redis, redis_url: str
) -> None:
    taken = sorted(place for place in PLACES if store.exists(place))

    async def is_listed() -> bool:
        return "three" in await names(both[0])

    async with serving(redis_url=redis_url, replica="three"):
        await until(is_listed)
        (own,) = [place for place in PLACES if store.exists(place) and place not in taken]

        # Somebody else takes its place: it finds another one, and leaves theirs alone.
        async def has_moved() -> bool:
            store.set(own, b"mine", ex=900)  # again, where it was just writing there
            return bool([place for place in PLACES if store.exists(place) and place not in (*taken, own)])

        await until(has_moved)
        await until(is_listed)
        assert store.get(own) == b"mine"
        store.delete(own)
    assert not await is_listed()
    assert sorted(place for place in PLACES if store.exists(place)) == taken


async def test_only_administrators_are_told_who_there_is() -> None:
    async with serving(**LOCKED) as client:
        for key, status in ((ADMIN, 200), (ANN, 403)):
            answer = await client.get("/dashboard/replicas", headers=bearer(key))
            assert answer.status_code == status
            shown = (await client.get("/dashboard/snapshot", headers=bearer(key))).json()["replicas"]
            assert (shown["items"] is not None) == (shown["totals"] is not None) == (status == 200)
        # The default name is the machine's own: it is not told to strangers.
        stranger = await client.get("/health")
        assert stranger.json()["replica"] is None
        assert "x-replica" not in stranger.headers
        assert (await client.get("/health", headers=bearer(ANN))).json()["replica"]


async def test_alone_without_redis(client: httpx.AsyncClient) -> None:
    found = await listed(client)
    assert (found["count"], found["problem"], [item["this"] for item in found["items"]]) == (1, None, [True])
    metrics = (await client.get("/metrics")).text
    assert "\nvecmill_ready 1.0\n" in metrics  # no label where no name was given
    assert f'replica="{found["items"][0]["replica"]}"' in metrics


async def test_without_its_redis_it_goes_on_says_so_and_recovers(tmp_path: Path) -> None:
    port = free_port()
    async with serving(redis_url=f"redis://127.0.0.1:{port}/0", replica="alone") as client:

        async def is_well() -> bool:
            return (await listed(client))["problem"] is None

        async def is_ill() -> bool:
            return "Redis cannot be used" in ((await listed(client))["problem"] or "")

        await until(is_ill)
        assert await names(client) == ["alone"]
        assert (await client.post("/v1/embeddings", json={"input": "a"})).status_code == 200
        with redis_server(tmp_path, port=port):
            await until(is_well)
            with redis.Redis(port=port) as store:

                async def is_there() -> bool:
                    return bool(store.exists(*PLACES) == 1)

                await until(is_there)
        await until(is_ill)
        assert (await client.get("/dashboard/snapshot")).json()["replicas"]["problem"]
