"""What is remembered of texts is bounded, and what is asked for stays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from vecmill.cache.embedding_cache import EmbeddingCache
from vecmill.core.types import Row, Truncation
from vecmill.inference.cache_lookup import CachedRow, CacheLookup, KnownText, TextMemory
from vecmill.inference.text_tokenizer import Tokenized
from vecmill.storage.sqlite_vectors import SqliteVectors

TEXTS = ["one", "two"]
WIDTH = 8


def known(number: int) -> KnownText:
    return KnownText(number.to_bytes(16, "little"), number, truncated=False)


def test_the_memory_is_bounded_and_keeps_what_is_asked_for() -> None:
    memory = TextMemory(most=100)
    for number in range(1000):
        memory.add({b"%d" % number: known(number)})
        assert memory.get(b"0") == known(0)
        assert len(memory) <= 101
    assert memory.get(b"999") == known(999)
    assert memory.get(b"500") is None


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[EmbeddingCache]:
    cache = EmbeddingCache(SqliteVectors(tmp_path / "cache.db", 1_000_000_000))
    yield cache
    cache.close()


def test_what_was_kept_before_a_restart_is_tokenized_once(cache: EmbeddingCache) -> None:
    """The memory of texts goes with the process, the vectors do not."""
    tokenized: list[str] = []

    def encode(texts: Sequence[str]) -> list[Tokenized]:
        tokenized.extend(texts)
        return [Tokenized(Row(np.frombuffer(text.encode(), np.uint8).astype(np.int32)), len(text)) for text in texts]

    def ask(memory: TextMemory) -> Sequence[Tokenized | CachedRow]:
        lookup = CacheLookup(cache, memory, b"model", WIDTH, read=True, truncate=True)
        return lookup.cached_encoder(encode, "", Truncation())(TEXTS)

    for row in ask(TextMemory()):
        assert isinstance(row, Tokenized)
        assert row.key is not None
        cache.keep(row.key, np.ones(WIDTH, np.float32), WIDTH)
    tokenized.clear()
    after_restart = TextMemory()
    for _ in range(2):
        assert all(isinstance(row, CachedRow) for row in ask(after_restart))
    assert tokenized == TEXTS
