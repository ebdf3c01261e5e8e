"""ELECTRA equals sentence-transformers on the same files: token embeddings as wide as its layers, or narrower."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.models.encoders import (
    assert_equal_to_sentence_transformers,
    assert_near_in_bfloat16,
    assert_weights_of_pretraining_load,
    refusal,
)
from tests.models.families import TinyModel
from tests.tiny_encoders import tiny_encoder
from vecmill.core.types import Task

embedder = partial(tiny_encoder, kind="electra")
reranker = partial(tiny_encoder, kind="electra", task=Task.RERANK)
TINY = (
    TinyModel(Task.EMBED, "electra", embedder),
    TinyModel(Task.RERANK, "electra", reranker, second_text=True),
)


async def test_vectors_and_scores_equal_sentence_transformers(tmp_path: Path) -> None:
    embedders = [embedder(tmp_path / "small"), embedder(tmp_path / "base", embedding_size=32)]
    rerankers = [reranker(tmp_path / "ms-marco-electra-base", embedding_size=32), reranker(tmp_path / "narrow")]
    await assert_equal_to_sentence_transformers(embedders, rerankers)


@pytest.mark.parametrize("tiny", TINY, ids=str)
def test_bfloat16_is_near(tmp_path: Path, tiny: TinyModel) -> None:
    assert_near_in_bfloat16(tiny, tiny.write(tmp_path / "tiny"))


def test_weights_of_pretraining(tmp_path: Path) -> None:
    assert_weights_of_pretraining_load(
        embedder(tmp_path / "tiny"), "electra.", ["discriminator_predictions.dense.weight", "generator_lm_head.bias"]
    )


@pytest.mark.parametrize(
    ("task", "keys", "expected"),
    [
        (Task.EMBED, {"embedding_size": None}, "`embedding_size`"),
        (Task.EMBED, {"position_embedding_type": "relative_key_query"}, "`position_embedding_type`"),
        (Task.EMBED, {"num_hidden_groups": 1}, "the key `num_hidden_groups`"),
        (Task.RERANK, {"type_vocab_size": 1}, "`type_vocab_size`"),
        (Task.RERANK, {"architectures": ["ElectraForPreTraining"]}, "Others have no head that scores a pair"),
    ],
    ids=str,
)
def test_what_is_not_implemented_is_refused(tmp_path: Path, task: Task, keys: dict[str, Any], expected: str) -> None:
    write = embedder if task is Task.EMBED else reranker
    assert expected in refusal(lambda: write(tmp_path / "tiny"), task, **keys)
