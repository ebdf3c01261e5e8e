"""Turns belong to a key and an address, whatever else a request says of itself."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI, Request

from tests.checkpoints import tiny_bert
from tests.gated import Gate, from_address, gated, small_server, until_waiting, words
from tests.hostile.keys import ANN, BEN, KEYS, bearer
from vecmill.core.types import Lane
from vecmill.serve.http_server import HttpServer


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    yield from gated(monkeypatch)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, minilm_folder: Path) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("turns") / "tiny", minilm_folder)


GREEDY = 60  # requests, each of one text
NEIGHBOURS = [words(70 + number) for number in range(8)]


async def place_of_the_neighbour(
    gate: Gate, folder: Path, disguise: object, *, greedy: str, neighbour: str, flags: dict[str, object]
) -> int:
    """How many texts ran before the last of the neighbour's, while a greedy client disguises each of its requests.

    `greedy` and `neighbour` are a key or an address each.
    """
    async with small_server(folder, **flags) as (client, services):
        app = client._transport.app  # type: ignore[attr-defined]

        def of(who: str) -> tuple[httpx.AsyncClient, dict[str, str]]:
            return (client, bearer(who)) if "secret" in who else (from_address(app, who), {})

        (flooding, key), (asking, other_key) = of(greedy), of(neighbour)
        flood = [
            asyncio.create_task(
                flooding.post(
                    "/embed",
                    json={"inputs": f"{words(10)} {number} {words(number % 40 + 3)}", "priority": "bulk"},
                    headers={**key, **disguise(number)},  # type: ignore[operator]
                )
            )
            for number in range(GREEDY)
        ]
        await until_waiting(services, Lane.BULK, GREEDY - 2)
        asked = asyncio.create_task(
            asking.post("/embed", json={"inputs": NEIGHBOURS, "priority": "bulk"}, headers=other_key)
        )
        await until_waiting(services, Lane.BULK, GREEDY - 2 + len(NEIGHBOURS))
        gate.open()
        assert (await asked).status_code == 200
        assert {answer.status_code for answer in await asyncio.gather(*flood)} == {200}
        for one in (flooding, asking):
            if one is not client:
                await one.aclose()
    order = [length for batch in gate.batches for length in batch]
    return order.index(77)


DISGUISES = {
    "X-Job-ID of no job": lambda number: {"X-Job-ID": f"{number:016x}"},
    "X-Forwarded-For": lambda number: {"X-Forwarded-For": f"10.9.{number}.1"},
    "both, and others": lambda number: {
        "X-Job-ID": str(number),
        "X-Forwarded-For": f"10.9.{number}.1",
        "Forwarded": f"for=10.9.{number}.1",
        "X-Real-IP": f"10.9.{number}.1",
        "X-Client-IP": f"10.9.{number}.1",
        "X-Request-ID": str(number),
        "User-Agent": str(number),
    },
}


@pytest.mark.parametrize("disguise", DISGUISES.values(), ids=DISGUISES)
@pytest.mark.parametrize(
    ("greedy", "neighbour", "flags"),
    [(ANN, BEN, {"api_key": KEYS}), ("10.0.0.1", "10.0.0.2", {})],
    ids=["two keys", "two addresses"],
)
async def test_no_disguise_gives_a_fresh_turn(
    gate: Gate, folder: Path, disguise: object, greedy: str, neighbour: str, flags: dict[str, object]
) -> None:
    place = await place_of_the_neighbour(gate, folder, disguise, greedy=greedy, neighbour=neighbour, flags=flags)
    assert place <= 35  # 8 texts of 70 tokens and more take turns with some 25 of the greedy client's shorter ones


async def test_a_job_in_the_body_gives_none_either(gate: Gate, folder: Path) -> None:
    async with small_server(folder) as (client, services):
        flood = [
            asyncio.create_task(client.post("/embed", json={"inputs": f"{words(40)} {number}", "job_id": str(number)}))
            for number in range(GREEDY)
        ]
        await until_waiting(services, Lane.BULK, GREEDY - 2)
        async with from_address(client._transport.app, "10.0.0.2") as neighbour:  # type: ignore[attr-defined]
            asked = asyncio.create_task(neighbour.post("/embed", json={"inputs": NEIGHBOURS}))
            await until_waiting(services, Lane.BULK, GREEDY - 2 + len(NEIGHBOURS))
            gate.open()
            await asyncio.gather(asked, *flood)
    order = [length for batch in gate.batches for length in batch]
    assert order.index(77) <= 30


@pytest.mark.parametrize(
    ("proxies", "peer", "turns"),
    [
        ("10.0.0.0/8", "10.1.2.3", True),
        ("10.1.2.3, fd00::/8", "::ffff:10.1.2.3", True),
        ("10.0.0.0/8", "192.168.0.1", False),
    ],
)
async def test_a_trusted_proxy_says_who_its_clients_are(
    gate: Gate, folder: Path, proxies: str, peer: str, turns: bool
) -> None:
    """And only the address that it has added itself: what stands before that is the client's own word."""
    async with small_server(folder, trusted_proxies=proxies) as (client, services):
        async with from_address(client._transport.app, peer) as proxy:  # type: ignore[attr-defined]
            flood = [
                asyncio.create_task(
                    proxy.post(
                        "/embed",
                        json={"inputs": f"{words(40)} {number}", "priority": "bulk"},
                        headers={"X-Forwarded-For": f"203.0.113.{number}, 198.51.100.7:{5000 + number}"},
                    )
                )
                for number in range(GREEDY)
            ]
            await until_waiting(services, Lane.BULK, GREEDY - 2)
            asked = asyncio.create_task(
                proxy.post("/embed", json={"inputs": NEIGHBOURS}, headers={"X-Forwarded-For": "198.51.100.8"})
            )
            await until_waiting(services, Lane.BULK, GREEDY - 2 + len(NEIGHBOURS))
            gate.open()
            await asyncio.gather(asked, *flood)
    order = [length for batch in gate.batches for length in batch]
    assert (order.index(77) <= 30) is turns


