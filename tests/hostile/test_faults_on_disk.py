"""A failure at any moment loses only the operation in progress, never stored data and never a thread."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.batches.light import LightEndpoint, create, ended, line, opened, upload
from vecmill.batches.record import BatchRecord, BatchStatus
from vecmill.batches.store import BatchStore
from vecmill.cache import embedding_cache
from vecmill.cache.embedding_cache import EmbeddingCache
from vecmill.core.errors import JobsUnavailable, NoSuchBatch
from vecmill.core.protocols import JobChanges, StoreFailed, StoreSize
from vecmill.storage.files import delete_unfinished, write_atomically
from vecmill.storage.sqlite import connect, open_database, transaction
from vecmill.storage.sqlite_jobs import SqliteJobs
from vecmill.storage.sqlite_vectors import SqliteVectors

ROOM = 1_000_000_000
SCHEMA = "CREATE TABLE things (name TEXT)"
WIDTH = 16
FAULTS = [MemoryError(), KeyboardInterrupt(), asyncio.CancelledError(), ValueError("no number"), SystemExit(1)]


class Unbindable:
    """A value that makes a write fail in its middle, as running out of memory would."""

    def __len__(self) -> int:
        return 1

    def __conform__(self, protocol: object) -> bytes:
        raise MemoryError


def entries(numbers: range) -> dict[bytes, bytes]:
    return {number.to_bytes(8, "little") * 2: b"value %d" % number for number in numbers}


def _insert_and_raise(connection: sqlite3.Connection, fault: BaseException) -> None:
    with transaction(connection):
        connection.execute("INSERT INTO things VALUES ('given up')")
        raise fault


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
def test_a_transaction_is_rolled_back_whatever_ends_it(tmp_path: Path, fault: BaseException) -> None:
    connection = open_database(tmp_path / "things.db", SCHEMA, 1)
    with transaction(connection):
        connection.execute("INSERT INTO things VALUES ('kept')")
    with pytest.raises(type(fault)):
        _insert_and_raise(connection, fault)
    assert not connection.in_transaction
    other = connect(tmp_path / "things.db", busy_seconds=0)
    with transaction(other):  # nobody holds the lock
        other.execute("INSERT INTO things VALUES ('of another')")
    other.close()
    with transaction(connection):
        connection.execute("INSERT INTO things VALUES ('after it')")
    assert [name for (name,) in connection.execute("SELECT name FROM things")] == ["kept", "of another", "after it"]
    connection.close()


def test_a_transaction_that_was_left_open_is_no_broken_file(tmp_path: Path) -> None:
    connection = open_database(tmp_path / "things.db", SCHEMA, 1)
    connection.execute("BEGIN IMMEDIATE")
    connection.execute("INSERT INTO things VALUES ('left open')")
    with transaction(connection):
        connection.execute("INSERT INTO things VALUES ('kept')")
    assert [name for (name,) in connection.execute("SELECT name FROM things")] == ["kept"]
    connection.close()


def test_memory_that_ends_during_a_write_costs_no_cache(tmp_path: Path) -> None:
    store = SqliteVectors(tmp_path / "cache.db", ROOM)
    store.put(entries(range(100)), ())
    with pytest.raises(StoreFailed, match="memory"):
        store.put({**entries(range(100, 105)), b"k" * 16: Unbindable()}, ())  # type: ignore[dict-item]
    assert store.size().entries == 100
    store.put(entries(range(100, 110)), ())
    assert len(store.get(list(entries(range(110))))) == 110
    assert list(tmp_path.glob("*.aside-*")) == []
    store.close()


async def test_memory_that_ends_while_jobs_are_written_costs_no_job(tmp_path: Path) -> None:
    database = SqliteJobs(tmp_path / "jobs.db")
    await database.load()
    kept = JobChanges({"a": b"1"}, (), (), 0, b"meta")
    assert await database.save(kept)
    with pytest.raises(JobsUnavailable, match="MemoryError"):
        await database.save(replace(kept, open={"b": Unbindable()}))  # type: ignore[dict-item]
    assert await database.save(replace(kept, open={"c": b"3"}))
    assert dict((await database.load()).open) == {"a": b"1", "c": b"3"}
    await database.close()


def test_a_broken_file_that_cannot_be_put_aside_ends_no_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a disk that is read only: root may write where others may not, so the renaming itself fails here."""
    monkeypatch.setattr(embedding_cache, "RETRY_SECONDS", 0.01)
    path = tmp_path / "cache.db"
    path.write_bytes(b"no database, but long enough to be taken for one" * 100)

    def refuse(self: Path, target: object) -> Path:
        raise OSError(errno.EROFS, "Read-only file system", str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refuse)
        cache = EmbeddingCache(SqliteVectors(path, ROOM))
        cache.keep(b"k" * 16, np.ones(WIDTH, np.float32), WIDTH)
        wait_for(lambda: cache.failing)
        assert cache.look_up([b"n" * 16], WIDTH) == {}
        with pytest.raises(StoreFailed, match="Read-only"):
            cache.clear()
        assert list(cache.look_up([b"k" * 16], WIDTH)) == [b"k" * 16]  # still on its way
    wait_for(lambda: cache.stats.written == 1)
    assert cache.look_up([b"n" * 16], WIDTH) == {}
    cache.close()
    assert path.read_bytes().startswith(b"SQLite")


