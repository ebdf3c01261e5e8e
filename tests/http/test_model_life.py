"""Models at run time: loaded by requests and by an admin, unloaded, fetched; what is said of them, and who may."""

from __future__ import annotations

import asyncio
import random
import shutil
import threading
from collections import Counter
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import httpx
import pytest

from tests.conftest import serving
from tests.hub_server import COMMIT, NAME, hub_here
from tests.models.loaded import GOLDEN
from tests.tiny_checkpoints import tiny_bert, tiny_cross_encoder
from vecmill.models.hub import fetch, plan
from vecmill.models.weight_files import read_header

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
RERANKER = GOLDEN / "qwen3" / "reranker"
ADMIN, USER = "admin-key-of-16-chars", "user-key-of-16-chars!"
TEXT = "The quick brown fox jumps over the lazy dog."


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, minilm_folder: Path) -> Path:
    """A model's folder; who changes it puts it back."""
    return tiny_bert(tmp_path_factory.mktemp("models") / "tiny", minilm_folder)


@pytest.fixture(scope="module")
async def serving_all(tiny: Path) -> AsyncIterator[httpx.AsyncClient]:
    async with serving(embed_model=f"auto,{tiny}", rerank_model=str(RERANKER)) as client:
        yield client


@pytest.fixture
async def client(serving_all: httpx.AsyncClient) -> httpx.AsyncClient:
    """One server for most tests of this file, which begin with all of its models loaded."""
    for name in (MINILM, "tiny", "reranker"):
        await serving_all.post("/models/load", json={"model": name})
        await until(serving_all, name, "loaded")
    return serving_all


async def model(client: httpx.AsyncClient, name: str) -> dict[str, Any]:
    listed: list[dict[str, Any]] = (await client.get("/dashboard/models")).json()["models"]
    return next((one for one in listed if one["id"] == name), {"state": "not listed", "message": ""})


async def until(client: httpx.AsyncClient, name: str, state: str) -> dict[str, Any]:
    """Wait for a state that is not on its way to another."""
    async with asyncio.timeout(60):
        while (found := await model(client, name))["state"] != state or (state == "unloaded" and found["message"]):
            await asyncio.sleep(0.01)
    return found


async def in_memory(client: httpx.AsyncClient) -> set[str]:
    return {one["name"] for one in (await client.get("/api/ps")).json()["models"]}


async def vector(client: httpx.AsyncClient, name: str, text: str = TEXT) -> list[float]:
    answer = await client.post("/v1/embeddings", json={"model": name, "input": text})
    assert answer.status_code == 200, answer.text
    found: list[float] = answer.json()["data"][0]["embedding"]
    return found


def lasting(answer: Any) -> Any:
    """An answer without what each has of its own."""
    if isinstance(answer, dict):
        return {key: lasting(value) for key, value in answer.items() if key not in ("id", "created")}
    return [lasting(each) for each in answer] if isinstance(answer, list) else answer


async def test_a_model_is_unloaded_and_loaded_again_by_the_next_request_that_names_it(
    client: httpx.AsyncClient,
) -> None:
    """Embedding, reranking, a similarity, tokens: each loads what it needs, and the numbers are those of before."""
    rerank = {"query": TEXT, "documents": ["a fox", "a dog"]}
    asked: list[tuple[str, str, dict[str, Any]]] = [
        ("tiny", "/v1/embeddings", {"model": "tiny", "input": TEXT}),
        ("tiny", "/v1/rerank", {"model": "tiny", **rerank}),
        ("tiny", "/tokenize", {"model": "tiny", "inputs": TEXT}),
        ("reranker", "/v1/rerank", rerank),
    ]
    for name, path, body in asked:
        before = await client.post(path, json=body)
        assert before.status_code == 200, before.text
        answer = await client.post("/models/unload", json={"model": name})
        assert (answer.status_code, answer.json()["id"], answer.json()["state"]) == (202, name, "unloaded")
        unloaded = await until(client, name, "unloaded")
        assert (unloaded["memory_bytes"], unloaded["loaded_at"]) == (None, None)
        assert name not in await in_memory(client)
        after = await client.post(path, json=body)
        assert lasting(after.json()) == lasting(before.json())
        assert (await until(client, name, "loaded"))["memory_bytes"] > 0
    # Models that are on demand are listed as before, loaded or not.
    await client.post("/models/unload", json={"model": "tiny"})
    assert "tiny" in {one["id"] for one in (await client.get("/v1/models")).json()["data"]}
    assert (await client.get("/health")).status_code == 200
    assert (await client.get("/capabilities")).json()["forward_passes"]["tiny"]["max_batch_tokens"] > 0


