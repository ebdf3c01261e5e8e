"""DistilBERT equals sentence-transformers on the same files: its own names of sizes, its own head, no token types."""

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

embedder = partial(tiny_encoder, kind="distilbert")
reranker = partial(tiny_encoder, kind="distilbert", task=Task.RERANK, seed=1)
TINY = (
    TinyModel(Task.EMBED, "distilbert", embedder),
    TinyModel(Task.RERANK, "distilbert", reranker),
)


async def test_vectors_and_scores_equal_sentence_transformers(tmp_path: Path) -> None:
    embedders = [
        embedder(tmp_path / "multi-qa-distilbert"),
        embedder(tmp_path / "tas-b", pooling="cls_token"),
        embedder(tmp_path / "relu", activation="relu", n_heads=2, sinusoidal_pos_embds=True),
    ]
    await assert_equal_to_sentence_transformers(embedders, [reranker(tmp_path / "pairs")])


@pytest.mark.parametrize("tiny", TINY, ids=str)
def test_bfloat16_is_near(tmp_path: Path, tiny: TinyModel) -> None:
    assert_near_in_bfloat16(tiny, tiny.write(tmp_path / "tiny"))


def test_weights_of_pretraining(tmp_path: Path) -> None:
    assert_weights_of_pretraining_load(
        embedder(tmp_path / "tiny"),
        "distilbert.",
        ["vocab_projector.bias", "vocab_transform.weight", "vocab_layer_norm.weight"],
    )


@pytest.mark.parametrize(
    ("task", "keys", "expected"),
    [
        (Task.EMBED, {"activation": "prelu"}, "`activation`"),
        (Task.EMBED, {"hidden_act": "relu"}, "the key `hidden_act`"),
        (Task.EMBED, {"hidden_size": 64}, "`dim` (32) and `hidden_size` (64), which do not agree"),
        (Task.EMBED, {"n_layers": 2.5}, "`n_layers`"),
        (Task.RERANK, {"num_attention_heads": 2}, "`n_heads` (4) and `num_attention_heads` (2)"),
        (Task.RERANK, {"architectures": ["DistilBertForQuestionAnswering"]}, "Others have no head that scores a pair"),
        (Task.RERANK, {"id2label": {"0": "no", "1": "yes"}}, "`id2label`"),
    ],
    ids=str,
)
def test_what_is_not_implemented_is_refused(tmp_path: Path, task: Task, keys: dict[str, Any], expected: str) -> None:
    write = embedder if task is Task.EMBED else reranker
    assert expected in refusal(lambda: write(tmp_path / "tiny"), task, **keys)
