"""A cache of a million vectors: how long a look-up takes, and what a vector takes on disk."""

import os
import random
import time
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from vecmill.cache.embedding_cache import KEY_BYTES
from vecmill.cache.vector_format import decode_values, encode_vectors
from vecmill.storage.sqlite_vectors import SqliteVectors

AT_A_TIME = 500  # as many as a busy GPU gives between two writes
KEYS = 64
LOOK_UPS = 200
SEED = 0
ROOM = 2**40


def measure_store(folder: Path, entries: int, dimensions: int, advance: Callable[[int], None]) -> dict[str, Any]:
    """Fill the store as the server does, then look up keys drawn at random, cold and warm."""
    path = folder / "cache.db"
    store = SqliteVectors(path, ROOM)
    generator = np.random.default_rng(SEED)
    started = time.perf_counter()
    for start in range(0, entries, AT_A_TIME):
        vectors = generator.standard_normal((AT_A_TIME, dimensions), np.float32)
        keys = [key(number) for number in range(start, start + AT_A_TIME)]
        store.put(dict(zip(keys, encode_vectors(vectors, dimensions), strict=True)), ())
        advance(AT_A_TIME)
    filled = time.perf_counter() - started
    store.close()  # which writes SQLite's log back into the file
    size = path.stat().st_size
    _forget(path)
    store = SqliteVectors(path, ROOM)
    store.get([key(0)])
    cold = _look_ups(store, entries, dimensions)
    warm = _look_ups(store, entries, dimensions)
    store.close()
    return {
        "entries": entries,
        "dimensions": dimensions,
        "entries_per_second": entries / filled,
        "bytes_per_entry": size / entries,
        "value_bytes": len(encode_vectors(np.ones((1, dimensions), np.float32), dimensions)[0]),
        "look_up_ms": {"cold": cold, "warm": warm},
    }


def key(number: int) -> bytes:
    """As spread out as a real one."""
    return blake2b(number.to_bytes(8, "little"), digest_size=KEY_BYTES).digest()


def _forget(path: Path) -> None:
    """Have the system drop the file from its memory, so that the first look-ups read the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _look_ups(store: SqliteVectors, entries: int, dimensions: int) -> dict[str, Any]:
    """Milliseconds of `KEYS` keys at once, decoded."""
    draw = random.Random(SEED)
    taken = []
    for _ in range(LOOK_UPS):
        keys = [key(number) for number in draw.sample(range(entries), KEYS)]
        started = time.perf_counter()
        found = decode_values(store.get(keys), dimensions)
        taken.append(1000 * (time.perf_counter() - started))
        if len(found) != KEYS:
            raise RuntimeError(f"{KEYS - len(found)} of {KEYS} keys are missing")
    p50, p99 = (float(value) for value in np.percentile(taken, (50, 99)))
    return {"p50": p50, "p99": p99, "max": max(taken)}
