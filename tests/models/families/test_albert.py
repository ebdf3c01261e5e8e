"""ALBERT equals sentence-transformers on the same files: one layer for all, groups, several layers in a group."""

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

embedder = partial(tiny_encoder, kind="albert")
reranker = partial(tiny_encoder, kind="albert", task=Task.RERANK)
TINY = (
    TinyModel(Task.EMBED, "albert", embedder, layer_runs=3),
    TinyModel(Task.RERANK, "albert", reranker, second_text=True, layer_runs=3),
)


async def test_vectors_and_scores_equal_sentence_transformers(tmp_path: Path) -> None:
    embedders = [
        embedder(tmp_path / "paraphrase-albert"),
        embedder(tmp_path / "groups", num_hidden_layers=4, num_hidden_groups=2, inner_group_num=2),
    ]
    rerankers = [reranker(tmp_path / "pairs"), reranker(tmp_path / "pairs-of-groups", num_hidden_groups=3)]
    await assert_equal_to_sentence_transformers(embedders, rerankers)


@pytest.mark.parametrize("tiny", TINY, ids=str)
def test_bfloat16_is_near(tmp_path: Path, tiny: TinyModel) -> None:
    assert_near_in_bfloat16(tiny, tiny.write(tmp_path / "tiny"))


def test_weights_of_pretraining(tmp_path: Path) -> None:
    assert_weights_of_pretraining_load(
        embedder(tmp_path / "tiny"), "albert.", ["predictions.bias", "sop_classifier.classifier.weight"]
    )


@pytest.mark.parametrize(
    ("task", "keys", "expected"),
    [
        (Task.EMBED, {"inner_group_num": 0}, "`inner_group_num`"),
        (Task.EMBED, {"num_hidden_groups": None}, "`num_hidden_groups`"),
        (Task.EMBED, {"position_embedding_type": "relative_key"}, "`position_embedding_type`"),
        (Task.EMBED, {"embedding_size": "128"}, "`embedding_size`"),
        (Task.RERANK, {"type_vocab_size": 1}, "`type_vocab_size`"),
        (Task.RERANK, {"id2label": {"0": "no", "1": "yes"}}, "`id2label`"),
    ],
    ids=str,
)
def test_what_is_not_implemented_is_refused(tmp_path: Path, task: Task, keys: dict[str, Any], expected: str) -> None:
    write = embedder if task is Task.EMBED else reranker
    assert expected in refusal(lambda: write(tmp_path / "tiny"), task, **keys)