async def test_what_is_said_of_each_model(client: httpx.AsyncClient) -> None:
    listed = (await client.get("/dashboard/models")).json()["models"]
    assert [(one["id"], one["task"], one["state"]) for one in listed[:3]] == [
        (MINILM, "embed", "loaded"),
        ("tiny", "embed", "loaded"),
        ("reranker", "rerank", "loaded"),
    ]
    bundled = listed[0]
    assert (bundled["dimensions"], bundled["dtype"], bundled["max_tokens"]) == ([384], "float32", 256)
    assert bundled["memory_bytes"] > 80_000_000
    assert (bundled["progress"], bundled["pinned"]) == (None, False)
    assert bundled["budget"]["tokens"] > 0
    assert bundled["fit"]["b_us_per_token"] > 0
    await vector(client, MINILM)
    assert (await model(client, MINILM))["last_used"] == pytest.approx(datetime.now(UTC).timestamp(), abs=60)
    await client.post("/models/unload", json={"model": "tiny"})
    await until(client, "tiny", "unloaded")
    metrics = (await client.get("/metrics")).text
    assert f'vecmill_model_loaded{{model="{MINILM}",task="embed"}} 1.0' in metrics
    assert 'vecmill_model_loaded{model="tiny",task="embed"} 0.0' in metrics
    assert 'vecmill_model_memory_bytes{model="tiny",task="embed"} 0.0' in metrics


async def test_keep_alive_as_ollama_has_it(client: httpx.AsyncClient) -> None:
    async def ask(path: str, **fields: Any) -> httpx.Response:
        return await client.post(path, json={"model": "tiny:latest", **fields})

    async def stays() -> timedelta:
        [loaded] = [one for one in (await client.get("/api/ps")).json()["models"] if one["name"] == "tiny"]
        assert (loaded["size"], loaded["size_vram"]) == ((await model(client, "tiny"))["memory_bytes"], 0)
        return datetime.fromisoformat(loaded["expires_at"]) - datetime.now(UTC)

    assert await stays() > timedelta(days=36_500)
    assert (await ask("/api/embed", input=TEXT, keep_alive="10m")).status_code == 200
    assert timedelta(minutes=9) < await stays() <= timedelta(minutes=10)
    assert (await ask("/api/embed", input=TEXT)).status_code == 200  # says nothing: as before
    assert timedelta(minutes=9) < await stays() <= timedelta(minutes=10)
    assert (await ask("/api/embeddings", prompt=TEXT, keep_alive=-1)).status_code == 200
    assert await stays() > timedelta(days=36_500)
    assert (await ask("/api/embed", input=TEXT, keep_alive=0)).json()["embeddings"]
    await until(client, "tiny", "unloaded")
    # Nothing to embed: only the loading and the unloading are meant.
    assert (await ask("/api/embed", input=[])).json()["embeddings"] == []
    assert "tiny" in await in_memory(client)
    assert (await ask("/api/embeddings", keep_alive="0")).json() == {"embedding": []}
    unloaded = await until(client, "tiny", "unloaded")
    # Nor is it loaded only to be unloaded.
    assert (await ask("/api/embeddings", keep_alive=0)).json() == {"embedding": []}
    assert (await ask("/api/embed", input="", keep_alive="0s")).json()["embeddings"] == []
    assert await model(client, "tiny") == unloaded
    wrongs: tuple[object, ...] = ("soon", "5 minutes", True, {})
    for wrong in wrongs:
        answer = await ask("/api/embed", input=TEXT, keep_alive=wrong)
        assert answer.status_code == 400
        assert "keep_alive" in answer.json()["error"]


async def test_a_model_in_use_is_not_unloaded(client: httpx.AsyncClient) -> None:
    texts = [f"{TEXT} {number}" for number in range(300)]
    work = asyncio.create_task(client.post("/v1/embeddings", json={"model": MINILM, "input": texts}))
    async with asyncio.timeout(30):
        while (answer := await client.post("/models/unload", json={"model": MINILM})).status_code != 409:
            await until(client, MINILM, "loaded")  # it was there before the request, which has it loaded again
    assert "in use" in answer.json()["error"]["message"]
    assert (await work).status_code == 200
    assert (await client.post("/models/unload", json={"model": MINILM})).status_code == 202


