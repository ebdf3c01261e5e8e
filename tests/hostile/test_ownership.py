"""With keys, jobs, files and batches belong to the key that made them, and no answer tells of another key's texts."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from tests.conftest import serving
from tests.hostile.keys import ADMIN, ANN, BEN, KEYS, LOCKED, ask
from vecmill.core.types import Viewer

LINE = {"custom_id": "one", "method": "POST", "url": "/v1/embeddings", "body": {"input": "a secret of ann"}}
NOTHING = "0" * 32


@pytest.fixture(scope="module")
async def client() -> AsyncIterator[httpx.AsyncClient]:
    async with serving(**LOCKED) as client:
        yield client


async def job_of(client: httpx.AsyncClient, key: str, project: str = "secret project") -> str:
    answer = await ask(client, key, "POST", "/jobs", json={"project": project, "total_chunks": 10})
    assert answer.status_code == 200
    return str(answer.json()["job_id"])


async def file_of(client: httpx.AsyncClient, key: str) -> str:
    content = {"file": ("ann.jsonl", orjson.dumps(LINE)), "purpose": (None, "batch")}
    answer = await ask(client, key, "POST", "/v1/files", files=content)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


async def batch_of(client: httpx.AsyncClient, key: str, file_id: str) -> httpx.Response:
    body = {"input_file_id": file_id, "endpoint": "/v1/embeddings", "completion_window": "24h"}
    return await ask(client, key, "POST", "/v1/batches", json=body)


async def ended(client: httpx.AsyncClient, key: str, batch_id: str) -> dict[str, Any]:
    async with asyncio.timeout(60):
        while True:
            batch: dict[str, Any] = (await ask(client, key, "GET", f"/v1/batches/{batch_id}")).json()
            if batch["status"] in ("completed", "failed", "cancelled"):
                return batch
            await asyncio.sleep(0.02)


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/jobs/{}", None),
        ("POST", "/jobs/{}/progress", {"current": 1}),
        ("POST", "/jobs/{}/complete", None),
        ("POST", "/jobs/{}/fail", {"error": "x"}),
        ("POST", "/jobs/{}/cancel", None),
        ("DELETE", "/jobs/{}", None),
    ],
)
async def test_a_job_of_another_key_is_none(client: httpx.AsyncClient, method: str, path: str, body: object) -> None:
    job = await job_of(client, ANN)
    refused = await ask(client, BEN, method, path.format(job), json=body)
    missing = await ask(client, BEN, method, path.format("0" * 16), json=body)
    assert refused.status_code == missing.status_code == 404
    assert refused.json()["detail"].replace(job, "") == missing.json()["detail"].replace("0" * 16, "")
    assert (await ask(client, ANN, "GET", f"/jobs/{job}")).json()["status"] in ("active", "queued")
    assert (await ask(client, ADMIN, method, path.format(job), json=body)).status_code == 200


async def test_lists_and_events_show_a_keys_own_jobs(client: httpx.AsyncClient) -> None:
    await ask(client, ADMIN, "DELETE", "/jobs/recent")
    job, others = await job_of(client, ANN), await job_of(client, BEN)
    await ask(client, ANN, "POST", f"/jobs/{job}/complete")

    async def listed(key: str) -> set[str]:
        found = (await ask(client, key, "GET", "/jobs")).json()
        return {one["id"] for name in ("active", "queued", "recent") for one in found[name]}

    assert job in await listed(ANN)
    assert others not in await listed(ANN)
    assert others in await listed(BEN)
    assert job not in await listed(BEN)
    assert {job, others} <= await listed(ADMIN)
    queue = client._transport.app.state.services.jobs  # type: ignore[attr-defined]
    for owner, seen, unseen in (("name:ann", job, others), ("name:ben", others, job)):
        news = await anext(queue.follow(5.0, Viewer(owner)))
        ids = [orjson.loads(view)["id"] for view in news]
        assert seen in ids
        assert unseen not in ids


async def test_events_are_asked_for_with_the_key(client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stream has no end, so that it is only looked at who is said to follow."""
    asked = []
    queue = client._transport.app.state.services.jobs  # type: ignore[attr-defined]

    async def nothing() -> AsyncIterator[list[Any]]:
        return
        yield

    def follow(seconds: float, viewer: Viewer) -> AsyncIterator[list[Any]]:
        asked.append(viewer.owner)
        return nothing()

    monkeypatch.setattr(queue, "follow", follow)
    await ask(client, BEN, "GET", "/jobs/events")
    assert asked == ["name:ben"]


