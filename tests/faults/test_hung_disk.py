"""A disk that hangs: reading a file that is a named pipe takes until somebody writes into it."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path
from time import monotonic, time
from typing import Any

import httpx
import pytest

from tests.batches.light import opened
from tests.batches.test_many_ended import put, record
from tests.conftest import serving
from vecmill.http.dashboard.live import TICK_SECONDS
from vecmill.http.dashboard.snapshot import DISK_PATIENCE, PAGE_SIZE

MANY = 300  # more than the records that are kept in memory
LOOKS = 20


class Hung:
    """A file that cannot be read until it is released."""

    def __init__(self, path: Path) -> None:
        self._path, self._content = path, path.read_bytes()
        path.unlink()
        os.mkfifo(path)

    def release(self) -> None:
        """Whoever reads it gets its content, and it is a file again. One reader must have begun."""
        pipe = os.open(self._path, os.O_WRONLY)
        whole = self._path.with_name("whole")
        whole.write_bytes(self._content)
        whole.replace(self._path)
        os.write(pipe, self._content)
        os.close(pipe)


async def batches_on(client: httpx.AsyncClient, page: int) -> dict[str, Any]:
    answer = await client.get("/dashboard/snapshot", params={"batches_page": str(page)})
    shown: dict[str, Any] = answer.raise_for_status().json()["batches"]
    return shown


async def test_the_dashboard_does_without_what_cannot_be_read_now(tmp_path: Path) -> None:
    ended = [put(tmp_path / "batches", record(number, updated_at=time())) for number in range(MANY)]
    last_page = MANY // PAGE_SIZE
    async with serving(state_dir=tmp_path) as client:
        async with asyncio.timeout(60):
            while (await batches_on(client, 1))["total"] < MANY:
                await asyncio.sleep(0.01)
        newest = (await client.get("/v1/batches", params={"limit": "100"})).json()["data"]
        await client.get("/v1/batches", params={"limit": "100", "after": newest[-1]["id"]})
        hung = Hung(tmp_path / "batches" / ended[0].id / "batch.json")
        began, threads = monotonic(), threading.active_count()
        async with asyncio.timeout(60):
            shown = [await batches_on(client, page) for page in (last_page, *range(1, LOOKS))]
        assert monotonic() - began < (LOOKS * DISK_PATIENCE) / 2  # only the first look waited
        assert threading.active_count() <= threads + 1
        assert {page["counts"]["completed"] for page in shown} == {MANY}
        assert shown[0]["items"] == []
        hung.release()
        async with asyncio.timeout(60):
            while not (items := (await batches_on(client, last_page))["items"]):
                await asyncio.sleep(0.01)
        assert items[-1]["id"] == ended[0].id


async def test_all_that_needs_no_batch_goes_on(tmp_path: Path) -> None:
    ended = [put(tmp_path / "batches", record(number, updated_at=time())) for number in range(MANY)]
    async with serving(state_dir=tmp_path, cache_max_bytes=100_000_000) as client:
        newest = (await client.get("/v1/batches", params={"limit": "100"})).json()["data"]
        await client.get("/v1/batches", params={"limit": "100", "after": newest[-1]["id"]})
        hung = Hung(tmp_path / "batches" / ended[0].id / "batch.json")
        waiting = [asyncio.create_task(client.get(f"/v1/batches/{ended[0].id}")) for _ in range(2 * LOOKS)]
        async with asyncio.timeout(30):
            assert (await client.post("/v1/embeddings", json={"input": "x"})).is_success
            assert (await client.delete("/cache")).is_success
            assert (await client.get("/dashboard/snapshot")).is_success
        assert not any(each.done() for each in waiting)
        hung.release()
        assert (await client.get(f"/v1/batches/{ended[0].id}")).json()["id"] == ended[0].id
        await asyncio.gather(*waiting)


async def test_who_leaves_does_not_wait_for_a_reading_that_hangs(tmp_path: Path) -> None:
    ended = [put(tmp_path / "batches", record(number)) for number in range(MANY)]
    batches = opened(tmp_path, None)
    await batches.records([batch.id for batch in ended[1:]])
    hung = Hung(tmp_path / "batches" / ended[0].id / "batch.json")
    began = monotonic()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await batches.get(ended[0].id)
    assert monotonic() - began < TICK_SECONDS
    hung.release()
    assert await batches.get(ended[0].id) == ended[0]
    await batches.close()
