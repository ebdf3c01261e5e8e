"""RoBERTa, CamemBERT and XLM-R: one architecture, held against sentence-transformers on the same files."""

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
from tests.tiny_checkpoints import edit_json, tiny_cross_encoder, tiny_xlm_roberta
from tests.tiny_encoders import tiny_encoder
from vecmill.core.types import Row, Task
from vecmill.models import networks
from vecmill.models.checkpoint import Source, read
from vecmill.models.weights import Target

TINY = (
    TinyModel(Task.EMBED, "roberta", partial(tiny_encoder, kind="roberta")),
    TinyModel(Task.EMBED, "xlm-roberta", tiny_xlm_roberta),
    TinyModel(Task.EMBED, "camembert", partial(tiny_encoder, kind="camembert")),
    TinyModel(Task.RERANK, "roberta", partial(tiny_encoder, kind="roberta", task=Task.RERANK)),
    TinyModel(Task.RERANK, "xlm-roberta", lambda folder: tiny_cross_encoder(folder, kind="xlm-roberta")),
    TinyModel(Task.RERANK, "camembert", partial(tiny_encoder, kind="camembert", task=Task.RERANK)),
)


async def test_vectors_and_scores_equal_sentence_transformers(tmp_path: Path) -> None:
    embedders = [
        tiny_encoder(tmp_path / "distilroberta", "roberta"),
        tiny_encoder(tmp_path / "granite", "roberta", pooling="cls_token"),
        tiny_encoder(tmp_path / "camembert", "camembert"),
    ]
    rerankers = [tiny_encoder(tmp_path / f"{kind}-pairs", kind, Task.RERANK) for kind in ("roberta", "camembert")]
    # Byte-level BPE tells a word at the beginning from one after a space, unless `add_prefix_space`.
    spaced = tiny_encoder(tmp_path / "spaced", "roberta")
    edit_json(spaced / "tokenizer_config.json", add_prefix_space=True)
    await assert_equal_to_sentence_transformers([*embedders, spaced], rerankers)


@pytest.mark.parametrize("tiny", [tiny for tiny in TINY if tiny.model_type != "xlm-roberta"], ids=str)
def test_bfloat16_is_near(tmp_path: Path, tiny: TinyModel) -> None:
    assert_near_in_bfloat16(tiny, tiny.write(tmp_path / "tiny"))


def test_positions_begin_after_the_padding(tmp_path: Path) -> None:
    """514 positions are 512 tokens, here 130 and 128."""
    folder = tiny_encoder(tmp_path / "tiny", "roberta", max_length=512)
    assert load_model(folder)[0].max_model_len == 128


def test_weights_of_a_masked_language_model(tmp_path: Path) -> None:
    folder = tiny_encoder(tmp_path / "tiny", "camembert")
    assert_weights_of_pretraining_load(folder, "roberta.", ["lm_head.bias", "lm_head.dense.weight"])


@pytest.mark.parametrize(
    ("task", "keys", "expected"),
    [
        (Task.EMBED, {"position_embedding_type": "relative_key"}, "`position_embedding_type`"),
        (Task.EMBED, {"pad_token_id": None}, "`pad_token_id`"),
        (Task.EMBED, {"is_decoder": True}, "`is_decoder`"),
        (Task.EMBED, {"adapters": {}}, "the key `adapters`"),
        (Task.EMBED, {"architectures": ["XLMRobertaModel"]}, "`architectures`"),
        (Task.RERANK, {"architectures": ["RobertaForMaskedLM"]}, "Others have no head that scores a pair"),
        (Task.RERANK, {"id2label": {"0": "no", "1": "yes"}}, "`id2label`"),
    ],
    ids=str,
)
def test_what_is_not_implemented_is_refused(tmp_path: Path, task: Task, keys: dict[str, Any], expected: str) -> None:
    assert expected in refusal(lambda: tiny_encoder(tmp_path / "tiny", "roberta", task), task, **keys)


def test_a_shared_cross_encoder_keeps_its_head(tmp_path: Path, minilm_folder: Path) -> None:
    """Loaded a second time from the same weights it gives the same scores."""
    folder = tiny_cross_encoder(tmp_path / "tiny", kind="bert", tokenizer_from=minilm_folder)
    target = Target(torch.float32, CPU)
    first, second = (networks.load_model(read(Source("tiny", folder, Task.RERANK)), target) for _ in range(2))
    row = [Row(ids(5, 6, 7))]
    np.testing.assert_array_equal(run(first, row), run(second, row))