async def test_clearing_clears_ones_own(client: httpx.AsyncClient) -> None:
    await ask(client, ADMIN, "DELETE", "/jobs/recent")
    jobs = {key: await job_of(client, key) for key in (ANN, BEN)}
    for key, job in jobs.items():
        await ask(client, key, "POST", f"/jobs/{job}/complete")
    assert (await ask(client, BEN, "DELETE", "/jobs/recent")).json() == {"cleared": 1}
    assert (await ask(client, BEN, "DELETE", "/jobs/recent")).json() == {"cleared": 0}
    assert (await ask(client, BEN, "GET", f"/jobs/{jobs[BEN]}")).status_code == 404
    assert (await ask(client, ANN, "GET", f"/jobs/{jobs[ANN]}")).json()["status"] == "completed"
    later = await job_of(client, BEN)
    await ask(client, BEN, "POST", f"/jobs/{later}/complete")
    assert [one["id"] for one in (await ask(client, BEN, "GET", "/jobs")).json()["recent"]] == [later]
    assert (await ask(client, ADMIN, "DELETE", "/jobs/recent")).json() == {"cleared": 3}


async def test_the_old_progress_report_is_a_keys_own(client: httpx.AsyncClient) -> None:
    report = {"current": 3, "total": 9, "project": "secret project"}
    await ask(client, ANN, "POST", "/progress", json=report)
    assert (await ask(client, BEN, "GET", "/progress")).json() == {"current": 0, "total": 0, "project": ""}
    await ask(client, BEN, "DELETE", "/progress")
    assert (await ask(client, ANN, "GET", "/progress")).json() == report
    assert (await ask(client, ADMIN, "GET", "/progress")).json() == report


async def test_nobody_renews_anothers_lease(client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = client._transport.app.state.services.jobs  # type: ignore[attr-defined]
    monkeypatch.setattr("vecmill.jobs.queue.TOUCH_SECONDS", 0.0)
    job = await job_of(client, ANN)

    async def lease_after(key: str, **request: Any) -> float:
        await ask(client, key, "POST", **request)
        await asyncio.sleep(0.05)
        return float(jobs._store.ledger.open[job].lease_until)

    before = float(jobs._store.ledger.open[job].lease_until)
    tagged = {"headers": {"X-Job-ID": job}}
    assert await lease_after(BEN, path="/embed", json={"inputs": "x", "job_id": job}) == before
    assert await lease_after(BEN, path="/embed", json={"inputs": "x"}, **tagged) == before
    for path, body in (  # of its own on every route
        ("/embed", {"inputs": "x"}),
        ("/v1/embeddings", {"input": "x"}),
        ("/v1/rerank", {"query": "q", "documents": ["a"]}),
        ("/tokenize", {"inputs": "x"}),
        ("/api/embed", {"model": "m", "input": "x"}),
        ("/v2/embed", {"texts": ["x"]}),
    ):
        after = await lease_after(ANN, path=path, json=body, **tagged)
        assert after > before, path
        before = after


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/v1/files/{}"), ("GET", "/v1/files/{}/content"), ("DELETE", "/v1/files/{}")]
)
async def test_a_file_of_another_key_is_none(client: httpx.AsyncClient, method: str, path: str) -> None:
    file = await file_of(client, ANN)
    refused = await ask(client, BEN, method, path.format(file))
    missing = await ask(client, BEN, method, path.format(f"file-{NOTHING}"))
    assert refused.status_code == missing.status_code == 404
    assert refused.text.replace(file, "") == missing.text.replace(f"file-{NOTHING}", "")
    assert "secret" not in refused.text
    assert (await batch_of(client, BEN, file)).status_code == 404
    assert file not in (await ask(client, BEN, "GET", "/v1/files")).text
    assert (await ask(client, BEN, "GET", f"/v1/files?after={file}")).status_code == 400
    assert file in (await ask(client, ANN, "GET", "/v1/files")).text
    assert file in (await ask(client, ADMIN, "GET", "/v1/files")).text
    assert (await ask(client, ADMIN, method, path.format(file))).status_code == 200


