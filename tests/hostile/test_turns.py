"""Turns belong to a key and an address, whatever else a request says of itself."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request

from tests.gated import Gate, from_address, gated, small_server, until_waiting, words
from tests.hostile.keys import ANN, BEN, KEYS, bearer
from tests.tiny_checkpoints import tiny_bert
from vecmill.config import load_settings
from vecmill.core.types import Lane
from vecmill.http.services import Services
from vecmill.serve.http_server import HttpServer

GREEDY = 60  # requests, each of one text
NEIGHBOURS = [words(50 + number) for number in range(8)]  # 50 to 57 tokens
PROXY, V6_PROXY, HERE, ELSEWHERE = "10.1.2.3", "::ffff:10.1.2.3", "192.168.0.1", "192.168.0.2"

Asking = Callable[..., Any]


@pytest.fixture(scope="module")
async def server(
    tmp_path_factory: pytest.TempPathFactory, minilm_folder: Path
) -> AsyncIterator[tuple[FastAPI, Services, Gate]]:
    folder = tiny_bert(tmp_path_factory.mktemp("turns") / "tiny", minilm_folder)
    flags = {"api_key": KEYS, "trusted_proxies": "10.0.0.0/8, fd00::/8", "batches_max_active": 20}
    with pytest.MonkeyPatch.context() as patch:
        for gate in gated(patch):
            async with small_server(folder, state_dir=folder.parent / "state", **flags) as (client, services):
                yield client._transport.app, services, gate  # type: ignore[attr-defined]


@pytest.fixture
def gate(server: tuple[FastAPI, Services, Gate]) -> Gate:
    server[2].close()
    return server[2]


async def place_of_the_neighbour(
    server: tuple[FastAPI, Services, Gate],
    flood_with: Callable[[int], dict[str, Any]],
    *,
    of: tuple[str, str] = (ANN, HERE),
    neighbour: tuple[str, str] = (BEN, HERE),
    neighbour_headers: dict[str, str] | None = None,
) -> int:
    """How many texts ran before the last of the neighbour's 8, while another floods with requests that may differ.

    `of` and `neighbour` are a key and an address each.
    """
    app, services, gate = server
    async with from_address(app, of[1]) as flooding, from_address(app, neighbour[1]) as asking:

        async def flood(number: int) -> None:
            fields = flood_with(number)
            body = {"inputs": f"{words(40)} {number}", "priority": "bulk", **fields.pop("body", {})}
            answer = await flooding.post("/embed", json=body, headers={**bearer(of[0]), **fields})
            assert answer.status_code == 200, answer.text

        floods = [asyncio.create_task(flood(number)) for number in range(GREEDY)]
        await until_waiting(services, Lane.BULK, GREEDY - 2)
        headers = {**bearer(neighbour[0]), **(neighbour_headers or {})}
        body = {"inputs": NEIGHBOURS, "priority": "bulk"}
        pending = asyncio.create_task(asking.post("/embed", json=body, headers=headers))
        await until_waiting(services, Lane.BULK, GREEDY - 2 + len(NEIGHBOURS))
        gate.open()
        assert (await pending).status_code == 200
        await asyncio.gather(*floods)
    return [length for batch in gate.batches for length in batch].index(57)


# 8 texts of some 54 tokens take turns with some 11 of the greedy client's, of some 42.
IN_TURN = 25

DISGUISES: dict[str, Callable[[int], dict[str, Any]]] = {
    "X-Job-ID of no job": lambda number: {"X-Job-ID": f"{number:016x}"},
    "job_id in the body": lambda number: {"body": {"job_id": str(number)}},
    "X-Forwarded-For": lambda number: {"X-Forwarded-For": f"10.9.{number}.1"},
    "all of them": lambda number: {
        "X-Job-ID": str(number),
        "X-Forwarded-For": f"203.0.113.{number}",
        "Forwarded": f"for=203.0.113.{number}",
        "X-Real-IP": f"203.0.113.{number}",
        "X-Request-ID": str(number),
        "User-Agent": str(number),
    },
}


@pytest.mark.parametrize("disguise", DISGUISES.values(), ids=DISGUISES)
async def test_no_disguise_gives_a_fresh_turn(
    server: tuple[FastAPI, Services, Gate], gate: Gate, disguise: Callable[[int], dict[str, Any]]
) -> None:
    assert await place_of_the_neighbour(server, disguise) <= IN_TURN


async def test_two_addresses_with_one_key_take_turns(server: tuple[FastAPI, Services, Gate], gate: Gate) -> None:
    disguise = DISGUISES["all of them"]
    place = await place_of_the_neighbour(server, disguise, of=(ANN, HERE), neighbour=(ANN, ELSEWHERE))
    assert place <= IN_TURN


async def test_one_address_in_both_families_is_one_client(server: tuple[FastAPI, Services, Gate], gate: Gate) -> None:
    place = await place_of_the_neighbour(server, lambda number: {}, of=(ANN, HERE), neighbour=(ANN, f"::ffff:{HERE}"))
    assert place > IN_TURN


@pytest.mark.parametrize(("peer", "turns"), [(PROXY, True), (V6_PROXY, True), (HERE, False)])
async def test_a_trusted_proxy_says_who_its_clients_are(
    server: tuple[FastAPI, Services, Gate], gate: Gate, peer: str, turns: bool
) -> None:
    """Only the last address is believed, which the proxy added itself: those before it are the client's own claim."""
    place = await place_of_the_neighbour(
        server,
        lambda number: {"X-Forwarded-For": f"203.0.113.{number}, 198.51.100.7:{5000 + number}"},
        of=(ANN, peer),
        neighbour=(ANN, peer),
        neighbour_headers={"X-Forwarded-For": "198.51.100.8"},
    )
    assert (place <= IN_TURN) is turns


