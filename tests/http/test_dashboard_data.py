"""What the dashboard is told, over real requests: one number for one word, who sees what, pages, refusals, history."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from time import thread_time
from typing import Any, cast

import httpx
import orjson
import pytest

from tests.conftest import serving
from tests.hostile.keys import ADMIN, ANN, BEN, LOCKED, ask
from tests.hostile.stalls import longest_stall
from tests.in_process import InProcess
from tests.servers import RunningServer
from vecmill.app import create_app
from vecmill.config import load_settings
from vecmill.http.dashboard import doctor
from vecmill.http.dashboard.live import Live
from vecmill.http.dashboard.sampling import until_next_look
from vecmill.http.dashboard.snapshot import SnapshotQuery, Snapshots, SnapshotView
from vecmill.jobs.views import FOLLOWERS_MAX
from vecmill.telemetry.history import STEP_SECONDS
from vecmill.telemetry.refusals import REFUSALS_KEPT, Refusal, Refusals

SNAPSHOT = "/dashboard/snapshot"
SECRET = "a word that must not be shown"
LINE = {"custom_id": "one", "method": "POST", "url": "/v1/embeddings", "body": {"input": "a text"}}


@pytest.fixture(scope="module")
async def client() -> AsyncIterator[httpx.AsyncClient]:
    async with serving(job_lease_seconds=300) as client:
        yield client


async def snapshot(client: httpx.AsyncClient, **query: object) -> dict[str, Any]:
    answer = await client.get(SNAPSHOT, params={name: str(value) for name, value in query.items()})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def job_of(client: httpx.AsyncClient, project: str, total: int = 100) -> str:
    answer = await client.post("/jobs", json={"project": project, "total_chunks": total, "instance_id": "editor"})
    return str(answer.json()["job_id"])


async def test_one_word_is_one_number() -> None:
    async with serving() as client:
        job_id = await job_of(client, "code")
        for done in range(10, 51, 10):
            texts = [f"text {done} {number}" for number in range(10)]
            await client.post("/embed", json={"inputs": texts}, headers={"x-job-id": job_id})
            await client.post(f"/jobs/{job_id}/progress", json={"current": done})
        shown, stats = await snapshot(client), (await client.get("/stats")).json()
        [listed] = (await client.get("/jobs")).json()["active"]
        [job], [user] = shown["jobs"]["items"], shown["who"]
        rates = [
            shown["now"]["texts_per_second"],
            stats["texts_per_second"],
            (await client.get("/stats/detailed")).json()["throughput"]["texts_per_second"],
            listed["chunks_per_second"],
            job["chunks_per_second"],
            job["texts_per_second"],
            user["texts_per_second"],
        ]
        assert rates == [pytest.approx(rates[0], rel=0.3)] * 7  # a little later each
        assert rates[0] > 0
        assert (user["job"], user["job_name"], user["texts"], user["requests"]) == (job_id, "code", 50, 5)
        assert (user["key"], user["client"]) == (None, "127.0.0.1")
        metrics = (await client.get("/metrics")).text
        counted = [line for line in metrics.splitlines() if line.startswith("vecmill_texts_total{")]
        assert sum(float(line.rpartition(" ")[2]) for line in counted) == stats["texts_embedded"] == 50


async def test_now_has_searches_and_bulk_apart(client: httpx.AsyncClient) -> None:
    await client.post("/v1/rerank", json={"query": "q", "documents": ["a", "b"]})
    await client.post("/embed", json={"inputs": ["one", "two"]}, headers={"x-priority": "bulk"})
    found = await snapshot(client)
    now = found["now"]
    assert (found["status"], found["ready"], found["is_admin"], found["keys_in_use"]) == ("ok", True, True, False)
    assert found["percent"] == 100
    for lane in ("interactive", "bulk"):
        assert 0 < now["latency_ms"][lane]["p50"] <= now["latency_ms"][lane]["p95"]
        assert now["queue"][lane] == {"texts": 0, "tokens": 0}
    assert 0 < now["searches_per_second"] < now["requests_per_second"] < now["texts_per_second"]
    assert now["cache"] is None  # there is none, which is not an empty one
    fill = now["batch_fill"]
    shown = 0.0005  # it has three decimals
    assert fill["ratio"] == pytest.approx(fill["tokens_per_pass"] / fill["knee_tokens"], rel=0.05, abs=shown)
    assert 0 < now["device_busy_ratio"] <= 1
    memory = found["machine"]["memory"]
    parts = [memory[f"{part}_bytes"] for part in ("ours", "others", "page_cache", "free")]
    assert sum(parts) == memory["total_bytes"]
    assert (memory["unified"], memory["gpu"], found["machine"]["gpu"]) == (False, None, None)
    [model] = found["models"]
    assert (model["state"], model["dimensions"], model["max_tokens"]) == ("loaded", [384], 256)
    assert model["budget"]["tokens"] > 0 < model["fit"]["b_us_per_token"]


async def test_pages_of_jobs(client: httpx.AsyncClient) -> None:
    jobs = [await job_of(client, f"Project {number}") for number in range(60)]
    await client.post(f"/jobs/{jobs[0]}/fail", json={"error": "no"})
    first = (await snapshot(client))["jobs"]
    assert (first["total"], first["page"], first["pages"], len(first["items"])) == (60, 1, 3, 25)
    assert (sum(first["counts"].values()), first["counts"]["failed"]) == (60, 1)
    assert [job["status"] for job in first["items"]] == ["active"] * 2 + ["queued"] * 23
    assert first["items"][3]["queue_position"] == 2
    last = (await snapshot(client, jobs_page=99))["jobs"]
    assert (last["page"], len(last["items"]), last["items"][-1]["id"]) == (3, 10, jobs[0])
    found = (await snapshot(client, jobs_q="pROJECT 5"))["jobs"]
    assert (found["total"], found["counts"]) == (11, first["counts"])  # 5 and 50 to 59; the counts are of all
    assert (await snapshot(client, jobs_q=jobs[7]))["jobs"]["items"][0]["project"] == "Project 7"
    assert (await snapshot(client, jobs_q="EDITOR", jobs_state="failed"))["jobs"]["total"] == 1
    for job_id in jobs[1:]:
        await client.delete(f"/jobs/{job_id}")
    await client.delete("/jobs/recent")


@pytest.mark.parametrize(
    "query", [{"jobs_page": "0"}, {"jobs_page": "x"}, {"jobs_state": "gone"}, {"jobs_q": 101 * "x"}]
)
async def test_a_query_that_is_none_is_refused(client: httpx.AsyncClient, query: dict[str, str]) -> None:
    answer = await client.get(SNAPSHOT, params=query)
    assert (answer.status_code, next(iter(query)) in answer.json()["detail"]) == (400, True)


async def test_batches_with_sizes_and_rates(client: httpx.AsyncClient) -> None:
    lines = b"".join(orjson.dumps(LINE | {"custom_id": str(number)}) + b"\n" for number in range(20))
    sent = await client.post("/v1/files", files={"file": ("in.jsonl", lines)}, data={"purpose": "batch"})
    file_id = sent.json()["id"]
    body = {"input_file_id": file_id, "endpoint": "/v1/embeddings", "completion_window": "24h"}
    await client.post("/v1/batches", json=body | {"metadata": {"name": "nightly"}})
    async with asyncio.timeout(60):
        while (shown := (await snapshot(client))["batches"])["items"][0]["status"] != "completed":
            await asyncio.sleep(0.05)
    [batch] = shown["items"]
    assert (shown["counts"]["completed"], shown["total"], shown["pages"]) == (1, 1, 1)
    assert (batch["name"], batch["input_bytes"], batch["request_counts"]["completed"]) == ("nightly", len(lines), 20)
    assert batch["output_bytes"] > 1000
    assert (batch["lines_per_second"], batch["eta_seconds"], batch["error_bytes"]) == (None, None, 0)
    user = next(user for user in (await snapshot(client))["who"] if user["job"] == batch["id"])
    assert (user["job_name"], user["texts"]) == ("nightly", 20)


async def test_refusals_say_why_and_nothing_that_the_client_sent() -> None:
    asked: list[tuple[str, dict[str, Any]]] = [
        ("/v1/embeddings", {"input": SECRET, "dimensions": -4}),
        ("/v1/embeddings", {"input": SECRET, "encoding_format": SECRET}),
        ("/v1/embeddings", {"input": [SECRET], "model": SECRET, SECRET: SECRET}),
        ("/v1/embeddings", {"input": SECRET, "truncation": {SECRET: [SECRET]}}),
        ("/v1/batches", {"input_file_id": SECRET, "endpoint": SECRET, "completion_window": SECRET}),
        ("/jobs", {"project": SECRET, "total_chunks": SECRET}),
        (f"/jobs/{SECRET}/progress", {"current": 1}),
        (f"/{SECRET}", {}),
        ("/embed", {"inputs": [], "prompt_name": SECRET}),
        ("/embed", {"inputs": [SECRET], "prompt_name": SECRET}),
    ]
    async with serving() as client:
        statuses: list[int] = []
        for path, body in asked:
            answer = await client.post(path, json=body, headers={"x-request-id": f"id-{len(statuses)}"})
            statuses.append(answer.status_code)
        statuses.append((await client.post("/embed", content=f'{{"inputs": {SECRET}')).status_code)
        refused = [(f"id-{number}", status) for number, status in enumerate(statuses) if status != 200]
        found = await snapshot(client)
        shown = found["refusals"][::-1]  # the newest first
        assert [(refusal["request_id"], refusal["status"]) for refusal in shown][:-1] == refused[:-1]
        assert SECRET not in json.dumps(shown)
        assert all(set(refusal) >= {"at", "error", "reason", "path", "client", "key"} for refusal in shown)
        by_id = {refusal["request_id"]: refusal for refusal in shown}
        assert by_id["id-0"] | {"at": 0} == {
            "at": 0,
            "request_id": "id-0",
            "status": 400,
            "error": "invalid_input",
            "reason": "Input should be greater than or equal to 1. (`dimensions`)",
            "path": "/v1/embeddings",
            "client": "127.0.0.1",
            "key": None,
        }
        assert (by_id["id-6"]["path"], by_id["id-6"]["error"]) == ("/jobs/{job_id}/progress", "job_not_found")
        assert (by_id["id-7"]["path"], by_id["id-7"]["status"]) == (None, 404)
        assert (found["now"]["errors"], found["now"]["refused"]) == (0, 0)  # the clients' own
        assert (await client.get("/stats")).json()["client_errors"] == len(refused)


async def test_refusals_for_the_load_are_counted_apart() -> None:
    async with serving(max_queued_tokens=2048, queue_timeout=0) as client:
        bodies = [("/v1/embeddings", "input"), ("/embed", "inputs")] * 3
        many = [client.post(path, json={field: ["word " * 200] * 8}) for path, field in bodies]
        statuses = [answer.status_code for answer in await asyncio.gather(*many)]
        assert set(statuses) == {200, 503}  # some dialects' clients come again after a 503 alone
        found = await snapshot(client)
        assert (found["now"]["errors"], found["now"]["refused"]) == (0, 6 - statuses.count(200))
        assert found["refusals"][0]["error"] == "overloaded"
        assert "MAX_QUEUED_TOKENS" in found["refusals"][0]["reason"]  # the server's own words


async def test_the_last_fifty_are_kept(client: httpx.AsyncClient) -> None:
    for number in range(60):
        await client.get("/nothing", headers={"x-request-id": f"nothing-{number}"})
    ids = [refusal["request_id"] for refusal in (await snapshot(client))["refusals"]]
    assert ids == [f"nothing-{number}" for number in range(59, 9, -1)]


def test_whoever_is_refused_without_end_hides_nobody_elses_refusals() -> None:
    def refusal(number: int, owner: str | None) -> Refusal:
        return Refusal(f"{number}", 400, "empty_input", "", None, "/embed", "", None, owner, at=-number)

    kept = Refusals()
    kept.add(refusal(0, "ann"))
    for number in range(1, 1000):
        kept.add(refusal(number, "ben" if number % 2 else None))
    assert [each.request_id for each in kept.of("ann")] == ["0"]
    assert [each.request_id for each in kept] == [f"{number}" for number in range(999, 949, -1)]
    assert [each.request_id for each in kept.of("ben")] == [f"{number}" for number in range(999, 899, -2)]
    for number in range(10_000):
        kept.add(refusal(number, f"key {number}"))
    assert (len(kept.of("key 9999")), len(kept.of("ann")), len(list(kept))) == (1, 0, REFUSALS_KEPT)


async def test_a_key_sees_its_own() -> None:
    jobs: dict[str, str] = {}
    async with serving(**LOCKED) as client:
        for key, project in ((ANN, "ann's secret"), (BEN, "ben's")):
            job = await ask(client, key, "POST", "/jobs", json={"project": project, "total_chunks": 10})
            await ask(client, key, "POST", "/embed", json={"inputs": [project]})
            await ask(client, key, "POST", "/embed", json={"inputs": []})
            jobs[key] = str(job.json()["job_id"])
        for key in (ANN, BEN):  # each as if it worked for ann's
            await ask(client, key, "POST", "/embed", json={"inputs": ["a"]}, headers={"x-job-id": jobs[ANN]})
        await client.get(SNAPSHOT)  # the page before somebody has signed in
        await client.get("/stats")

        async def of(key: str) -> dict[str, Any]:
            found: dict[str, Any] = (await ask(client, key, "GET", SNAPSHOT)).json()
            return found

        seen, everything = await of(BEN), await of(ADMIN)
        assert (seen["is_admin"], everything["is_admin"], seen["keys_in_use"]) == (False, True, True)
        assert [job["project"] for job in seen["jobs"]["items"]] == ["ben's"]
        assert (seen["jobs"]["total"], sum(seen["jobs"]["counts"].values())) == (1, 1)
        assert {user["key"] for user in seen["who"]} == {"ben"}
        assert [refusal["key"] for refusal in seen["refusals"]] == ["ben"]
        assert "secret" not in json.dumps(seen)
        named = {(user["key"], user["job_name"]) for user in everything["who"]}
        assert named == {("ann", None), ("ann", "ann's secret"), ("ben", None)}
        assert [refusal["error"] for refusal in everything["refusals"]] == ["invalid_api_key"] + ["empty_input"] * 2
        assert everything["now"]["errors"] == 0
        # What had to be computed tells what was in the common cache.
        hidden = [seen["now"]["cache"], seen["now"]["device_busy_ratio"], seen["now"]["batch_fill"]["tokens_per_pass"]]
        assert hidden == [None] * 3
        assert everything["now"]["device_busy_ratio"] is not None
        refused = await ask(client, BEN, "POST", "/dashboard/doctor")
        assert (refused.status_code, "admin" in refused.text) == (403, True)
        assert (await ask(client, BEN, "GET", "/dashboard/doctor")).status_code == 403
        history = (await ask(client, BEN, "GET", "/dashboard/history")).json()
        assert set(history["series"]["device_busy_ratio"]) == {None}


async def test_while_it_loads_it_says_so() -> None:
    app = create_app(load_settings({"device": "cpu"}))
    async with httpx.AsyncClient(transport=InProcess(app), base_url="http://localhost") as client:
        found = await snapshot(client)
        assert (found["status"], found["status_text"], found["ready"]) == ("loading", "starting", False)
        assert found["percent"] == 0
        assert (found["models"], found["jobs"]["total"], found["batches"]["total"], found["who"]) == ([], 0, 0, [])
        assert found["now"]["batch_fill"] == {"tokens_per_pass": None, "knee_tokens": None, "ratio": None}
        assert found["now"]["latency_ms"]["bulk"] == {"p50": None, "p95": None}
        assert (await client.get("/dashboard/history")).json()["series"]["errors"] == [None] * 90


async def test_the_history_survives_a_restart(tmp_path: Path) -> None:
    async with serving(state_dir=str(tmp_path)) as client:
        await client.post("/embed", json={"inputs": ["a", "b"]})
    async with serving(state_dir=str(tmp_path)) as client:
        for span, points in (("15m", 90), ("24h", 720)):
            history = (await client.get("/dashboard/history", params={"span": span})).json()
            assert len(history["at"]) == points == len(history["series"]["texts_per_second"])
        sampler = client._transport.app.state.live.sampler  # type: ignore[attr-defined]
        kept = sampler.history.copy()
    assert [value for value in kept.span(900, 10 * (kept._latest + 1)).series["texts_per_second"] if value]
    (tmp_path / "history").write_bytes(b"vecmill-history 7\nof a later release")
    async with serving(state_dir=str(tmp_path)) as client:
        assert (await client.get("/dashboard/history")).status_code == 200
    assert (tmp_path / "history.unreadable").read_bytes().endswith(b"of a later release")
    assert (tmp_path / "history").stat().st_size > 100


@pytest.mark.parametrize("early", [0.0, 0.0005, 0.005])
def test_each_step_of_the_history_is_looked_at_once_though_timers_are_early(early: float) -> None:
    """uvloop's are by up to a millisecond, nearly always; the step would be written over by what is left of it."""
    now, seen = 1_700_000_003.7, []
    for _ in range(100):
        now += until_next_look(now) - early
        seen.append(int((now - STEP_SECONDS / 2) // STEP_SECONDS))
    assert seen == list(range(seen[0], seen[0] + 100))


@pytest.mark.nightly
async def test_doctor_runs_once_at_a_time(client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "COMMAND", (*doctor.COMMAND, "--only", "python,state"))
    before = (await client.get("/dashboard/doctor")).json()
    assert before == {"running": False, "started_at": None, "ended_at": None, "result": None, "error": None}
    answers = [await client.post("/dashboard/doctor") for _ in range(3)]
    assert [answer.status_code for answer in answers] == [202] * 3
    assert len({answer.json()["started_at"] for answer in answers}) == 1
    async with asyncio.timeout(60):
        while (now := (await client.get("/dashboard/doctor")).json())["running"]:
            await asyncio.sleep(0.05)
    assert (now["error"], [check["name"] for check in now["result"]["checks"]]) == (None, ["python", "state"])
    assert now["ended_at"] >= now["started_at"]
    state = client._transport.app.state.services.settings.state.state_dir  # type: ignore[attr-defined]
    assert str(state) in json.dumps(now["result"])  # this server's, though it was no environment variable


async def test_the_stream_has_a_snapshot_at_once_and_again(server: RunningServer) -> None:
    async with (
        asyncio.timeout(30),
        httpx.AsyncClient(base_url=server.url, timeout=30) as client,
        client.stream("GET", "/dashboard/events", params={"jobs_q": "nothing"}) as answer,
    ):
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert (answer.headers["cache-control"], "content-encoding" in answer.headers) == ("no-cache", False)
        lines = answer.aiter_lines()
        assert [await anext(lines), await anext(lines)] == ["retry: 2000", ""]
        moments = []
        for _ in range(2):
            event, data, empty = [await anext(lines) for _ in range(3)]
            assert (event, data[:7], empty) == ("event: snapshot", "data: {", "")
            moments.append(json.loads(data.removeprefix("data: "))["at"])
        assert 0 < moments[1] - moments[0] < 10


async def test_readers_that_do_not_read_do_not_hold_up_the_stop() -> None:
    async with serving() as client:
        app = client._transport.app  # type: ignore[attr-defined]
        sending: asyncio.Queue[None] = asyncio.Queue()

        async def receive() -> dict[str, Any]:
            await asyncio.Event().wait()
            raise AssertionError

        async def send(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.body":
                sending.put_nowait(None)
                await asyncio.Event().wait()  # as a connection whose buffers are full

        def scope(path: str) -> dict[str, Any]:
            fixed = {"type": "http", "method": "GET", "query_string": b"", "client": ("127.0.0.1", 1)}
            return {**fixed, "path": path, "raw_path": path.encode(), "headers": [(b"host", b"localhost")]}

        paths = ("/dashboard/events", "/jobs/events")
        stuck = [asyncio.create_task(app(scope(path), receive, send)) for path in paths]
        async with asyncio.timeout(30):
            for _ in paths:
                await sending.get()
            app.state.server.begin_to_stop()
            await app.state.server.requests.none()
        for task in stuck:
            task.cancel()
        await asyncio.gather(*stuck, return_exceptions=True)


async def test_no_more_readers_than_there_may_be_also_all_at_once(client: httpx.AsyncClient) -> None:
    live = cast(InProcess, client._transport).app.state.live  # type: ignore[attr-defined]
    view = SnapshotView(None, everything=True, shows_work=True, query=SnapshotQuery())
    readers = [live.follow(view) for _ in range(FOLLOWERS_MAX + 90)]
    seen = await asyncio.gather(*(anext(snapshots, None) for snapshots in readers))
    assert len([snapshot for snapshot in seen if snapshot]) == FOLLOWERS_MAX
    assert len(set(seen)) == 2  # the same bytes for all, or none
    for snapshots in readers:
        await snapshots.aclose()
    assert await anext(live.follow(view))


class Laborious(Snapshots):
    """Each snapshot takes the event loop a while, as with hundreds of jobs."""

    async def of(self, view: SnapshotView) -> dict[str, Any]:
        ends = thread_time() + 0.02
        while thread_time() < ends:
            pass
        return {"looked_for": view.query.jobs_text}


async def test_readers_who_each_look_at_something_else_leave_time_for_others(client: httpx.AsyncClient) -> None:
    app = cast(InProcess, client._transport).app
    state = app.state  # type: ignore[attr-defined]
    server = state.server
    live = Live(Laborious(app, state.services, server.machine, server.replicas), state.live.sampler)  # type: ignore[arg-type]
    queries = [SnapshotQuery(str(number)) for number in range(40)]
    views = [SnapshotView(None, everything=True, shows_work=True, query=query) for query in queries]
    readers = [live.follow(view) for view in [*views, *views]]
    async with longest_stall(thread_time) as stall:
        seen = await asyncio.gather(*(anext(snapshots) for snapshots in readers))
    assert [orjson.loads(snapshot)["looked_for"] for snapshot in seen] == [str(number) for number in range(40)] * 2
    assert stall.seconds < 0.4  # of 0.8 that all of them take
    waiting = [asyncio.create_task(anext(snapshots, b"")) for snapshots in readers]
    await asyncio.sleep(0)
    live.end()
    async with asyncio.timeout(5):
        assert set(await asyncio.gather(*waiting)) == {b""}