async def test_a_batch_of_another_key_is_none_and_neither_are_its_results(client: httpx.AsyncClient) -> None:
    created = await batch_of(client, ANN, await file_of(client, ANN))
    batch = created.json()["id"]
    for method, path in (("GET", f"/v1/batches/{batch}"), ("POST", f"/v1/batches/{batch}/cancel")):
        refused = await ask(client, BEN, method, path)
        assert refused.status_code == 404
    assert batch not in (await ask(client, BEN, "GET", "/v1/batches")).text
    done = await ended(client, ANN, batch)
    assert done["status"] == "completed"
    output = f"/v1/files/{done['output_file_id']}/content"
    assert (await ask(client, ANN, "GET", output)).status_code == 200
    assert (await ask(client, BEN, "GET", output)).status_code == 404
    assert (await ask(client, ADMIN, "GET", output)).status_code == 200
    assert batch in (await ask(client, ADMIN, "GET", "/v1/batches")).text


async def test_owners_outlive_a_restart_and_what_has_none_is_the_admins(tmp_path: Path) -> None:
    state = {"state_dir": tmp_path / "state"}
    async with serving(**state) as client:
        unowned = await job_of(client, "no-key-is-needed"), await file_of(client, "no-key-is-needed")
    async with serving(**LOCKED, **state) as client:
        job, file = await job_of(client, ANN), await file_of(client, ANN)
        batch = (await batch_of(client, ANN, file)).json()["id"]
        await ended(client, ANN, batch)
    exchanged = KEYS.replace(ANN, "another-secret-of-ann")  # a named key keeps what it made
    async with serving(**{**LOCKED, "api_key": exchanged}, **state) as client:
        for path in (f"/jobs/{job}", f"/v1/files/{file}", f"/v1/batches/{batch}"):
            statuses = [
                (await ask(client, key, "GET", path)).status_code for key in ("another-secret-of-ann", BEN, ADMIN)
            ]
            assert statuses == [200, 404, 200], path
        for path in (f"/jobs/{unowned[0]}", f"/v1/files/{unowned[1]}"):
            statuses = [(await ask(client, key, "GET", path)).status_code for key in (BEN, ADMIN)]
            assert statuses == [404, 200], path
    async with serving(**state) as client:
        assert (await client.get(f"/v1/files/{file}")).status_code == 200  # without keys everybody sees everything


async def test_a_key_without_a_name_owns_by_its_value_not_by_its_place(tmp_path: Path) -> None:
    state = {"state_dir": tmp_path / "state"}
    async with serving(api_key=f"{ANN},{BEN}", **state) as client:
        job = await job_of(client, ANN)
    async with serving(api_key=f"{BEN},{ANN}", **state) as client:
        assert (await ask(client, BEN, "GET", f"/jobs/{job}")).status_code == 404
        assert (await ask(client, ANN, "GET", f"/jobs/{job}")).status_code == 200


TEXTS = ["a text that only ann knows", "and another one of hers"]
ON = {"cache_max_bytes": 10_000_000}


async def embedded(client: httpx.AsyncClient, key: str, texts: list[str] = TEXTS) -> httpx.Response:
    answer = await ask(client, key, "POST", "/v1/embeddings", json={"input": texts})
    assert answer.status_code == 200
    return answer