async def test_a_batchs_lines_are_run_in_its_clients_turns(gate: Gate, folder: Path) -> None:
    """Otherwise each of many batches would have a turn of its own."""
    async with small_server(folder, batches_max_active=20) as (client, services):
        for number in range(20):
            line = '{"custom_id": "1", "method": "POST", "url": "/v1/embeddings", "body": {"input": "%s %d"}}'
            content = {"file": ("x.jsonl", line % (words(40), number)), "purpose": (None, "batch")}
            file = (await client.post("/v1/files", files=content)).json()["id"]
            body = {"input_file_id": file, "endpoint": "/v1/embeddings", "completion_window": "1h"}
            assert (await client.post("/v1/batches", json=body)).status_code == 200
        await until_waiting(services, Lane.BULK, 18)
        async with from_address(client._transport.app, "10.0.0.2") as neighbour:  # type: ignore[attr-defined]
            asked = asyncio.create_task(neighbour.post("/embed", json={"inputs": NEIGHBOURS[:3], "priority": "bulk"}))
            await until_waiting(services, Lane.BULK, 21)
            gate.open()
            assert (await asked).status_code == 200
    order = [length for batch in gate.batches for length in batch]
    assert order.index(72) <= 10


async def test_the_http_server_itself_believes_no_forwarded_header(monkeypatch: pytest.MonkeyPatch) -> None:
    """uvicorn would, from this machine, or from wherever FORWARDED_ALLOW_IPS says."""
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "*")
    app = FastAPI()

    @app.get("/who")
    async def who(request: Request) -> dict[str, str]:
        assert request.client is not None
        return {"client": request.client.host, "scheme": request.url.scheme}

    server = HttpServer(app, lambda: None)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/who"
        serving = asyncio.create_task(server.serve([listener]))
        async with httpx.AsyncClient() as client:
            answer = await client.get(url, headers={"X-Forwarded-For": "10.9.9.9", "X-Forwarded-Proto": "https"})
        assert answer.json() == {"client": "127.0.0.1", "scheme": "http"}
        server.close_within(1)
        await serving
