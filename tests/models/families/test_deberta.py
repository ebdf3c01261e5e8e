"""DeBERTa v3 cross-encoders equal sentence-transformers on the same files: distances in buckets, or each by itself."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models.encoders import assert_equal_to_sentence_transformers, assert_near_in_bfloat16, refusal
from tests.models.families import TinyModel
from tests.models.loaded import ids, load_model, run
from tests.tiny_encoders import tiny_encoder
from vecmill.core.types import Row, Task
from vecmill.engine.compilation import compile_layers

reranker = partial(tiny_encoder, kind="deberta-v2", task=Task.RERANK)
TINY = (TinyModel(Task.RERANK, "deberta-v2", reranker, flash=False),)
ROWS = [Row(ids(*range(10, 10 + length))) for length in (5, 5, 40, 80)]


async def test_scores_equal_sentence_transformers(tmp_path: Path) -> None:
    rerankers = [
        reranker(tmp_path / "mxbai-rerank-base-v1"),
        reranker(tmp_path / "each-distance", position_buckets=-1, norm_rel_ebd="none"),
        reranker(tmp_path / "nearer", position_buckets=-1, max_relative_positions=20, num_attention_heads=8),
        reranker(tmp_path / "narrow", embedding_size=16, position_buckets=8, max_relative_positions=64),
    ]
    await assert_equal_to_sentence_transformers([], rerankers)


def test_bfloat16_is_near(tmp_path: Path) -> None:
    assert_near_in_bfloat16(TINY[0], reranker(tmp_path / "tiny"))


def test_unused_positions_are_left_out(tmp_path: Path) -> None:
    folder = reranker(tmp_path / "tiny")
    wanted = run(load_model(folder, Task.RERANK)[1], ROWS)
    weights = load_file(folder / "model.safetensors")
    weights["deberta.embeddings.position_embeddings.weight"] = torch.ones(128, 32)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    np.testing.assert_array_equal(run(load_model(folder, Task.RERANK)[1], ROWS), wanted)


@torch.inference_mode()
def test_compiled_layers_give_the_same(tmp_path: Path) -> None:
    torch.compiler.reset()
    model = load_model(reranker(tmp_path / "tiny"), Task.RERANK)[1]
    wanted = run(model, ROWS)

    def run_tokens(tokens: int) -> float:
        run(model, [Row(ids(*range(tokens % 100 + 1)))])
        return 0.0

    compile_layers(model.layers, run_tokens, backend="eager")
    np.testing.assert_allclose(run(model, ROWS), wanted, atol=1e-5)
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"type_vocab_size": 2}, "`type_vocab_size`: 2; supported: 0"),
        ({"position_biased_input": True}, "`position_biased_input`"),
        ({"relative_attention": False}, "`relative_attention`"),
        ({"pos_att_type": ["c2p"]}, "`pos_att_type`"),
        ({"share_att_key": False}, "`share_att_key`"),
        ({"conv_kernel_size": 3}, "`conv_kernel_size`"),
        ({"position_buckets": 0}, "`position_buckets`"),
        ({"pooler_hidden_size": 64}, "`pooler_hidden_size`: 64; supported: `hidden_size` (32)"),
        ({"pooler_hidden_act": "prelu"}, "`pooler_hidden_act`"),
        ({"id2label": {"0": "no", "1": "yes"}}, "`id2label`"),
    ],
    ids=str,
)
def test_what_is_not_implemented_is_refused(tmp_path: Path, keys: dict[str, Any], expected: str) -> None:
    assert expected in refusal(lambda: reranker(tmp_path / "tiny"), Task.RERANK, **keys)
