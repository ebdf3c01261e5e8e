"""Vectors computed before, looked up at once and written behind the answer, and the keys they are kept under."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from math import inf
from time import monotonic
from typing import Literal, NamedTuple

import numpy as np

from vecmill.cache.vector_format import decode_values, encode_vectors
from vecmill.core.protocols import StoreFailed, StoreSize, VectorStore
from vecmill.core.types import ModelCard, Row, Vector

logger = logging.getLogger(__name__)

PENDING_BYTES = 67_108_864  # computed and not yet written; what is more is not kept
TOUCHED_ENTRIES = 100_000  # whose use is written down once, not every time
# Between two writes, so that many small ones become one. What is not written when the process is killed is lost.
WRITE_EVERY = 0.1
RETRY_SECONDS = 5.0  # without the store after it has failed
SIZE_EVERY = 5.0
CLOSE_SECONDS = 10.0


@dataclass(slots=True)
class CacheStats:
    """Counters since the start."""

    written: int = 0
    dropped: int = 0
    """For lack of room: the least recently used."""
    lost: int = 0
    """Never written: the store failed, or could not keep up."""


class Kept(NamedTuple):
    """A vector on its way to the store."""

    vector: Vector
    smallest: int
    """Dimensions that a client may ask for."""


class EmbeddingCache:
    """Full-width vectors by key. A store that fails is left alone for a while; nobody is refused for it."""

    def __init__(self, store: VectorStore, dtype: Literal["auto", "float32"] = "auto") -> None:
        """Takes the store over: closes it in the end."""
        self._store = store
        self._exact = dtype == "float32"
        self._lock = threading.Lock()
        self._storing = threading.Lock()
        self._pending: dict[bytes, Kept] = {}
        self._writing: dict[bytes, Kept] = {}
        self._pending_bytes = 0
        self._used: dict[bytes, None] = {}
        self._touched: set[bytes] = set()
        self._closing = threading.Event()
        self._failed_at: dict[str, float] = {}  # what failed last, and when
        self.stats = CacheStats()
        self.size = StoreSize(0, 0)
        """As last measured, every few seconds."""
        self._start_writer()

    def _start_writer(self) -> None:
        self._writer = threading.Thread(target=self._write_forever, name="cache-writer", daemon=True)
        self._writer.start()

    @property
    def failing(self) -> bool:
        """True from a failure of the store until it works again."""
        return bool(self._failed_at) or not self._writer.is_alive()

    def look_up(self, keys: Sequence[bytes], dimensions: int, *, as_read: bool = False) -> dict[bytes, Vector]:
        """The vectors, (dimensions,) each, that are there. For worker threads: it reads from disk.

        `as_read`: also those that are not written yet are rounded as they will be.
        """
        pending, writing = self._pending, self._writing
        kept = {key: waiting for key in keys if (waiting := pending.get(key) or writing.get(key)) is not None}
        vectors = {
            key: self.as_read([waiting.vector], waiting.smallest)[0] if as_read else waiting.vector
            for key, waiting in kept.items()
        }
        missing = [key for key in keys if key not in vectors]
        if missing and not self._left_alone():
            vectors |= self._read(missing, dimensions)
        return vectors

    def as_read(self, vectors: Sequence[Vector], smallest: int) -> list[Vector]:
        """What would be read if these were kept: rounded, so that an answer does not show whether it was."""
        encoded = encode_vectors(np.stack(vectors), smallest, exact=self._exact)
        keys = [b"%d" % index for index in range(len(encoded))]
        read = decode_values(dict(zip(keys, encoded, strict=True)), len(vectors[0]))
        return [read.get(key, vector) for key, vector in zip(keys, vectors, strict=True)]

    def _left_alone(self) -> bool:
        return monotonic() - self._failed_at.get("read", -inf) < RETRY_SECONDS

    def _read(self, keys: Sequence[bytes], dimensions: int) -> dict[bytes, Vector]:
        try:
            vectors = decode_values(self._store.get(keys), dimensions)
        except Exception as error:  # whatever it is, the vectors can be computed
            self._failed("read", error)
            return {}
        self._worked("read")
        self._touch(vectors)
        return vectors

    def _touch(self, keys: Iterable[bytes]) -> None:
        new = [key for key in keys if key not in self._touched]
        if not new:
            return
        with self._lock:
            self._used.update(dict.fromkeys(new))
            self._touched.update(new)

    def keep(self, key: bytes, vector: Vector, smallest: int) -> None:
        """Write a vector, soon. Returns at once."""
        self.keep_all([(key, vector)], smallest)

    def keep_all(self, vectors: Sequence[tuple[bytes, Vector]], smallest: int) -> None:
        """Write vectors, each under its key, soon. Returns at once."""
        with self._lock:
            for key, vector in vectors:
                if self._pending_bytes + vector.nbytes > PENDING_BYTES or self._closing.is_set():
                    self.stats.lost += 1
                elif key not in self._pending:
                    self._pending[key] = Kept(vector, smallest)
                    self._pending_bytes += vector.nbytes
            if not (self._writer.is_alive() or self._closing.is_set()):
                logger.error("the thread that writes the embedding cache has ended: another takes its place")
                with suppress(RuntimeError):  # the system gives no thread: the next vector tries again
                    self._start_writer()

    def clear(self) -> int:
        """Forget everything; how many entries that were. It may take seconds.

        Raises:
            StoreFailed: it cannot be done now.
        """
        with self._storing:
            dropped = self._store.clear()
            # Not before: where the store fails, what is on its way to it is still to be written.
            with self._lock:
                self._pending_bytes = 0
                for waiting in (self._pending, self._writing, self._used, self._touched):
                    waiting.clear()
            self._measure()
        return dropped

    def close(self) -> None:
        """Write what is left, and close the store."""
        self._closing.set()
        self._writer.join(CLOSE_SECONDS)
        self._store.close()

    def _write_forever(self) -> None:
        """Looks now and then: to be woken for each vector would cost the searches that it comes from."""
        self._measure()
        measured, last = monotonic(), False
        while not last:
            last = self._closing.wait(RETRY_SECONDS if "write" in self._failed_at else WRITE_EVERY)
            self._write()
            if "read" in self._failed_at and not self._left_alone():  # nobody may look anything up for hours
                self._read([bytes(KEY_BYTES)], 1)
            if monotonic() - measured >= SIZE_EVERY:
                self._measure()
                measured = monotonic()

    def _take(self) -> dict[bytes, None]:
        self._writing, self._pending = {**self._writing, **self._pending}, {}
        used, self._used = self._used, {}
        if len(self._touched) > TOUCHED_ENTRIES:
            self._touched.clear()
        return used

    def _write(self) -> None:
        try:
            with self._lock:
                used = self._take()
            if not self._writing and not used:
                return
            with self._storing:
                self.stats.dropped += self._store.put(self._encoded(), used)
        except StoreFailed as error:
            self._failed("write", error)
            return  # and try again
        except Exception as error:  # not the store's: what cannot be written today cannot be tomorrow
            self.stats.lost += len(self._writing)
            self._failed("write", error)
        else:
            self.stats.written += len(self._writing)
            self._worked("write")
        with self._lock:
            self._writing = {}
            self._pending_bytes = sum(kept.vector.nbytes for kept in self._pending.values())

    def _encoded(self) -> dict[bytes, bytes]:
        """Models have different widths: those of one are encoded together."""
        groups: dict[tuple[int, int], list[bytes]] = {}
        for key, kept in self._writing.items():
            groups.setdefault((len(kept.vector), kept.smallest), []).append(key)
        encoded: dict[bytes, bytes] = {}
        for (_, smallest), keys in groups.items():
            vectors = np.stack([self._writing[key].vector for key in keys])
            encoded |= zip(keys, encode_vectors(vectors, smallest, exact=self._exact), strict=True)
        return encoded

    def _measure(self) -> None:
        with suppress(Exception):  # reading or writing will say so; the thread goes on
            self.size = self._store.size()

    def _failed(self, what: str, error: Exception) -> None:
        if what not in self._failed_at:
            logger.error(
                "the embedding cache cannot be used to %s (%s): going on without until it can",
                what,
                str(error) or type(error).__name__,
                exc_info=None if isinstance(error, StoreFailed) else error,
            )
        self._failed_at[what] = monotonic()

    def _worked(self, what: str) -> None:
        if self._failed_at.pop(what, None) is not None:
            logger.warning("the embedding cache can be used to %s again", what)


KEY_BYTES = 16
# Raised when the same tokens give other vectors than before: a new packing, another pooling, or the positions of tokens
# after a padding in an XLM-R's text.
FORMAT = 2


def model_fingerprint(card: ModelCard) -> bytes:
    """Of the model as it is loaded: what was read of its files, in which type its weights are, pooled how.

    Prompts and truncation are part of the token ids. The device, the attention kernels and the versions of the
    libraries change the last bits only, which the stated tolerances allow for; but in float32 CUDA multiplies in TF32,
    which has 10 bits of mantissa. Where the last bits are promised, all that they depend on counts: servers that share
    a store then share what they would compute to the bit.
    """
    dtype = "tf32" if card.dtype == "float32" and card.device.startswith("cuda") else card.dtype
    parts = [FORMAT, card.id, card.fingerprint, card.family, dtype, card.pooling, card.dimensions]
    parts += [] if card.numerics is None else [card.numerics]
    return blake2b(json.dumps(parts).encode(), digest_size=32).digest()


def owner_fingerprint(fingerprint: bytes, owner: str) -> bytes:
    """A model's fingerprint for the vectors of one API key, where keys do not share theirs."""
    return blake2b(owner.encode(), digest_size=len(fingerprint), key=fingerprint).digest()


def vector_keys(fingerprint: bytes, rows: Sequence[Row]) -> list[bytes]:
    """What each input's vector is kept under: the token ids that run, which of them the pooling leaves out, and the
    adapter that they are run with."""
    empty = blake2b(digest_size=KEY_BYTES, key=fingerprint)
    keys = []
    for row in rows:
        digest = empty.copy()  # making one with a key hashes the key each time
        digest.update(row.token_ids.tobytes())
        digest.update(b"%d,%d" % (row.unpooled, -1 if row.second_text is None else row.second_text))
        if row.adapter is not None:
            digest.update(b",%d" % row.adapter)
        keys.append(digest.digest())
    return keys