async def test_a_batchs_lines_are_run_in_its_clients_turns(server: tuple[FastAPI, Services, Gate], gate: Gate) -> None:
    """Otherwise each of many batches would have a turn of its own."""
    app, services, _ = server
    async with from_address(app, HERE) as client, from_address(app, ELSEWHERE) as neighbour:
        client.headers.update(bearer(ANN))
        for number in range(12):
            line = '{"custom_id": "1", "method": "POST", "url": "/v1/embeddings", "body": {"input": "%s %d"}}'
            content = {"file": ("x.jsonl", line % (words(41), number)), "purpose": (None, "batch")}
            file = (await client.post("/v1/files", files=content)).json()["id"]
            body = {"input_file_id": file, "endpoint": "/v1/embeddings", "completion_window": "1h"}
            assert (await client.post("/v1/batches", json=body)).status_code == 200
        await until_waiting(services, Lane.BULK, 10)
        body = {"inputs": NEIGHBOURS[:3], "priority": "bulk"}
        pending = asyncio.create_task(neighbour.post("/embed", json=body, headers=bearer(BEN)))
        await until_waiting(services, Lane.BULK, 13)
        gate.open()
        assert (await pending).status_code == 200
    order = [length for batch in gate.batches for length in batch]
    assert order.index(52) <= 9


async def test_the_http_server_itself_believes_no_forwarded_header(monkeypatch: pytest.MonkeyPatch) -> None:
    """uvicorn would, from this machine, or from wherever FORWARDED_ALLOW_IPS says."""
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "*")
    app = FastAPI()

    @app.get("/who")
    async def who(request: Request) -> dict[str, str]:
        assert request.client is not None
        return {"client": request.client.host, "scheme": request.url.scheme}

    server = HttpServer(app, load_settings({}).http, lambda: None)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/who"
        serving = asyncio.create_task(server.serve([listener]))
        async with httpx.AsyncClient() as client:
            answer = await client.get(url, headers={"X-Forwarded-For": "10.9.9.9", "X-Forwarded-Proto": "https"})
        assert answer.json() == {"client": "127.0.0.1", "scheme": "http"}
        server.close_within(1)
        await serving
