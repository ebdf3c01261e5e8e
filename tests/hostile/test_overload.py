"""When there is no room: bulk waits, searches do not, and who is refused is told so that its client tries again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import serving
from tests.gated import Gate, from_address, gated, small_server, until_waiting, words
from tests.tiny_checkpoints import tiny_bert
from vecmill.core.types import Lane
from vecmill.http.services import Services

LIMIT = 8
SHORT = 0.3  # seconds that a request waits for room at most, where it is refused then
LONG = 60.0  # where it must not be, however busy the machine is

Full = tuple[httpx.AsyncClient, Services, Gate]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, minilm_folder: Path) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("overload") / "tiny", minilm_folder)


@asynccontextmanager
async def gated_server(folder: Path, queue_timeout: float) -> AsyncIterator[Full]:
    """No forward pass ends until its gate is opened."""
    with pytest.MonkeyPatch.context() as patch:
        for gate in gated(patch):
            async with small_server(
                folder, max_concurrent_requests=LIMIT, queue_timeout=queue_timeout, state_dir=folder.parent / "state"
            ) as (client, services):
                try:
                    yield client, services, gate
                finally:
                    gate.open()


@asynccontextmanager
async def filled(server: Full) -> AsyncIterator[Full]:
    """All of the room is taken by bulk, and more of it waits; it is answered once the gate is opened."""
    client, services, gate = server
    gate.close()
    bulk = [
        asyncio.create_task(client.post("/embed", json={"inputs": f"{words(20)} {number}", "priority": "bulk"}))
        for number in range(LIMIT - 1)
    ]
    try:
        await until_waiting(services, Lane.BULK, LIMIT - 3)  # two are with the device
        yield server
    finally:
        gate.open()
    assert {answer.status_code for answer in await asyncio.gather(*bulk)} == {200}
    assert (services.inference.admission.requests, services.inference.admission.waiting) == (0, 0)


@pytest.fixture
async def patient(folder: Path) -> AsyncIterator[Full]:
    async with gated_server(folder, LONG) as server:
        yield server


@pytest.fixture
async def full(patient: Full) -> AsyncIterator[Full]:
    async with filled(patient) as server:
        yield server


@pytest.fixture
async def full_and_impatient(folder: Path) -> AsyncIterator[Full]:
    async with gated_server(folder, SHORT) as server, filled(server):
        yield server


NODE = {"User-Agent": "node", "Authorization": "Bearer none"}
CODECART = {"User-Agent": "codecart (unknown version) CFNetwork/1568 Darwin/24.0", "Accept-Encoding": "gzip"}
OPENAI_JS = {"User-Agent": "OpenAI/JS 6.49.0", "Authorization": "Bearer none"}
TEXT = {"input": "a text", "priority": "bulk"}

CLIENTS = {
    # a 4xx is final, and loses the batch
    "QMD": (NODE, "/v1/embeddings", TEXT, 503),
    "QMD, rerank": (NODE, "/v1/rerank", {"query": "q", "documents": ["a"], "priority": "bulk"}, 503),
    # tries again after 503, or a text with `timeout`
    "CodeCartographer": (CODECART, "/embed", {"inputs": ["a text"], "is_query": False, "priority": "bulk"}, 503),
    "CodeCartographer, older": (CODECART, "/embed", {"inputs": ["a text"], "priority": "bulk"}, 503),
    # 429 alone
    "Roo Code": (OPENAI_JS, "/v1/embeddings", TEXT, 429),
    "Roo Code, full address": ({**NODE, "api-key": "none"}, "/v1/embeddings", TEXT, 429),
    # either
    "OpenAI's SDK": ({"User-Agent": "AsyncOpenAI/Python 2.54.0"}, "/v1/embeddings", TEXT, 429),
    "Cohere's SDK": ({"User-Agent": "cohere/5.21.1"}, "/v2/embed", {"texts": ["a"], "priority": "bulk"}, 429),
    # falls over on 429
    "Open WebUI": ({"User-Agent": "Python/3.11 aiohttp/3.12"}, "/v1/embeddings", TEXT, 503),
    "Open WebUI, Ollama": ({"User-Agent": "Python/3.11 aiohttp/3.12"}, "/api/embed", TEXT | {"model": "m"}, 503),
    "llama-server's": ({}, "/embedding", {"content": "a", "priority": "bulk"}, 503),
    "Weaviate": ({"User-Agent": "Go-http-client/1.1"}, "/vectors", {"text": "a", "priority": "bulk"}, 503),
}


@pytest.mark.parametrize(("headers", "path", "body", "status"), CLIENTS.values(), ids=CLIENTS)
async def test_each_client_is_told_what_makes_it_try_again(
    full_and_impatient: Full, headers: dict[str, str], path: str, body: dict[str, Any], status: int
) -> None:
    client, _, _ = full_and_impatient
    started = asyncio.get_running_loop().time()
    refused = await client.post(path, json=body, headers={"X-Priority": "bulk", **headers})
    assert refused.status_code == status, refused.text
    assert asyncio.get_running_loop().time() - started >= SHORT
    assert "temporarily overloaded: timeout" in refused.text
    assert "MAX_CONCURRENT_REQUESTS" in refused.text
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert int(refused.headers["retry-after-ms"]) <= 60_000
    assert refused.headers["x-should-retry"] == "true"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/embeddings", {"input": "a short question"}),
        ("/v1/embeddings", {"input": [words(8)] * 12, "prompt_name": "query"}),
        ("/embed", {"inputs": "a question", "is_query": True}),
        ("/v1/rerank", {"query": "q", "documents": ["a", "b", "c"]}),
        ("/api/embed", {"model": "m", "input": "a short question"}),
    ],
)
async def test_a_search_is_never_refused_for_bulk(full: Full, path: str, body: dict[str, Any]) -> None:
    client, services, gate = full
    more = [
        asyncio.create_task(client.post("/embed", json={"inputs": f"{words(21)} {number}", "priority": "bulk"}))
        for number in range(20)
    ]
    async with asyncio.timeout(10):
        while not services.inference.admission.waiting:
            await asyncio.sleep(0.001)
        search = asyncio.create_task(client.post(path, json=body))
        while services.inference.admission.requests < LIMIT:
            await asyncio.sleep(0.001)
    gate.open()
    assert (await search).status_code == 200
    await asyncio.gather(*more)


async def test_who_leaves_while_waiting_frees_the_place(full: Full) -> None:
    client, services, _ = full
    leaving = [
        asyncio.create_task(client.post("/embed", json={"inputs": f"{words(22)} {number}", "priority": "bulk"}))
        for number in range(5)
    ]
    async with asyncio.timeout(10):
        while services.inference.admission.waiting < 5:
            await asyncio.sleep(0.001)
        for task in leaving:
            task.cancel()
        await asyncio.gather(*leaving, return_exceptions=True)
        while services.inference.admission.waiting:
            await asyncio.sleep(0.001)


async def test_a_neighbour_who_waits_comes_before_the_rest_of_a_flood(patient: Full) -> None:
    client, services, gate = patient
    gate.close()
    flood = [
        asyncio.create_task(client.post("/embed", json={"inputs": f"{words(23)} {number}", "priority": "bulk"}))
        for number in range(3 * LIMIT)
    ]
    await until_waiting(services, Lane.BULK, LIMIT - 3)
    async with from_address(client._transport.app, "10.0.0.2") as neighbour:  # type: ignore[attr-defined]
        pending = asyncio.create_task(neighbour.post("/embed", json={"inputs": words(60), "priority": "bulk"}))
        async with asyncio.timeout(10):
            while services.inference.admission.waiting < 2 * LIMIT + 2:
                await asyncio.sleep(0.001)
        gate.open()
        assert (await pending).status_code == 200
        await asyncio.gather(*flood)
    order = [length for batch in gate.batches for length in batch]
    assert order.index(60) <= LIMIT + 2


async def test_by_default_many_more_than_fit_are_all_answered_and_nobody_is_refused() -> None:
    async with serving(max_concurrent_requests=4, max_queued_tokens=4096) as client:
        bodies = [{"input": [f"text {number} of a file"] * 3, "priority": "bulk"} for number in range(40)]
        answers = await asyncio.gather(*(client.post("/v1/embeddings", json=body) for body in bodies))
        assert {answer.text for answer in answers if answer.status_code != 200} == set()


async def test_what_retry_after_says_is_about_what_it_takes() -> None:
    """Measured over a flood of small requests after an idle time, which used to count as time worked."""
    async with serving(max_concurrent_requests=64, queue_timeout=0) as client:
        loop = asyncio.get_running_loop()
        for number in range(5):  # a little before, so that there is a rate of the last minute
            await client.post("/embed", json={"inputs": f"before {number}"})
        await asyncio.sleep(1)
        started = loop.time()
        bodies = [{"inputs": f"{words(100)} {number}", "priority": "bulk"} for number in range(90)]
        answers = await asyncio.gather(*(client.post("/embed", json=body) for body in bodies))
        took = loop.time() - started
        waits = [int(answer.headers["retry-after-ms"]) / 1000 for answer in answers if answer.status_code == 503]
        assert waits
        assert max(waits) <= 5 * took + 1
