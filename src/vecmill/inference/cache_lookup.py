"""Looking up vectors in the cache: by a text's token ids, or, for a text seen lately, without tokenizing it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from typing import NamedTuple

from vecmill.cache.embedding_cache import KEY_BYTES, EmbeddingCache, owner_fingerprint, vector_keys
from vecmill.core.threads import WorkerThreads
from vecmill.core.types import CacheControl, Caller, ModelCard, Truncation, Vector
from vecmill.inference.text_tokenizer import Tokenized
from vecmill.scheduler.lines import Keep

# Tokenizing takes ten times as long as looking up a vector. Some 300 bytes each.
TEXTS_REMEMBERED = 100_000
DIGESTED_AT_ONCE = 262_144  # characters


@dataclass(eq=False, slots=True)
class CachedRow:
    """A text whose vector was in the cache: it is not run."""

    vector: Vector
    key: bytes
    tokens: int
    truncated: bool

    def marked_as_cut(self) -> CachedRow:
        """The same row, counted as truncated: its text had been cut before it was tokenized."""
        return replace(self, truncated=True)


class KnownText(NamedTuple):
    """What tokenizing a text gave, as far as a cache hit needs it."""

    key: bytes
    tokens: int
    truncated: bool


class TextMemory:
    """Digests of texts and their keys in the cache. Safe to use from any thread.

    When it is full, the half that was not asked for lately is dropped.
    """

    def __init__(self, most: int = TEXTS_REMEMBERED) -> None:
        self._most = most
        self._new: dict[bytes, KnownText] = {}
        self._old: dict[bytes, KnownText] = {}
        self._lock = threading.Lock()

    def get(self, digest: bytes) -> KnownText | None:
        """What is known of a text; None if it is not remembered."""
        if (known := self._new.get(digest)) is not None:
            return known
        if (known := self._old.get(digest)) is not None:
            self.add({digest: known})
        return known

    def add(self, texts: Mapping[bytes, KnownText]) -> None:
        """Remember texts by their digests."""
        with self._lock:
            if len(self._new) >= self._most // 2:
                self._old, self._new = self._new, {}
            self._new.update(texts)

    def __len__(self) -> int:
        return len(self._new) + len(self._old)


class SentBefore:
    """Which texts each API key has sent lately, so that a key learns nothing from hits on other keys' texts.

    When it is full, the older half is dropped. Belongs to the event loop's thread.
    """

    def __init__(self, most: int = TEXTS_REMEMBERED) -> None:
        self._most = most
        self._new: set[tuple[str, bytes]] = set()
        self._old: set[tuple[str, bytes]] = set()

    def reported_hits(self, owner: str, rows: Sequence[Tokenized | CachedRow]) -> tuple[int, ...]:
        """Indexes of the cache hits on texts that this key had sent before. All rows count as sent from now on."""
        reported = []
        for index, row in enumerate(rows):
            if row.key is None:
                continue
            pair = owner, row.key
            if isinstance(row, CachedRow) and (pair in self._new or pair in self._old):
                reported.append(index)
            self._new.add(pair)
        if len(self._new) > self._most:
            self._old, self._new = self._new, set()
        return tuple(reported)


@dataclass(frozen=True, slots=True)
class CacheLookup:
    """How the texts of one request are looked up. Its methods run in worker threads: they read from disk."""

    cache: EmbeddingCache
    memory: TextMemory
    fingerprint: bytes
    """The model's; where keys do not share vectors, the model's for one API key."""
    dimensions: int
    read: bool
    """False: every vector is computed anew (and then kept)."""
    truncate: bool
    """Whether a text that was cut may be answered."""
    as_stored: bool = False
    """Whether vectors that are not written yet are rounded as if they were read back."""

    def cached_encoder(
        self,
        encode: Callable[[Sequence[str]], list[Tokenized]],
        prompt: str,
        truncation: Truncation,
        adapter: int | None = None,
    ) -> Callable[[Sequence[str]], list[Tokenized | CachedRow]]:
        """Wrap `encode` so that texts seen before skip tokenization."""
        how = f"{truncation.side} {truncation.max_tokens} {adapter} {prompt}".encode("utf-8", "surrogatepass")
        empty = blake2b(digest_size=KEY_BYTES, key=blake2b(how, digest_size=32, key=self.fingerprint).digest())

        def encode_or_look_up(texts: Sequence[str]) -> list[Tokenized | CachedRow]:
            digests = [_digest(text, empty) for text in texts]
            rows = self._look_up_known(digests)
            missing = [index for index, row in enumerate(rows) if row is None]
            encoded = self.look_up_rows(encode([texts[index] for index in missing])) if missing else []
            new = {}
            for index, row in zip(missing, encoded, strict=True):
                rows[index] = row
                if row.key is not None:
                    new[digests[index]] = KnownText(row.key, row.tokens, row.truncated)
            if new:
                self.memory.add(new)
            return [row for row in rows if row is not None]

        return encode_or_look_up

    def _look_up_known(self, digests: Sequence[bytes]) -> list[Tokenized | CachedRow | None]:
        known = [self.memory.get(digest) if self.read else None for digest in digests]
        keys = [text.key for text in known if text is not None]
        vectors = self.cache.look_up(keys, self.dimensions, as_read=self.as_stored) if keys else {}
        return [
            CachedRow(vectors[text.key], text.key, text.tokens, text.truncated)
            if text is not None and text.key in vectors and (self.truncate or not text.truncated)
            else None
            for text in known
        ]

    def look_up_rows(self, rows: Sequence[Tokenized]) -> list[Tokenized | CachedRow]:
        """The kept vector of each row that has one; other rows get the key that theirs will be kept under."""
        keys = vector_keys(self.fingerprint, [row.row for row in rows])
        vectors = self.cache.look_up(keys, self.dimensions, as_read=self.as_stored) if self.read else {}
        found: list[Tokenized | CachedRow] = []
        for key, row in zip(keys, rows, strict=True):
            vector = vectors.get(key)
            if vector is not None and (self.truncate or not row.too_long):
                found.append(CachedRow(vector, key, row.tokens, row.truncated))
            else:
                row.key = key
                found.append(row)
        return found


class CachePolicy:
    """Which requests may read and write the cache, and what their answers may tell of it.

    Belongs to the event loop's thread.
    """

    def __init__(
        self, threads: WorkerThreads, *, cache_queries: bool, cache_across_keys: bool, several_keys: Callable[[], bool]
    ) -> None:
        """`several_keys`: whether more than one API key opens the server now."""
        self.cache: EmbeddingCache | None = None
        self._threads = threads
        self._cache_queries, self._across_keys, self._several_keys = cache_queries, cache_across_keys, several_keys
        self._memory = TextMemory()
        self._sent = SentBefore()

    def lookup(
        self, card: ModelCard, fingerprint: bytes, caller: Caller, *, is_query: bool, truncate: bool
    ) -> CacheLookup | None:
        """How a request's texts are looked up; None where the request, or a setting, rules the cache out."""
        private = is_query and not self._cache_queries
        if self.cache is None or private or caller.cache_control is CacheControl.NO_STORE:
            return None
        partition = self.partition(caller)
        return CacheLookup(
            self.cache,
            self._memory,
            owner_fingerprint(fingerprint, partition) if partition else fingerprint,
            card.dimensions or 0,
            read=caller.cache_control is not CacheControl.NO_CACHE,
            truncate=truncate,
            as_stored=self.hides_hits,
        )

    def partition(self, caller: Caller) -> str:
        """Equal texts share one vector within a partition only: everyone's is "", with CACHE_ACROSS_KEYS=false each
        key has its own.
        """
        return "" if self._across_keys else caller.owner or ""

    def keep(self, card: ModelCard) -> Keep | None:
        """A function that hands keys and their vectors to the cache; None without a cache, and for a reranker."""
        if self.cache is None or not card.supported_dimensions:
            return None
        return partial(self.cache.keep_all, smallest=min(card.supported_dimensions))

    @property
    def hides_hits(self) -> bool:
        """Whether no answer may show that its texts were sent by another key."""
        return self.cache is not None and self._across_keys and self._several_keys()

    async def disguise(
        self, vectors: Sequence[Vector], rows: Sequence[Tokenized | CachedRow], card: ModelCard, owner: str | None
    ) -> tuple[list[Vector], tuple[int, ...]]:
        """Round new vectors as cached ones are rounded, so that a hit cannot be told from a miss.

        Returns all vectors, and the indexes of the hits that `owner` may be told of.
        """
        disguised = list(vectors)
        new = [index for index, row in enumerate(rows) if isinstance(row, Tokenized) and row.key is not None]
        if new and self.cache is not None:
            smallest = min(card.supported_dimensions)
            read = partial(self.cache.as_read, [disguised[index] for index in new], smallest)
            rounded = await self._threads.run_if_large(read, size=disguised[0].nbytes * len(new))
            for index, vector in zip(new, rounded, strict=True):
                disguised[index] = vector
        return disguised, self._sent.reported_hits(owner or "", rows)


def _digest(text: str, empty: blake2b) -> bytes:
    """Hash a text piece by piece, so that a long one is not copied whole and other threads can run in between.

    `empty`: a hash of nothing, which is copied: making one with a key hashes the key each time.
    """
    digest = empty.copy()
    for start in range(0, len(text), DIGESTED_AT_ONCE):
        digest.update(text[start : start + DIGESTED_AT_ONCE].encode("utf-8", "surrogatepass"))
    return digest.digest()