class Surprising(SqliteVectors):
    """A store that raises unexpected errors: at the first three writes, and at all reads."""

    faults = 3

    def put(self, *arguments: object) -> int:
        self.faults -= 1
        if self.faults >= 0:
            raise RuntimeError("not thought of")
        return super().put(*arguments)  # type: ignore[arg-type]

    def size(self) -> StoreSize:
        raise RuntimeError("not thought of")

    def get(self, keys: Sequence[bytes]) -> Mapping[bytes, bytes]:
        raise RuntimeError("not thought of")


def test_the_writer_goes_on_after_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding_cache, "RETRY_SECONDS", 0.01)
    cache = EmbeddingCache(Surprising(tmp_path / "cache.db", ROOM))
    for number in range(4):
        cache.keep(number.to_bytes(16, "little"), np.ones(WIDTH, np.float32), WIDTH)
        wait_for(lambda done=number: cache.stats.lost + cache.stats.written == done + 1)  # type: ignore[misc]
    assert (cache.stats.lost, cache.stats.written) == (3, 1)
    assert cache.look_up([b"k" * 16], WIDTH) == {}
    cache.close()


def test_what_is_cleared_is_counted_when_it_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vecmill.storage.sqlite_vectors.BUSY_SECONDS", 0.0)
    store = SqliteVectors(tmp_path / "cache.db", ROOM)
    store.put(entries(range(50)), ())
    holder = connect(tmp_path / "cache.db")
    holder.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreFailed, match="locked"):
        store.clear()
    assert store.size().entries == 50
    holder.execute("ROLLBACK")
    holder.execute("BEGIN")  # a reader keeps the file from being shrunk, but not from being emptied
    assert holder.execute("SELECT count(*) FROM vectors").fetchone() == (50,)
    assert store.clear() == 50
    assert store.size().entries == 0
    holder.close()
    assert store.clear() == 0
    assert store.get(list(entries(range(50)))) == {}
    store.close()


def test_many_who_cancel_one_batch_are_all_answered(tmp_path: Path) -> None:
    store = BatchStore(tmp_path)
    for _ in range(20):
        record = BatchRecord(
            id=store.new_id(),
            endpoint="/v1/embeddings",
            input_file_id="file",
            completion_window="24h",
            created_at=0.0,
            expires_at=1.0,
        )
        store.create(record)
        at_once = threading.Barrier(8)

        def cancel(now: int, batch_id: str = record.id, at_once: threading.Barrier = at_once) -> float | None:
            at_once.wait()
            store.cancel(batch_id, float(now))
            return store.cancel_requested_at(batch_id)

        with ThreadPoolExecutor(8) as pool:
            times = set(pool.map(cancel, range(1, 9)))
        assert times <= set(map(float, range(1, 9)))
        assert sorted(path.name for path in Path(store.folder(record.id)).iterdir()) == ["batch.json", "cancel", "lock"]


async def test_who_cancels_at_the_same_time_gets_the_same_answer(tmp_path: Path) -> None:
    batches = opened(tmp_path, None)
    batch_id = await create(batches, await upload(batches, line("1", input="x")))
    answers = await asyncio.gather(*(batches.cancel(batch_id) for _ in range(50)))
    assert {answer.status for answer in answers} == {BatchStatus.CANCELLING}
    shutil.rmtree(tmp_path / "batches" / batch_id)
    with pytest.raises(NoSuchBatch):
        await batches.cancel(batch_id)


async def test_the_event_loop_never_waits_for_the_disk_to_say_that_a_batch_is_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = set()
    cancel_requested_at = BatchStore.cancel_requested_at

    def noting(store: BatchStore, batch_id: str) -> float | None:
        threads.add(threading.get_ident())
        return cancel_requested_at(store, batch_id)

    monkeypatch.setattr(BatchStore, "cancel_requested_at", noting)
    batches = opened(tmp_path, LightEndpoint(), batch_chunk_size=4)
    file_id = await upload(batches, b"".join(line(str(number), input="x") for number in range(40)))
    whole, cancelled = await create(batches, file_id), await create(batches, file_id)
    await batches.cancel(cancelled)
    assert (await ended(batches, whole)).status is BatchStatus.COMPLETED
    assert (await ended(batches, cancelled)).status is BatchStatus.CANCELLED
    await batches.close()
    assert threads - {threading.get_ident()} == threads != set()


def test_what_a_killed_writer_leaves_is_deleted_later(tmp_path: Path) -> None:
    write_atomically(tmp_path / "file.json", b"{}")
    for name, age in (("file.json.0011aabb.tmp", 7200), ("other.json.tmp", 7200), ("file.json.22334455.tmp", 0)):
        path = tmp_path / name
        path.touch()
        os.utime(path, (time.time() - age,) * 2)
    delete_unfinished(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.json", "file.json.22334455.tmp"]


def wait_for(condition: Callable[[], bool]) -> None:
    while not condition():
        threading.Event().wait(0.001)  # the writer's thread needs its turn