async def test_a_model_that_cannot_be_loaded_fails_alone(client: httpx.AsyncClient, tiny: Path) -> None:
    before = await vector(client, "tiny")
    await client.post("/models/unload", json={"model": "tiny"})
    await until(client, "tiny", "unloaded")
    (tiny / "model.safetensors").rename(tiny / "away")
    answer = await client.post("/v1/embeddings", json={"model": "tiny", "input": TEXT})
    assert answer.status_code == 503
    assert "tiny could not be loaded" in answer.json()["error"]["message"]
    assert str(tiny) not in answer.text
    failed = await until(client, "tiny", "failed")
    assert "safetensors" in failed["message"]
    assert (await client.get("/health")).status_code == 200
    await vector(client, MINILM)
    (tiny / "away").rename(tiny / "model.safetensors")
    assert (await client.post("/models/load", json={"model": "tiny"})).json()["state"] in ("loading", "loaded")
    assert await vector(client, "tiny") == before


async def test_other_weights_in_the_same_folder_are_another_model(
    client: httpx.AsyncClient, tiny: Path, tmp_path: Path, minilm_folder: Path
) -> None:
    before, revision = await vector(client, "tiny"), (await model(client, "tiny"))["revision"]
    await client.post("/models/unload", json={"model": "tiny"})
    await until(client, "tiny", "unloaded")
    other = tiny_bert(tmp_path / "other", minilm_folder, seed=1)
    shutil.copy(tiny / "model.safetensors", tmp_path)
    shutil.copy(other / "model.safetensors", tiny)
    assert await vector(client, "tiny") != before
    assert (await model(client, "tiny"))["revision"] != revision
    shutil.copy(tmp_path / "model.safetensors", tiny)
    await client.post("/models/unload", json={"model": "tiny"})
    await until(client, "tiny", "unloaded")
    assert await vector(client, "tiny") == before


async def test_only_an_admin_loads_unloads_and_fetches(tiny: Path) -> None:
    keys = f"boss:{ADMIN} scopes=use+admin,user:{USER}"
    async with serving(embed_model=f"auto,{tiny}", api_key=keys) as client:
        client.headers["authorization"] = f"Bearer {USER}"
        for call in ("load", "unload", "pull"):
            answer = await client.post(f"/models/{call}", json={"model": "tiny"})
            assert answer.status_code == 403
            assert "`admin`" in answer.json()["error"]["message"]
        # Nor by the way of Ollama, which would take the model from the other key's requests.
        await client.post("/api/embed", json={"model": "tiny", "input": TEXT, "keep_alive": 0})
        await asyncio.sleep(0.1)
        assert (await until(client, "tiny", "loaded"))["state"] == "loaded"
        client.headers["authorization"] = f"Bearer {ADMIN}"
        await client.post("/api/embed", json={"model": "tiny", "input": TEXT, "keep_alive": 0})
        await until(client, "tiny", "unloaded")
        client.headers["authorization"] = "Bearer nobody"
        assert (await client.get("/dashboard/models")).status_code == 401
        assert (await client.post("/models/load", json={"model": "tiny"})).status_code == 401


NO_NAMES = ("/etc", "../tiny", "~/tiny", ".", "owner/../../etc", "http://127.0.0.1/x", "-x/y", "\x00", "a" * 200 + "/b")


async def test_a_name_is_never_a_path_or_an_address(client: httpx.AsyncClient) -> None:
    for name in (*NO_NAMES, "nobody/nothing"):
        for call in ("load", "unload"):
            assert (await client.post(f"/models/{call}", json={"model": name})).status_code == 404, name
    for name in NO_NAMES:
        answer = await client.post("/models/pull", json={"model": name})
        assert answer.status_code == 400
        assert "`owner/name`" in answer.json()["error"]["message"]
        answer = await client.post("/models/pull", json={"model": "owner/tiny", "revision": f"{name}/../.."})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "revision")
    bodies: tuple[dict[str, object], ...] = (
        {},
        {"model": ""},
        {"model": 1},
        {"model": "x" * 1000},
        {"model": "tiny", "task": "sing"},
    )
    for wrong in bodies:
        assert (await client.post("/models/load", json=wrong)).status_code == 400


