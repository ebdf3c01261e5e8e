"""MPNet equals sentence-transformers on the same files: a bias for distances that all layers share."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.models.encoders import (
    assert_equal_to_sentence_transformers,
    assert_near_in_bfloat16,
    assert_weights_of_pretraining_load,
    refusal,
)
from tests.models.families import TinyModel
from tests.models.loaded import CPU, ids, load_model, run
from tests.tiny_encoders import tiny_encoder
from vecmill.core.types import Row, Task
from vecmill.engine.compilation import compile_layers
from vecmill.models import packed_attention
from vecmill.models.packing import Attention, pack

embedder = partial(tiny_encoder, kind="mpnet")
reranker = partial(tiny_encoder, kind="mpnet", task=Task.RERANK)
TINY = (
    TinyModel(Task.EMBED, "mpnet", embedder, flash=False),
    TinyModel(Task.RERANK, "mpnet", reranker, flash=False),
)


async def test_vectors_and_scores_equal_sentence_transformers(tmp_path: Path) -> None:
    embedders = [
        embedder(tmp_path / "all-mpnet"),
        embedder(tmp_path / "multi-qa-mpnet", pooling="cls_token", num_attention_heads=8, hidden_act="relu"),
        # With texts longer than the distances that the buckets tell apart.
        embedder(tmp_path / "long", max_position_embeddings=702, max_length=700),
    ]
    await assert_equal_to_sentence_transformers(embedders, [reranker(tmp_path / "pairs")])


@pytest.mark.parametrize("tiny", TINY, ids=str)
def test_bfloat16_is_near(tmp_path: Path, tiny: TinyModel) -> None:
    assert_near_in_bfloat16(tiny, tiny.write(tmp_path / "tiny"))


def test_weights_of_pretraining(tmp_path: Path) -> None:
    others = ["lm_head.bias", "mpnet.pooler.dense.weight"]
    assert_weights_of_pretraining_load(embedder(tmp_path / "tiny"), "mpnet.", others)


@torch.inference_mode()
def test_compiled_layers_and_the_bias(tmp_path: Path) -> None:
    """The same vectors compiled; one table for all layers; without it, others."""
    torch.compiler.reset()
    model = load_model(embedder(tmp_path / "tiny"))[1]
    rows = [Row(ids(*range(10, 10 + length))) for length in (5, 5, 40, 80)]
    wanted = run(model, rows)
    tables = [buffer for name, buffer in model.modules[0].named_buffers() if name.endswith("table")]
    assert len(tables) == 1

    def run_tokens(tokens: int) -> float:
        run(model, [Row(ids(*range(tokens % 100 + 1)))])
        return 0.0

    compile_layers(model.layers, run_tokens, backend="eager")
    np.testing.assert_allclose(run(model, rows), wanted, atol=1e-6)
    tables[0].zero_()
    assert np.abs(run(model, rows) - wanted).max() > 0.01
    torch.compiler.reset()


def test_flash_kernels_are_never_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_attention, "_varlen", None)
    model = load_model(embedder(tmp_path / "tiny"))[1]
    packed = pack([Row(ids(5, 6, 7))], CPU, attention=Attention.FLASH)
    with torch.inference_mode():
        np.testing.assert_array_equal(model.forward(packed).numpy(), run(model, [Row(ids(5, 6, 7))]))


@pytest.mark.parametrize(
    ("task", "keys", "expected"),
    [
        (Task.EMBED, {"relative_attention_num_buckets": 64}, "`relative_attention_num_buckets`: 64; supported: 32"),
        (Task.EMBED, {"pad_token_id": 0}, "`pad_token_id`: 0; supported: 1"),
        (Task.EMBED, {"type_vocab_size": 2}, "the key `type_vocab_size`"),
        (Task.EMBED, {"relative_attention_max_distance": 64}, "the key `relative_attention_max_distance`"),
        (Task.RERANK, {"architectures": ["MPNetForTokenClassification"]}, "Others have no head that scores a pair"),
        (Task.RERANK, {"id2label": {"0": "no", "1": "yes"}}, "`id2label`"),
    ],
    ids=str,
)
def test_what_is_not_implemented_is_refused(tmp_path: Path, task: Task, keys: dict[str, Any], expected: str) -> None:
    write = embedder if task is Task.EMBED else reranker
    assert expected in refusal(lambda: write(tmp_path / "tiny"), task, **keys)