async def until_kept(client: httpx.AsyncClient, entries: int) -> None:
    async with asyncio.timeout(10):
        while (await ask(client, ADMIN, "GET", "/cache")).json()["written"] < entries:
            await asyncio.sleep(0.01)


TELLING = re.compile(
    r"cached|inference-time|queue-time|tokenization-time|compute-time|(tokenize|queue|forward);dur", re.IGNORECASE
)


async def test_a_hit_of_another_keys_text_is_not_told_and_one_of_ones_own_is() -> None:
    async with serving(**LOCKED, **ON) as client:
        mine = await embedded(client, ANN)
        await until_kept(client, 2)
        before = {path: (await ask(client, BEN, "GET", path)).text for path in ("/cache", "/stats", "/metrics")}
        guessed, missed = await embedded(client, BEN), await embedded(client, BEN, ["nobody has sent", "this before"])
        assert set(guessed.headers) == set(missed.headers)
        assert not TELLING.search(str(guessed.headers) + str(guessed.json()["usage"]))
        assert guessed.json()["data"] == mine.json()["data"]
        assert (await ask(client, ADMIN, "GET", "/cache")).json()["hits"] == 2  # it was one all the same
        assert before["/cache"] == (await ask(client, BEN, "GET", "/cache")).text == '{"enabled":true}'
        stats = (await ask(client, BEN, "GET", "/stats")).json()
        assert [stats[name] for name in ("texts_cached", "tokens_cached", "texts_computed", "cache")] == [None] * 4
        shown = (await ask(client, BEN, "GET", "/metrics")).text
        assert not re.search(
            r"vecmill_(cache|computed|joined|batch_(rows|tokens|fill|duration)|request_(queue|tokenize|forward))"
            r"|process_cpu",
            shown,
        )
        assert "vecmill_requests_total" in shown
        assert "vecmill_computed_texts_total" in (await ask(client, ADMIN, "GET", "/metrics")).text
        detailed = (await ask(client, BEN, "GET", "/stats/detailed")).json()
        assert detailed["latency_ms"]["gpu"]["mean"] is None
        assert detailed["batch_sizes"] == {"distribution": {}, "recent_avg": None}
        again = await embedded(client, ANN)
        assert again.headers["x-cached-inputs"] == "2"
        assert (await embedded(client, BEN)).headers["x-cached-inputs"] == "2"  # by now he has sent them too


async def test_ranked_by_cosine_it_is_told_as_little() -> None:
    async with serving(**LOCKED, **ON) as client:
        body = {"query": "a question", "documents": TEXTS}
        await ask(client, ANN, "POST", "/v1/rerank", json=body)
        await until_kept(client, 3)
        guessed = await ask(client, BEN, "POST", "/v1/rerank", json=body)
        assert not TELLING.search(str(guessed.headers) + guessed.text)
        assert "x-cached-tokens" in (await ask(client, ANN, "POST", "/v1/rerank", json=body)).headers


async def test_keys_may_have_caches_of_their_own() -> None:
    async with serving(**LOCKED, **ON, cache_across_keys=False) as client:
        await embedded(client, ANN)
        await until_kept(client, 2)
        first = await embedded(client, BEN)
        assert "x-cached-inputs" not in first.headers
        assert "x-inference-time" in first.headers
        await until_kept(client, 4)
        assert (await embedded(client, BEN)).headers["x-cached-inputs"] == "2"
        assert (await embedded(client, ANN)).headers["x-cached-inputs"] == "2"


async def test_one_key_alone_is_told_everything() -> None:
    async with serving(api_key=f"ann:{ANN}", **ON) as client:
        first = await embedded(client, ANN)
        assert "x-inference-time" in first.headers
        assert (await ask(client, ANN, "GET", "/cache")).json()["enabled"]
        assert "hits" in (await ask(client, ANN, "GET", "/cache")).json()
