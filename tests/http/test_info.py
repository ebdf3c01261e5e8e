"""/v1/models, /capabilities, /health, /stats, /metrics, /docs: the fields that people and clients read."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import serving
from tests.tiny_checkpoints import tiny_bert
from vecmill.core import calibration
from vecmill.engine import warmup

MINILM = "sentence-transformers/all-MiniLM-L6-v2"


async def test_models(client: httpx.AsyncClient) -> None:
    [model] = (await client.get("/v1/models")).json()["data"]
    assert {"id", "object", "created", "owned_by"} <= set(model)
    assert (model["id"], model["dimensions"], model["max_model_len"]) == (MINILM, 384, 256)
    assert (await client.get(f"/v1/models/{MINILM}")).json() == model
    missing = await client.get("/v1/models/gpt-4")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")


async def test_capabilities(client: httpx.AsyncClient) -> None:
    found = (await client.get("/capabilities")).json()
    fields = "version gpu_total_mb gpu_allocated_mb gpu_reserved_mb gpu_available_mb model_memory_mb max_batch_size"
    assert {*fields.split(), "recommended_batch_size", "gpu_busy"} <= set(found)
    assert found["recommended_batch_size"] in range(8, 65, 8)
    assert found["gpu_total_mb"] is None  # not available is not zero
    assert found["model_memory_mb"] == 86
    costs = found["forward_passes"][MINILM]
    measured = [point["tokens"] for point in costs["measured"]]
    assert measured == sorted(measured, reverse=True)  # the largest shape first
    assert costs["us_per_token"] > 0
    assert 0 < costs["max_batch_tokens"] <= measured[0]
    assert costs["free_tokens"] == 0  # on a CPU, where a search runs between two layers of bulk
    assert found["max_batch_tokens"] == costs["max_batch_tokens"]
    assert (costs["compiled"], costs["compile_reason"]) == (False, "eager: TORCH_COMPILE=false")
    assert costs["cuda_graphs"] == {"count": 0, "max_tokens": 0, "memory_mb": 0}


async def test_the_fit_follows_what_passes_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """Warm-up that ran beside other work is not what budgets go by for ever."""
    monkeypatch.setattr(calibration, "REFIT_SECONDS", 0.0)
    right = calibration.fit
    monkeypatch.setattr(
        warmup, "fit", lambda measured: right([(tokens, 0.02 + 0.01 * tokens) for tokens, _ in measured])
    )
    async with serving(max_batch_tokens=2048) as client:

        async def fit() -> tuple[float, int, float, int]:
            found = (await client.get("/capabilities")).json()
            costs = found["forward_passes"][MINILM]
            [shown] = (await client.get("/dashboard/models")).json()["models"]
            assert shown["fit"]["changed_at"] == pytest.approx(costs["changed_at"], abs=0.01)
            assert found["max_batch_tokens"] == costs["max_batch_tokens"] == shown["budget"]["tokens"]
            expected = costs["fixed_ms"] + costs["us_per_token"] * 64 / 1000
            return expected, costs["max_batch_tokens"], costs["changed_at"], found["recommended_batch_size"]

        slow, few, since, small = await fit()
        for turn in range(60):
            texts = [f"{turn} {number} is what these few words are about" for number in range(8)]
            assert (await client.post("/embed", json={"inputs": texts})).status_code == 200
        fast, many, changed, large = await fit()
        assert fast < slow / 5
        assert many > few
        assert changed > since
        assert large >= small


async def test_health_has_the_fields_of_the_servers_before(client: httpx.AsyncClient) -> None:
    found = (await client.get("/health")).json()
    fields = "status version model dimensions dtype device max_batch_size gpu_memory_allocated_mb"
    assert {*fields.split(), "gpu_memory_reserved_mb", "models", "cuda_available"} <= set(found)
    assert (found["model"], found["dtype"], found["dtype_reason"]) == (MINILM, "float32", "DTYPE=float32")
    assert found["rerank_method"] == "cosine"


async def test_stats_count_what_was_done() -> None:
    async with serving() as client:
        await client.post("/embed", json={"inputs": ["hello world"] * 5})
        await client.post("/v1/rerank", json={"query": "q", "documents": ["a", "b"]})
        await client.post("/embed", json={"inputs": []})
        found = (await client.get("/stats")).json()
        assert (found["requests"], found["texts_embedded"]) == (2, 7)
        assert (found["errors"], found["refused"], found["client_errors"]) == (0, 0, 1)
        assert found["tokens_embedded"] == 5 * 4 + 3 * 3
        assert found["texts_joined"] == 4  # equal texts in flight run once
        assert (found["queue_depth"], found["waiting"]) == (0, {"interactive": 0, "bulk": 0})
        assert 0 < found["p50_latency_ms"] <= found["p95_latency_ms"]
        assert (found["warmup_requests"] > 2, found["texts_per_second"] > 0) == (True, True)
        detailed = (await client.get("/stats/detailed")).json()
        assert detailed["sample_count"] == 2
        assert set(detailed["latency_ms"]) == {"total", "gpu", "queue", "tokenize", "overhead", "per_text_gpu"}
        assert {"min", "p50", "p95", "max"} <= set(detailed["latency_ms"]["total"])
        assert sum(int(rows) * count for rows, count in detailed["batch_sizes"]["distribution"].items()) == 1 + 3
        metrics = (await client.get("/metrics")).text
        samples = {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(metrics)
            for sample in family.samples
        }
        asked = {"dialect": "tei", "lane": "interactive", "model": MINILM, "operation": "embed", "outcome": "ok"}
        assert samples["vecmill_texts_total", tuple(asked.items())] == 5
        failed = asked | {"lane": "", "outcome": "refused"}
        assert samples["vecmill_requests_total", tuple(failed.items())] == 1
        assert samples["vecmill_errors_total", (("dialect", "tei"), ("error", "EmptyInput"), ("status", "400"))] == 1
        run = {"lane": "interactive", "model": MINILM, "outcome": "ok", "task": "embed"}
        assert samples["vecmill_batch_rows_sum", tuple(run.items())] == 4
        assert samples["vecmill_ready", ()] == 1


async def test_several_models_answer_to_their_names(tmp_path: Path, minilm_folder: Path) -> None:
    first = tiny_bert(tmp_path / "first", minilm_folder, seed=1)
    second = tiny_bert(tmp_path / "second", minilm_folder, seed=2)
    async with serving(embed_model=f"{first},{second}") as client:

        async def embed(**fields: object) -> httpx.Response:
            return await client.post("/v1/embeddings", json={"input": "a text", **fields})

        assert [model["id"] for model in (await client.get("/v1/models")).json()["data"]] == ["first", "second"]
        by_name = {name: (await embed(model=name)).json() for name in ("first", "second")}
        assert by_name["first"]["model"] == "first"
        assert by_name["first"]["data"] != by_name["second"]["data"]
        assert (await embed()).json()["data"] == by_name["first"]["data"]
        unknown = await embed(model="third")
        assert unknown.status_code == 404
        assert unknown.json()["error"]["code"] == "model_not_found"
        assert "first, second" in unknown.json()["error"]["message"]


async def test_the_docs_need_nothing_from_elsewhere(client: httpx.AsyncClient) -> None:
    page = (await client.get("/docs")).text
    assert "http://" not in page
    assert "https://" not in page
    assert (await client.get("/static-offline-docs/swagger-ui-bundle.js")).status_code == 200


async def test_a_request_id_is_echoed_or_made(client: httpx.AsyncClient) -> None:
    echoed = await client.get("/health", headers={"x-request-id": "abc-123"})
    assert echoed.headers["x-request-id"] == "abc-123"
    made = await client.get("/health", headers={"x-request-id": "bad id <b>"})
    assert made.headers["x-request-id"].isalnum()
    assert len(made.headers["x-request-id"]) == 16
