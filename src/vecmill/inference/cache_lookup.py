"""Texts whose vectors were kept: by their tokens, and without tokenizing them where they were seen lately."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b

from vecmill.cache.embedding_cache import KEY_BYTES, EmbeddingCache, row_key
from vecmill.core.types import Truncation, Vector
from vecmill.inference.text_tokenizer import Tokenized

# Tokenizing takes ten times as long as looking up a vector. Some 300 bytes each.
TEXTS_REMEMBERED = 100_000
DIGESTED_AT_ONCE = 262_144  # characters


@dataclass(frozen=True, slots=True)
class Recalled:
    """A text that need not be run."""

    vector: Vector
    key: bytes
    tokens: int
    truncated: bool

    def marked_as_cut(self) -> Recalled:
        """The same of a text that had been cut before it was tokenized."""
        return replace(self, truncated=True)


@dataclass(frozen=True, slots=True)
class Known:
    """What tokenizing a text came to."""

    key: bytes
    tokens: int
    truncated: bool


class TextMemory:
    """Digests of texts and their keys in the cache, half of them forgotten at a time: those that were not asked for
    longest. Safe to use from any thread.
    """

    def __init__(self, most: int = TEXTS_REMEMBERED) -> None:
        self._most = most
        self._new: dict[bytes, Known] = {}
        self._old: dict[bytes, Known] = {}
        self._lock = threading.Lock()

    def get(self, digest: bytes) -> Known | None:
        """What is known of a text."""
        if (known := self._new.get(digest)) is not None:
            return known
        if (known := self._old.get(digest)) is not None:
            self.add(digest, known)
        return known

    def add(self, digest: bytes, known: Known) -> None:
        """Remember a text."""
        with self._lock:
            if len(self._new) >= self._most // 2:
                self._old, self._new = self._new, {}
            self._new[digest] = known

    def __len__(self) -> int:
        return len(self._new) + len(self._old)


class SentBefore:
    """Which texts each API key has sent lately: of hits of others' texts a key is told nothing.

    Half of them are forgotten at a time. Belongs to the event loop's thread.
    """

    def __init__(self, most: int = TEXTS_REMEMBERED) -> None:
        self._most = most
        self._new: set[tuple[str, bytes]] = set()
        self._old: set[tuple[str, bytes]] = set()

    def told(self, owner: str, rows: Sequence[Tokenized | Recalled]) -> tuple[int, ...]:
        """Indexes of the rows that need not be run and that this key has sent before; all of them count as sent."""
        told = []
        for index, row in enumerate(rows):
            if row.key is None:
                continue
            pair = owner, row.key
            if isinstance(row, Recalled) and (pair in self._new or pair in self._old):
                told.append(index)
            self._new.add(pair)
        if len(self._new) > self._most:
            self._old, self._new = self._new, set()
        return tuple(told)


@dataclass(frozen=True, slots=True)
class Recall:
    """The way of one request's texts to the cache. Its methods are for worker threads."""

    cache: EmbeddingCache
    memory: TextMemory
    fingerprint: bytes
    """Of the model."""
    dimensions: int
    look_up: bool
    """False: compute anew, and keep that."""
    truncate: bool
    """Whether a text may be answered that was cut."""
    as_read: bool = False
    """Whether a vector that is not written yet must look as if it were."""

    def of_texts(
        self, encode: Callable[[Sequence[str]], list[Tokenized]], prompt: str, truncation: Truncation
    ) -> Callable[[Sequence[str]], list[Tokenized | Recalled]]:
        """What does for texts what `encode` does, without tokenizing those that are known."""
        how = f"{truncation.side} {truncation.max_tokens} {prompt}".encode("utf-8", "surrogatepass")
        context = blake2b(how, digest_size=32, key=self.fingerprint).digest()

        def recall(texts: Sequence[str]) -> list[Tokenized | Recalled]:
            digests = [_digest(text, context) for text in texts]
            found = self._known(digests)
            missing = [index for index, one in enumerate(found) if one is None]
            encoded = self.of_rows(encode([texts[index] for index in missing])) if missing else []
            for index, one in zip(missing, encoded, strict=True):
                found[index] = one
                if one.key is not None:
                    self.memory.add(digests[index], Known(one.key, one.tokens, one.truncated))
            return [one for one in found if one is not None]

        return recall

    def _known(self, digests: Sequence[bytes]) -> list[Tokenized | Recalled | None]:
        known = [self.memory.get(digest) if self.look_up else None for digest in digests]
        keys = [one.key for one in known if one is not None]
        vectors = self.cache.look_up(keys, self.dimensions, as_read=self.as_read) if keys else {}
        return [
            Recalled(vectors[one.key], one.key, one.tokens, one.truncated)
            if one is not None and one.key in vectors and (self.truncate or not one.truncated)
            else None
            for one in known
        ]

    def of_rows(self, rows: Sequence[Tokenized]) -> list[Tokenized | Recalled]:
        """The rows with their keys, or what is kept in place of them."""
        keys = [row_key(self.fingerprint, one.row) for one in rows]
        vectors = self.cache.look_up(keys, self.dimensions, as_read=self.as_read) if self.look_up else {}
        return [
            Recalled(vectors[key], key, one.tokens, one.truncated)
            if key in vectors and (self.truncate or not one.too_long)
            else replace(one, key=key)
            for key, one in zip(keys, rows, strict=True)
        ]


def _digest(text: str, context: bytes) -> bytes:
    """In pieces: neither a copy of a long text nor the interpreter held while it is made."""
    digest = blake2b(digest_size=KEY_BYTES, key=context)
    for start in range(0, len(text), DIGESTED_AT_ONCE):
        digest.update(text[start : start + DIGESTED_AT_ONCE].encode("utf-8", "surrogatepass"))
    return digest.digest()
