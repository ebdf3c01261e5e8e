"""The cache over a real store: what is kept, for how long, and that a failing store fails no request."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.redis_server import redis_server
from vecmill.cache import embedding_cache
from vecmill.cache.embedding_cache import EmbeddingCache
from vecmill.core.protocols import VectorStore
from vecmill.core.types import Vector
from vecmill.storage.redis import RedisVectors
from vecmill.storage.sqlite_vectors import SqliteVectors

WIDTH = 64
ROOM = 1_000_000_000

Open = Callable[[], EmbeddingCache]


def key(number: int) -> bytes:
    return number.to_bytes(8, "little") * 2


def vector(number: int) -> Vector:
    return np.random.default_rng(number).standard_normal(WIDTH).astype(np.float32)


@pytest.fixture(params=["sqlite", "redis"])
def reopen(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Open]:
    """Gives a cache, each time on the same store."""
    if request.param == "sqlite":
        yield lambda: EmbeddingCache(SqliteVectors(tmp_path / "cache.db", ROOM))
    else:
        with redis_server(tmp_path) as url:
            yield lambda: EmbeddingCache(RedisVectors(url))


def fill(cache: EmbeddingCache, numbers: range) -> None:
    for number in numbers:
        cache.keep(key(number), vector(number), WIDTH)


def held(cache: EmbeddingCache, numbers: range) -> list[int]:
    cached = cache.look_up([key(number) for number in numbers], WIDTH)
    for number in numbers:
        if key(number) in cached:
            assert np.allclose(cached[key(number)], vector(number), atol=2e-4)
    return [number for number in numbers if key(number) in cached]


def test_what_was_kept_is_there_at_once_and_after_a_restart(reopen: Open) -> None:
    cache = reopen()
    fill(cache, range(10))
    assert held(cache, range(12)) == list(range(10))
    cache.close()
    cache = reopen()
    assert held(cache, range(12)) == list(range(10))
    assert held(cache, range(0)) == []
    cache.close()


def test_clear_forgets_all_of_it(reopen: Open) -> None:
    cache = reopen()
    fill(cache, range(5))
    cache.close()
    cache = reopen()
    fill(cache, range(5, 7))
    assert cache.clear() >= 5
    assert held(cache, range(7)) == []
    cache.close()
    cache = reopen()
    assert held(cache, range(7)) == []
    cache.close()


def test_models_of_different_widths_share_it(tmp_path: Path) -> None:
    cache = EmbeddingCache(SqliteVectors(tmp_path / "cache.db", ROOM))
    cache.keep(key(1), np.ones(8, np.float32), 8)
    cache.keep(key(2), np.ones(16, np.float32), 4)
    cache.close()
    cache = EmbeddingCache(SqliteVectors(tmp_path / "cache.db", ROOM))
    assert list(cache.look_up([key(1), key(2)], 8)) == [key(1)]  # another width: another model's, or damaged
    assert list(cache.look_up([key(2)], 16)) == [key(2)]
    cache.close()


def test_the_least_recently_used_go_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding_cache, "TOUCHED_ENTRIES", 0)
    path, room = tmp_path / "cache.db", 400_000

    def open_cache() -> EmbeddingCache:
        return EmbeddingCache(SqliteVectors(path, room))

    for start in range(0, 2000, 500):  # far less than the room
        cache = open_cache()
        fill(cache, range(start, start + 500))
        cache.close()
    cache = open_cache()
    assert len(held(cache, range(500))) == 500  # used again
    cache.close()
    for start in range(2000, 6000, 500):
        cache = open_cache()
        assert len(held(cache, range(200))) == 200  # again and again
        fill(cache, range(start, start + 500))
        cache.close()
    cache = open_cache()
    assert len(held(cache, range(200))) == 200
    assert held(cache, range(500, 1500)) == []
    assert len(held(cache, range(5500, 6000))) == 500
    cache.close()
    assert path.stat().st_size <= room * 1.1


class Blocked(SqliteVectors):
    """Writes when it is told to."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, ROOM)
        self.go = threading.Event()

    def put(self, *arguments: object) -> int:
        self.go.wait()
        return super().put(*arguments)  # type: ignore[arg-type]