async def test_a_folder_beside_the_server_is_not_read(
    client: httpx.AsyncClient, tmp_path: Path, minilm_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hub id may be a folder's path too, which the settings may name and a request may not."""
    tiny_bert(tmp_path / "owner" / "model", minilm_folder)
    monkeypatch.chdir(tmp_path)
    assert (await client.post("/models/load", json={"model": "owner/model"})).status_code == 404


BROKEN_CONFIGS = (
    b"",
    b"\xff\xfe",
    b"null",
    b"[" * 100_000,
    b'{"model_type": ["bert"]}',
    b'{"model_type": "bert"}',
    b'{"model_type": "bert", "max_position_embeddings": "many"}',
    b'{"model_type": "bert", "max_position_embeddings": 1e999, "hidden_size": -1}',
    b'{"model_type": "xlm-roberta", "max_position_embeddings": 512, "pad_token_id": "x", "architectures": 5}',
    b'{"model_type": "qwen3", "max_position_embeddings": {}, "architectures": [[]], "rope_scaling": 3}',
)


async def faulty(name: str, revision: str | None, task: object) -> None:
    raise RecursionError("a secret")


async def test_a_model_with_broken_files_is_refused_and_hides_no_other(
    client: httpx.AsyncClient, tmp_path: Path, minilm_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_bert(tmp_path / "there", minilm_folder)
    catalogue = cast(Any, client)._transport.app.state.services.catalogue()
    with hub_here(tmp_path / "cache") as hub:
        hub.files = {
            path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
        }
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        cached = fetch(plan(NAME, hf_token=None), hf_token=None, revision=None, report=lambda fetched, complete: None)
        config = cached / "config.json"
        for broken in BROKEN_CONFIGS:
            config.unlink()
            config.write_bytes(broken)
            answer = await client.post("/models/load", json={"model": NAME})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "model"), broken
            await catalogue.look_around()
        adapter = cached / "adapter_config.json"
        adapter.write_bytes(b"[" * 100_000)
        answer = await client.post("/models/load", json={"model": NAME})
        assert (answer.status_code, "is a PEFT adapter's" in answer.text) == (400, True)
        for header in (b"[" * 100_000, b"[[]]", b"5"):
            damaged = tmp_path / "damaged.safetensors"
            damaged.write_bytes(len(header).to_bytes(8, "little") + header)
            with pytest.raises(ValueError, match="the header of damaged"):
                read_header(damaged)
        config.unlink()
        config.mkdir()  # and what no reader of its files foresees:
        monkeypatch.setattr(catalogue, "_find_cached", faulty)
        answer = await client.post("/models/load", json={"model": NAME})
        assert (answer.status_code, "secret" in answer.text) == (400, False)
        await catalogue.look_around()
        monkeypatch.undo()
        assert (await client.post("/models/load", json={"model": NAME})).status_code in (400, 404)
        await catalogue.look_around()
    assert (await model(client, NAME))["state"] == "not listed"


async def test_what_fits_is_loaded_at_the_start_and_the_rest_when_it_is_asked_for(
    tiny: Path, tmp_path: Path, minilm_folder: Path
) -> None:
    other = tiny_cross_encoder(tmp_path / "pairs", kind="bert", tokenizer_from=minilm_folder)
    async with serving(embed_model=f"auto,{tiny}", rerank_model=str(other), max_loaded_gb=0.091) as client:
        assert await in_memory(client) == {MINILM}
        assert [one["id"] for one in (await client.get("/v1/models")).json()["data"]] == [MINILM, "tiny", "pairs"]
        assert (await client.get("/health")).json()["rerank_method"] == "cross_encoder"
        answered = asyncio.create_task(vector(client, "tiny"))
        while not answered.done():  # whatever is known of the model by then
            assert (await client.get("/capabilities")).status_code == 200
        assert len(await answered) == 32
        assert await in_memory(client) == {"tiny"}
        answer = await client.post("/v1/rerank", json={"query": TEXT, "documents": ["a", "b"]})
        assert (answer.status_code, answer.json()["model"]) == (200, "pairs")
        assert await in_memory(client) == {"tiny", "pairs"}
        assert len(await vector(client, MINILM)) == 384
        assert await in_memory(client) == {MINILM}


async def test_retry_after_is_that_of_the_models_that_are_loaded_now(tiny: Path) -> None:
    """The bundled model is loaded in place of one that is an order of magnitude faster."""
    texts = [f"{TEXT} {number}" for number in range(2000)]
    limits = {"max_loaded_gb": 0.091, "queue_timeout": 0, "max_queued_tokens": 2048}
    async with serving(embed_model=f"{tiny},auto", **limits) as client:
        await vector(client, MINILM)
        assert await in_memory(client) == {MINILM}
        rates = {
            name: passes["best_tokens_per_second"]
            for name, passes in (await client.get("/capabilities")).json()["forward_passes"].items()
        }
        assert rates["tiny"] > 5 * rates[MINILM]
        body = {"model": MINILM, "input": texts}
        both = [asyncio.create_task(client.post("/v1/embeddings", json=body)) for _ in range(2)]
        [refused], [work] = await asyncio.wait(both, timeout=30, return_when=asyncio.FIRST_COMPLETED)
        work.cancel()
        answer = refused.result()
        assert answer.status_code == 503
        assert int(answer.headers["Retry-After"]) > 0.5 * len(texts) * 14 / rates[MINILM]


async def test_a_model_is_fetched_and_then_loaded(
    tmp_path: Path, minilm_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_bert(tmp_path / "there", minilm_folder)
    with hub_here(tmp_path / "cache") as hub:
        hub.files = {
            path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
        }
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        async with serving(max_loaded_gb=1) as client:
            assert (await client.post("/models/load", json={"model": NAME})).status_code == 404
            answer = await client.post("/models/pull", json={"model": NAME})
            assert (answer.status_code, answer.json()["state"]) == (202, "pulling")
            assert answer.json().keys() == (await model(client, MINILM)).keys()
            assert (await client.post("/models/pull", json={"model": "owner/other"})).status_code == 409
            fetched = await until(client, NAME, "unloaded")
            assert (fetched["task"], fetched["dimensions"], fetched["revision"]) == ("embed", [32], COMMIT)
            # Requests may name it once an admin has had it loaded; until then any name means the model of the settings.
            assert len(await vector(client, NAME)) == 384
            assert (await client.post("/models/load", json={"model": NAME})).status_code == 202
            await until(client, NAME, "loaded")
            assert len(await vector(client, NAME)) == 32
            assert len(await vector(client, "any other name")) == 384
            await client.post("/models/unload", json={"model": NAME})
            await until(client, NAME, "unloaded")
            assert len(await vector(client, NAME)) == 32
            # What is not there is said with the hub's sentence.
            await client.post("/models/pull", json={"model": "owner/other"})
            assert "no such model" in (await until(client, "owner/other", "failed"))["message"]
        async with serving() as client:  # whole in the cache: listed after the next start, too
            await until(client, NAME, "unloaded")


async def test_a_stop_does_not_wait_for_a_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    goes_on = threading.Event()
    with hub_here(tmp_path) as hub:
        hub.interrupt = lambda: cast(None, goes_on.wait(60))
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        async with asyncio.timeout(45):
            async with serving() as client:
                await client.post("/models/pull", json={"model": NAME})
                while "model.safetensors" not in hub.fetched():
                    await asyncio.sleep(0.05)
        goes_on.set()


@pytest.mark.nightly
@pytest.mark.parametrize("seed", [1, 2])
async def test_requests_while_models_come_and_go_at_random(tiny: Path, seed: int) -> None:
    """200 requests for two models that an admin loads and unloads meanwhile: each is right, or says what to do."""
    choose = random.Random(seed)
    texts = [f"text number {number}" for number in range(5)]
    async with serving(embed_model=f"auto,{tiny}", max_loaded_gb=choose.choice([0.091, 1.0])) as client:
        expected = {(name, text): await vector(client, name, text) for name in (MINILM, "tiny") for text in texts}
        outcomes: Counter[int] = Counter()

        async def ask() -> None:
            await asyncio.sleep(3 * choose.random())
            name, text = choose.choice([MINILM, "tiny"]), choose.choice(texts)
            body = {"model": name, "input": text, "keep_alive": choose.choice([None, None, None, 0, "1s"])}
            answer = await client.post("/api/embed", json=body)
            outcomes[answer.status_code] += 1
            if answer.status_code == 200:
                assert answer.json()["embeddings"][0] == pytest.approx(expected[name, text], abs=1e-5)
            else:
                assert answer.status_code in (409, 503)
                assert answer.headers["Retry-After"]

        async def meddle() -> None:
            for _ in range(15):
                await asyncio.sleep(choose.random() / 5)
                call, name = choose.choice(["load", "unload"]), choose.choice([MINILM, "tiny"])
                answer = await client.post(f"/models/{call}", json={"model": name})
                assert answer.status_code in (202, 409)

        async with asyncio.timeout(150):
            await asyncio.gather(meddle(), *(ask() for _ in range(200)))
        assert outcomes[200] >= 190, outcomes
