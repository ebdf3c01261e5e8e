"""Thousands of batches that have ended are on disk, not in memory; a page of them is read when it is asked for."""

from __future__ import annotations

import asyncio
import gc
import timeit
import tracemalloc
from collections import Counter
from pathlib import Path
from random import Random
from secrets import token_hex
from time import perf_counter, time

import pytest

from tests.batches.light import URL, LightEndpoint, all_of, ended, line, opened, upload
from tests.batches.light import create as create_batch
from vecmill.batches.record import BatchRecord, BatchStatus
from vecmill.batches.service import BatchService
from vecmill.batches.store import BatchStore
from vecmill.core.errors import NoSuchBatch
from vecmill.core.types import EVERYONE, Viewer

MANY = 3000
MOST_BYTES_EACH = 600  # a record takes some 5,000


def record(number: int, **about: object) -> BatchRecord:
    batch = BatchRecord(
        id=f"batch_{token_hex(16)}",
        endpoint=URL,
        input_file_id="file-" + "0" * 32,
        completion_window="24h",
        created_at=1000.0 + number,
        updated_at=2000.0 + number,
        expires_at=3000.0 + number,
        completed_at=2000.0 + number,
        metadata={"note": "n" * 500},
        status=BatchStatus.COMPLETED,
        owner=f"owner-{number % 2}",
    )
    return batch.model_copy(update=about)


def put(folder: Path, batch: BatchRecord) -> BatchRecord:
    """As another server has left it, without the syncs of a real one."""
    (folder / batch.id).mkdir(parents=True)
    (folder / batch.id / "lock").touch()
    (folder / batch.id / "batch.json").write_text(batch.model_dump_json())
    return batch


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[BatchRecord]]:
    folder = tmp_path_factory.mktemp("many")
    return folder, [put(folder / "batches", record(number)) for number in range(MANY)]


def test_a_batch_that_has_ended_takes_almost_no_memory(many: tuple[Path, list[BatchRecord]]) -> None:
    store = BatchStore(many[0] / "batches")
    tracemalloc.start()
    try:
        assert store.open() == []
        gc.collect()
        taken = tracemalloc.get_traced_memory()[0]
        store.records(batch.id for batch in many[1])
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] - taken < 500_000
    finally:
        tracemalloc.stop()
    assert taken < 1_000_000 + MOST_BYTES_EACH * MANY
    assert store.ended().counts == {BatchStatus.COMPLETED: MANY}


async def test_all_of_them_are_paged_and_found_after_a_restart(many: tuple[Path, list[BatchRecord]]) -> None:
    folder, records = many
    batches = opened(folder, None)
    began = perf_counter()
    ids = await batches.ids()
    page = await batches.records(ids[:100])
    assert perf_counter() - began < 2
    assert ids == [batch.id for batch in reversed(records)]
    assert page == records[: -100 - 1 : -1]
    assert await batches.get(records[7].id) == records[7]
    assert await batches.records(ids[-5:]) == records[4::-1]
    own = Viewer("owner-1", False)
    assert await batches.ids(own) == [batch.id for batch in reversed(records) if batch.owner == "owner-1"]
    assert await batches.records(ids[:2], own) == [batch for batch in page[:2] if batch.owner == "owner-1"]
    await batches.close()


async def quickest_look(batches: BatchService, count: int) -> float:
    """Seconds for what the dashboard is told of so many batches that have ended."""
    while len(batches.seen().ended) < count:
        await asyncio.sleep(0.001)
    return min(timeit.repeat(batches.seen, number=1, repeat=100))


async def test_looks_take_hardly_longer_where_there_are_many(tmp_path: Path) -> None:
    for count in (30, MANY):
        for number in range(count):
            put(tmp_path / str(count) / "batches", record(number, updated_at=time()))
    few, many = opened(tmp_path / "30", LightEndpoint()), opened(tmp_path / str(MANY), LightEndpoint())
    assert await quickest_look(many, MANY) < 10 * await quickest_look(few, 30)
    for each in (few, many):
        await each.close()


async def test_they_stay_in_the_order_of_their_creation_as_they_come_and_go(tmp_path: Path) -> None:
    folder, mix = tmp_path / "batches", Random(0)
    there = [put(folder, record(number, updated_at=time())) for number in mix.sample(range(100), 60)]
    batches, store = opened(tmp_path, LightEndpoint()), BatchStore(folder)
    for _ in range(5):
        for batch in mix.sample(there, 8):
            store.forget(batch.id)
            there.remove(batch)
        statuses = (BatchStatus.FAILED, BatchStatus.COMPLETED)
        there += [
            put(folder, record(mix.randrange(100), updated_at=time(), status=mix.choice(statuses))) for _ in range(5)
        ]
        expected = sorted(there, key=lambda batch: (batch.created_at, batch.id), reverse=True)
        assert await batches.ids() == [batch.id for batch in expected]
        for viewer in (EVERYONE, Viewer("owner-0"), Viewer("owner-1"), Viewer("nobody")):
            own = [batch for batch in expected if viewer.sees(batch.owner)]
            seen = batches.seen(viewer, [batch.id for batch in there])
            assert [batch.id for batch in seen.ended] == [batch.id for batch in own]
            assert seen.ended_ids == {batch.id for batch in own}
            assert seen.counts == Counter(batch.status for batch in own)
    await batches.close()


async def test_what_another_server_deletes_or_ends_is_seen(tmp_path: Path) -> None:
    first, second = (put(tmp_path / "batches", record(number, updated_at=time())) for number in (1, 2))
    batches, other = opened(tmp_path, None), opened(tmp_path, LightEndpoint())
    assert await batches.ids() == [second.id, first.id]
    BatchStore(tmp_path / "batches").forget(second.id)
    assert await batches.records([second.id, first.id]) == [first]
    with pytest.raises(NoSuchBatch):
        await batches.get(second.id)
    new = await create_batch(other, await upload(other, line("a")))
    assert new in await batches.ids()
    assert (await ended(other, new)).status is BatchStatus.COMPLETED
    assert [batch.status for batch in await all_of(batches)] == [BatchStatus.COMPLETED] * 2
    while other.seen().counts != {BatchStatus.COMPLETED: 2}:
        other.wake()
        await batches.ids()
    assert [batch.id for batch in other.seen().ended] == await batches.ids()
    await other.close()
    await batches.close()