def test_a_store_that_cannot_keep_up_costs_entries_not_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding_cache, "PENDING_BYTES", 100 * WIDTH * 4)
    store = Blocked(tmp_path / "cache.db")
    cache = EmbeddingCache(store)
    fill(cache, range(150))
    assert held(cache, range(150)) == list(range(100))
    assert cache.stats.lost == 50
    store.go.set()
    cache.close()
    assert cache.stats.written == 100


def test_a_locked_database_is_read_and_written_once_it_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("vecmill.storage.sqlite_vectors.BUSY_SECONDS", 0.0)
    monkeypatch.setattr(embedding_cache, "RETRY_SECONDS", 0.01)
    path = tmp_path / "cache.db"
    cache = EmbeddingCache(SqliteVectors(path, ROOM))
    fill(cache, range(3))
    cache.close()
    cache = EmbeddingCache(SqliteVectors(path, ROOM))
    assert held(cache, range(3)) == [0, 1, 2]
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    fill(cache, range(3, 6))
    wait_for(lambda: cache.failing)
    assert held(cache, range(6)) == list(range(6))
    holder.execute("ROLLBACK")
    holder.close()
    wait_for(lambda: cache.stats.written == 3)
    assert not cache.failing
    cache.close()
    assert sum("used to write (database is locked)" in record.message for record in caplog.records) == 1


def wait_for(condition: Callable[[], bool]) -> None:
    while not condition():
        threading.Event().wait(0.001)  # the writer's thread needs its turn


@pytest.mark.parametrize("when", ["before", "while open"])
def test_a_corrupt_database_is_set_aside_and_a_new_one_begun(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding_cache, "RETRY_SECONDS", 0.01)
    path = tmp_path / "cache.db"
    cache = EmbeddingCache(SqliteVectors(path, ROOM))
    fill(cache, range(2000))
    if when == "before":
        cache.close()
        path.write_bytes(b"garbage " * 20_000)
        cache = EmbeddingCache(SqliteVectors(path, ROOM))
    else:
        wait_for(lambda: cache.stats.written == 2000)
        path.write_bytes(b"garbage " * (path.stat().st_size // 8))
        path.with_name("cache.db-wal").write_bytes(b"")
    wait_for(lambda: not held(cache, range(2000)) and list(tmp_path.glob("*.aside-*")) != [])
    fill(cache, range(10))
    wait_for(lambda: cache.stats.written in (10, 2010))
    cache.close()
    cache = EmbeddingCache(SqliteVectors(path, ROOM))
    assert held(cache, range(12)) == list(range(10))
    cache.close()


def test_without_redis_everything_is_a_miss_and_nothing_raises(tmp_path: Path) -> None:
    with redis_server(tmp_path) as url:
        cache = EmbeddingCache(RedisVectors(url))
        fill(cache, range(3))
        wait_for(lambda: cache.stats.written == 3)
        assert held(cache, range(3)) == [0, 1, 2]
    assert held(cache, range(3)) == []
    assert cache.failing
    fill(cache, range(3, 5))
    cache.close()


def test_keys_that_begin_alike_are_told_apart(tmp_path: Path) -> None:
    store: VectorStore = SqliteVectors(tmp_path / "cache.db", ROOM)
    kept, newcomer = b"a" * 16, b"a" * 8 + b"b" * 8
    store.put({kept: b"one"}, ())
    assert store.get([newcomer]) == {}
    assert store.get([kept]) == {kept: b"one"}
    store.put({newcomer: b"other"}, ())
    assert store.get([kept]) == {kept: b"one"}  # the newcomer has no place
    store.close()
