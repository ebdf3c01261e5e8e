"""What clients see of the cache: hits in every dialect's own place, and every way around it."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.conftest import serving
from tests.oracle import st_encode
from tests.tiny_checkpoints import edit_json, tiny_bert
from vecmill.inference import cache_lookup

TEXTS = ["def add(a, b): return a + b", "Berlin has 3.5 million inhabitants."]
ON = {"cache_max_bytes": 1_000_000_000}


@pytest.fixture(scope="module")
async def client() -> AsyncIterator[httpx.AsyncClient]:
    async with serving(**ON) as client:
        yield client


@pytest.fixture(autouse=True)
async def empty(client: httpx.AsyncClient) -> None:
    assert (await client.delete("/cache")).status_code == 200


async def embed(client: httpx.AsyncClient, texts: object, headers: dict[str, str] | None = None, **body: object) -> Any:
    answer = await client.post("/v1/embeddings", json={"input": texts, **body}, headers=headers)
    assert answer.status_code == 200, answer.text
    return answer


async def computed(client: httpx.AsyncClient) -> int:
    return int((await client.get("/stats")).json()["texts_computed"])


def vectors(answer: httpx.Response) -> np.ndarray:
    return np.array([entry["embedding"] for entry in answer.json()["data"]])


async def test_what_was_embedded_is_not_computed_again(client: httpx.AsyncClient) -> None:
    first = await embed(client, TEXTS)
    before = await computed(client)
    second = await embed(client, TEXTS)
    assert await computed(client) == before
    assert (vectors(first) * vectors(second)).sum(axis=1) == pytest.approx(1, abs=1e-6)
    usage = second.json()["usage"]
    assert usage["prompt_tokens"] == first.json()["usage"]["prompt_tokens"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": usage["prompt_tokens"]}
    assert second.headers["x-cached-inputs"] == "2"
    assert second.headers["x-cached-tokens"] == str(usage["prompt_tokens"])
    assert "prompt_tokens_details" not in first.json()["usage"]
    assert "x-cached-inputs" not in first.headers


async def test_only_what_is_new_is_computed_and_the_order_is_kept(client: httpx.AsyncClient) -> None:
    await embed(client, [TEXTS[1]])
    before = await computed(client)
    mixed = await embed(client, ["new one", TEXTS[1], "new two", "new one"])
    assert await computed(client) == before + 2
    assert mixed.headers["x-cached-inputs"] == "1"
    alone = await embed(client, ["new one", TEXTS[1], "new two", "new one"], {"Cache-Control": "no-store"})
    assert vectors(mixed) == pytest.approx(vectors(alone), abs=1e-5)


async def test_the_cache_is_one_for_all_dialects_dimensions_and_kinds_of_input(client: httpx.AsyncClient) -> None:
    await client.post("/embed", json={"inputs": TEXTS})
    before = await computed(client)
    for path, body in (
        ("/v1/embeddings", {"input": TEXTS, "encoding_format": "base64"}),
        ("/api/embed", {"model": "x", "input": TEXTS}),
        ("/v2/embed", {"model": "x", "texts": TEXTS, "input_type": "search_document", "embedding_types": ["int8"]}),
        ("/embed", {"inputs": TEXTS, "normalize": False}),
        ("/v1/rerank", {"query": TEXTS[0], "documents": TEXTS}),
    ):
        answer = await client.post(path, json=body)
        assert answer.status_code == 200, answer.text
        assert int(answer.headers["x-cached-tokens"]) > 0
    ids = [token["id"] for token in (await client.post("/tokenize", json={"inputs": TEXTS[0]})).json()[0]]
    assert (await client.post("/embed", json={"inputs": [ids]})).headers["x-cached-inputs"] == "1"
    assert await computed(client) == before


async def test_no_store_neither_reads_nor_keeps(client: httpx.AsyncClient) -> None:
    await embed(client, TEXTS, {"Cache-Control": "max-age=0, No-Store"})
    second = await embed(client, TEXTS)
    assert "x-cached-inputs" not in second.headers
    third = await embed(client, TEXTS, {"Cache-Control": "no-store"})
    assert "x-cached-inputs" not in third.headers


async def test_no_cache_computes_anew_and_keeps(client: httpx.AsyncClient) -> None:
    await embed(client, TEXTS)
    before = await computed(client)
    await embed(client, TEXTS, {"Cache-Control": "no-cache"})
    assert await computed(client) == before + 2
    assert (await embed(client, TEXTS)).headers["x-cached-inputs"] == "2"


async def test_a_text_that_was_cut_is_cut_again_or_refused(client: httpx.AsyncClient) -> None:
    long = "word " * 600
    first = await embed(client, [long])
    second = await embed(client, [long])
    assert second.headers["x-cached-inputs"] == "1"
    assert second.json()["usage"] == {
        **first.json()["usage"],
        "prompt_tokens_details": {"cached_tokens": first.json()["usage"]["prompt_tokens"]},
    }
    assert second.headers["x-truncated-inputs"] == "0"
    refused = await client.post("/embed", json={"inputs": [long], "truncate": False})
    assert refused.status_code == 400
    shorter = await embed(client, [long], truncate_prompt_tokens=20)
    assert "x-cached-inputs" not in shorter.headers


async def test_forgetting_texts_costs_tokenizing_and_nothing_else(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    await embed(client, TEXTS)
    monkeypatch.setattr(cache_lookup.TextMemory, "get", lambda self, digest: None)
    before = await computed(client)
    assert (await embed(client, TEXTS)).headers["x-cached-inputs"] == "2"
    assert await computed(client) == before


async def test_it_is_counted_everywhere(client: httpx.AsyncClient) -> None:
    before = (await client.get("/stats")).json()
    for _ in range(2):
        await embed(client, TEXTS)
    after = (await client.get("/stats")).json()
    assert after["texts_cached"] - before["texts_cached"] == 2
    assert after["texts_computed"] - before["texts_computed"] == 2
    assert after["cache"]["hits"] == after["texts_cached"]
    metrics = (await client.get("/metrics")).text
    counted = re.findall(r"^vecmill_cached_texts_total\{.*\} (\d+)", metrics, re.M)
    assert sum(map(int, counted)) == after["texts_cached"]
    for name in ("entries", "bytes", "dropped_total", "lost_total", "failing"):
        assert f"vecmill_cache_{name} " in metrics
    facts = (await client.get("/cache")).json()
    assert (facts["enabled"], facts["failing"], facts["max_bytes"]) == (True, False, ON["cache_max_bytes"])


async def test_a_client_that_left_has_not_lost_what_ran_for_it(client: httpx.AsyncClient) -> None:
    """A batch that was on the device when its client left is kept: the retry finds it."""
    texts = [f"{number} " + "word " * 200 for number in range(16)]
    before = await computed(client)
    leaving = asyncio.create_task(embed(client, texts))
    while await computed(client) == before:
        await asyncio.sleep(0)
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    again = await embed(client, texts)
    assert int(again.headers["x-cached-inputs"]) > 0
    assert await computed(client) == before + 16


async def test_queries_can_be_kept_out_and_nothing_of_them_stays() -> None:
    async with serving(**ON, cache_queries=False) as client:
        for body in (
            {"inputs": TEXTS, "is_query": True},
            {"inputs": TEXTS, "prompt_name": "query"},
        ):
            for _ in range(2):
                answer = await client.post("/embed", json=body)
                assert answer.status_code == 200
                assert "x-cached-inputs" not in answer.headers
        ranked = {"query": "who lives in Berlin", "documents": TEXTS}
        await client.post("/v1/rerank", json=ranked)
        again = await client.post("/v1/rerank", json=ranked)
        assert 0 < int(again.headers["x-cached-tokens"]) < int(again.headers["x-compute-tokens"])


async def test_without_a_cache_nothing_is_kept(tmp_path: Path) -> None:
    async with serving(cache_max_bytes=0, state_dir=tmp_path) as client:
        for _ in range(2):
            assert "x-cached-inputs" not in (await embed(client, TEXTS)).headers
        assert (await client.get("/cache")).json() == {"enabled": False}
        assert (await client.get("/stats")).json()["cache"] is None
        assert (await client.delete("/cache")).json() == {"deleted": 0}
    assert not (tmp_path / "cache.db").exists()


async def test_another_prompt_model_or_dtype_never_gets_the_old_vector(tmp_path: Path, minilm_folder: Path) -> None:
    """One state folder, several lives. The tiny models have the same tokenizer, so the token ids are the same."""
    state = {**ON, "state_dir": tmp_path / "state"}
    models = {
        "one": {"embed_model": str(tiny_bert(tmp_path / "a" / "tiny", minilm_folder, prompts={"query": "q: "}))},
        "same name, other weights": {"embed_model": str(tiny_bert(tmp_path / "b" / "tiny", minilm_folder, seed=1))},
        "other pooling": {"embed_model": str(tiny_bert(tmp_path / "c" / "tiny", minilm_folder, pooling="cls_token"))},
    }
    for name, flags in models.items():
        async with serving(**state, **flags) as client:
            assert "x-cached-inputs" not in (await embed(client, TEXTS)).headers, name
            await wait_until_written(client, 2)
    async with serving(**state, **models["one"], dtype="bfloat16") as client:
        assert "x-cached-inputs" not in (await embed(client, TEXTS)).headers
    async with serving(**state, **models["one"]) as client:
        query = await client.post("/embed", json={"inputs": TEXTS, "is_query": True})
        assert "x-cached-inputs" not in query.headers
        assert (await embed(client, TEXTS)).headers["x-cached-inputs"] == "2"


async def wait_until_written(client: httpx.AsyncClient, entries: int) -> None:
    while (await client.get("/cache")).json()["written"] < entries:
        await asyncio.sleep(0.001)


async def test_only_the_admin_empties_it_where_there_are_keys() -> None:
    keys = {"api_key": "person:the-key-of-a-person", "cache_max_bytes": 1_000_000}
    async with serving(**keys, admin_api_key="the-key-of-the-admin") as client:
        assert (await client.delete("/cache")).status_code == 401
        refused = await client.delete("/cache", headers={"Authorization": "Bearer the-key-of-a-person"})
        assert refused.status_code == 403
        assert "ADMIN_API_KEY" in refused.text
        admin = {"Authorization": "Bearer the-key-of-the-admin"}
        assert (await client.delete("/cache", headers=admin)).json() == {"deleted": 0}
        await embed(client, TEXTS, admin)
    async with serving(**keys) as client:
        refused = await client.delete("/cache", headers={"Authorization": "Bearer the-key-of-a-person"})
        assert refused.status_code == 403


async def test_a_folder_that_cannot_be_written_is_no_reason_not_to_serve(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    async with serving(**ON, state_dir=file) as client:
        for _ in range(2):
            assert "x-cached-inputs" not in (await embed(client, TEXTS)).headers
        health = (await client.get("/health")).json()
        assert (health["status"], health["state"]["ok"], health["cache"]["enabled"]) == ("ok", False, False)
        assert "cannot be written" in health["state"]["message"]


async def test_a_folder_that_is_edited_in_place_gives_no_old_vector(tmp_path: Path, minilm_folder: Path) -> None:
    folder = tiny_bert(tmp_path / "models--o--m" / "snapshots" / ("0" * 40), minilm_folder)
    flags = {**ON, "embed_model": str(folder), "state_dir": str(tmp_path / "state")}
    async with serving(**flags) as client:
        await embed(client, TEXTS)
    async with serving(**flags) as client:  # as it was: nothing is computed again
        assert (await embed(client, TEXTS)).headers["x-cached-inputs"] == "2"
    edit_json(folder / "config.json", hidden_act="relu")
    async with serving(**flags) as client:
        actual = vectors(await embed(client, TEXTS))
    np.testing.assert_allclose(actual, st_encode(folder, TEXTS), atol=1e-5)
