"""A key stands for one vector: whatever changes the numbers changes the key."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from vecmill.cache.embedding_cache import KEY_BYTES, model_fingerprint, vector_keys
from vecmill.core.types import ModelCard, Row, Task

CARD = ModelCard(
    id="BAAI/bge-base-en-v1.5",
    task=Task.EMBED,
    family="bert",
    revision="a5beb1e3e68b",
    fingerprint="0f1e2d3c",
    dimensions=768,
    supported_dimensions=(768,),
    max_model_len=512,
    vocab_size=30522,
    pooling="cls",
    dtype="bfloat16",
    dtype_reason="",
    device="cpu",
    weight_bytes=1,
)


def row(*ids: int, unpooled: int = 0) -> Row:
    return Row(np.array(ids, np.int32), unpooled=unpooled)


@pytest.mark.parametrize(
    "change",
    [{"id": "other"}, {"fingerprint": "b"}, {"dtype": "float32"}, {"pooling": "mean"}, {"family": "qwen3"}],
    ids=lambda change: next(iter(change)),
)
def test_another_model_content_dtype_or_pooling_is_another_key(change: dict[str, str]) -> None:
    before, after = model_fingerprint(CARD), model_fingerprint(replace(CARD, **change))  # type: ignore[arg-type]
    assert vector_keys(before, [row(1, 2)]) != vector_keys(after, [row(1, 2)])


def test_what_does_not_change_the_numbers_does_not_change_the_key() -> None:
    same = replace(
        CARD,
        device="cuda:0",
        revision="b",
        max_model_len=128,
        prompts={"query": "q: "},
        aliases=("bge",),
        dtype_reason="x",
    )
    assert model_fingerprint(same) == model_fingerprint(CARD)


def test_float32_by_tf32_is_another_key_than_float32() -> None:
    whole = replace(CARD, dtype="float32", device="cpu (2 threads)")
    assert model_fingerprint(whole) != model_fingerprint(replace(whole, device="cuda:0 (NVIDIA H100)"))


def test_other_tokens_or_other_unpooled_tokens_are_another_key() -> None:
    model = model_fingerprint(CARD)
    rows = [
        row(1, 2),
        row(2, 1),
        row(1, 2, 3),
        row(1),
        row(1, 2, unpooled=1),
        Row(np.array([1, 2], np.int32), None, 0, 1),
    ]
    keys = set(vector_keys(model, rows))
    assert len(keys) == len(rows)
    assert {len(key) for key in keys} == {KEY_BYTES}
    assert vector_keys(model, [row(1, 2)])[0] in keys
