"""Who goes first, who takes turns and who has left, as clients see it over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.gated import Gate, gated, small_server, until_waiting, words
from tests.tiny_checkpoints import tiny_bert
from vecmill.core.types import Lane
from vecmill.http.dialects.openai import EmbeddingsBody
from vecmill.inference.text_tokenizer import asks_for_query


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    yield from gated(monkeypatch)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, minilm_folder: Path) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("lanes") / "tiny", minilm_folder)


BULK = [words(20 + number) for number in range(10)]
LARGE_SEARCH = [words(5), *(words(31 + number) for number in range(9))]  # too large to be taken for a search unmarked


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        ({"input": [words(5), words(6)]}, {}),
        ({"input": LARGE_SEARCH, "input_type": "query"}, {}),
        ({"input": LARGE_SEARCH, "prompt_name": "query"}, {}),
        ({"input": LARGE_SEARCH, "priority": "interactive"}, {}),
        ({"input": LARGE_SEARCH, "priority": -1}, {}),
        ({"input": LARGE_SEARCH}, {"X-Priority": "interactive"}),
    ],
)
async def test_a_search_overtakes_an_index(
    gate: Gate, folder: Path, body: dict[str, Any], headers: dict[str, str]
) -> None:
    async with small_server(folder) as (client, services):
        index = asyncio.create_task(client.post("/embed", json={"inputs": BULK}))
        await until_waiting(services, Lane.BULK, 8)  # two are with the device
        search = asyncio.create_task(client.post("/v1/embeddings", json=body, headers=headers))
        await until_waiting(services, Lane.INTERACTIVE, len(body["input"]) - 1)  # one is with the device at once
        gate.open()
        assert (await search).status_code == 200
        assert (await index).status_code == 200
    order = [length for batch in gate.batches for length in batch]
    assert order.index(5) < order.index(23)


@pytest.mark.parametrize("fields", [{"is_query": True}, {"input_type": "query"}, {"prompt_name": "query"}])
def test_a_query_with_an_instruction_of_its_own_is_still_one(fields: dict[str, Any]) -> None:
    choice = EmbeddingsBody.model_validate({"input": "x", "instruction": "find", **fields}).prompt_choice()
    assert choice.instruction == "find"
    assert asks_for_query(choice)


@pytest.mark.parametrize("marked", [{"priority": "bulk"}, {"priority": 5}, {"priority": "BULK"}])
async def test_what_says_that_it_can_wait_waits(gate: Gate, folder: Path, marked: dict[str, Any]) -> None:
    async with small_server(folder) as (client, services):
        index = asyncio.create_task(client.post("/embed", json={"inputs": BULK}))
        await until_waiting(services, Lane.BULK, 8)
        patient = asyncio.create_task(client.post("/embed", json={"inputs": words(5), **marked}))
        await until_waiting(services, Lane.BULK, 9)
        gate.open()
        assert {(await index).status_code, (await patient).status_code} == {200}
    assert gate.batches[-1] == [5]


@pytest.mark.parametrize("tagged", [{"job_id": "index"}, {}])
async def test_a_jobs_small_batch_is_bulk_all_the_same(gate: Gate, folder: Path, tagged: dict[str, str]) -> None:
    async with small_server(folder) as (client, services):
        headers = {} if tagged else {"X-Job-ID": "index"}
        batches = [asyncio.create_task(client.post("/embed", json={"inputs": BULK[:3], **tagged}, headers=headers))]
        await until_waiting(services, Lane.BULK, 1)
        assert services.inference.waiting[Lane.INTERACTIVE] == 0
        gate.open()
        assert (await batches[0]).status_code == 200


async def test_jobs_take_turns(gate: Gate, folder: Path) -> None:
    async with small_server(folder) as (client, services):
        first = asyncio.create_task(client.post("/embed", json={"inputs": BULK}, headers={"X-Job-ID": "first"}))
        await until_waiting(services, Lane.BULK, 8)
        others = [words(50 + number) for number in range(10)]
        second = asyncio.create_task(client.post("/embed", json={"inputs": others, "job_id": "second"}))
        await until_waiting(services, Lane.BULK, 18)
        gate.open()
        await asyncio.gather(first, second)
    order = [length for batch in gate.batches for length in batch]
    assert order.index(52) < order.index(29)


@pytest.mark.parametrize(
    ("field", "value"),
    [("priority", "urgent"), ("priority", 1.5), ("priority", True), ("priority", ["bulk"]), ("priority", "1.5")],
)
async def test_a_priority_that_is_none_is_refused(client: httpx.AsyncClient, field: str, value: Any) -> None:
    refused = await client.post("/v1/embeddings", json={"input": "x", field: value})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "priority"
    assert "interactive, bulk" in refused.json()["error"]["message"]


@pytest.mark.parametrize("value", ["0", "-1", "soon", "nan", "inf", "5e-324", "0.0009"])
async def test_a_timeout_that_is_none_is_refused(client: httpx.AsyncClient, value: str) -> None:
    refused = await client.post("/v1/embeddings", json={"input": "x"}, headers={"X-Request-Timeout": value})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"].lower() == "x-request-timeout"


async def test_a_request_is_answered_at_its_deadline_and_its_texts_are_not_run(gate: Gate, folder: Path) -> None:
    async with small_server(folder) as (client, services):
        late = await client.post("/v1/embeddings", json={"input": BULK}, headers={"X-Request-Timeout": "0.5"})
        assert late.status_code == 504
        assert late.json()["error"]["code"] == "timeout"
        assert "timeout" in late.json()["error"]["message"]
        assert services.inference.admission.requests == 0
        gate.open()
        assert (await client.post("/embed", json={"inputs": words(5)})).status_code == 200
        assert services.inference.stats.expired == 8
        assert (await client.get("/stats")).json()["texts_expired"] == 8
    assert len(gate.batches) == 3  # the two that were with the device already, and the next request


async def test_the_servers_own_timeout_holds_for_everyone(gate: Gate, folder: Path) -> None:
    async with small_server(folder, request_timeout=0.5) as (client, _):
        late = await client.post("/v1/rerank", json={"query": "q", "documents": BULK})
        assert late.status_code == 504
        assert late.json()["message"].startswith("timeout")
        patient = await client.post("/embed", json={"inputs": "x"}, headers={"X-Request-Timeout": "1000"})
        assert patient.status_code == 504
        assert late.headers["x-should-retry"] == "false"
        gate.open()


async def test_equal_texts_of_two_clients_run_once(gate: Gate, folder: Path) -> None:
    async with small_server(folder) as (client, services):
        first = asyncio.create_task(client.post("/embed", json={"inputs": BULK}))
        await until_waiting(services, Lane.BULK, 8)
        second = asyncio.create_task(client.post("/embed", json={"inputs": BULK}, headers={"X-Job-ID": "other"}))
        async with asyncio.timeout(20):
            while services.inference.stats.joined < 10:
                await asyncio.sleep(0)
        gate.open()
        assert (await first).json() == (await second).json()
    assert len(gate.batches) == 10


async def test_a_machine_short_of_memory_refuses_and_says_so(folder: Path) -> None:
    async with small_server(folder, memory_floor_gb=1e6) as (client, _):
        refused = await client.post("/v1/embeddings", json={"input": "x"})
        assert refused.status_code == 503
        assert int(refused.headers["Retry-After"]) > 0
        assert "MEMORY_FLOOR_GB" in refused.json()["error"]["message"]
        assert (await client.get("/health")).status_code == 200


async def test_times_are_told(client: httpx.AsyncClient) -> None:
    answered = await client.post("/embed", json={"inputs": "x"})
    assert all(float(answered.headers[f"x-{stage}-time"]) >= 0 for stage in ("tokenization", "queue", "inference"))
