"""RoBERTa, CamemBERT and XLM-R: one architecture, held against sentence-transformers on the same files."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models.encoders import (
    assert_equal_to_sentence_transformers,
    assert_near_in_bfloat16,
    assert_weights_of_pretraining_load,
    refusal,
)
from tests.models.families import TinyModel
from tests.models.loaded import CPU, ids, load_model, run
from tests.tiny_checkpoints import edit_json, tiny_cross_encoder, tiny_xlm_roberta, write
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


def as_jina_reranker_v2(source: Path, folder: Path, **keys: Any) -> Path:
    """An XLM-R with a head under the keys and names of weights of jina-reranker-v2-base-multilingual."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    del config["model_type"]
    code = "xlm_roberta.XLMRoberta"
    of_code = {
        "auto_map": {
            "AutoConfig": f"configuration_{code}FlashConfig",
            "AutoModel": f"modeling_{code}Model",
            "AutoModelForSequenceClassification": f"modeling_{code}ForSequenceClassification",
        },
        "emb_pooler": None,
        "num_labels": 1,
        "position_embedding_type": "absolute",
        "use_flash_attn": True,
    }
    write(folder / "config.json", {**config, **of_code, **keys})
    weights = load_file(folder / "model.safetensors")
    layers = {name.split(".")[3] for name in weights if name.startswith("roberta.encoder.layer.")}
    for layer, leaf in ((f"roberta.encoder.layer.{number}.", leaf) for number in layers for leaf in ("weight", "bias")):
        parts = [weights.pop(f"{layer}attention.self.{part}.{leaf}") for part in ("query", "key", "value")]
        weights[f"{layer}mixer.Wqkv.{leaf}"] = torch.cat(parts)
    names = {
        "encoder.layer.": "encoder.layers.",
        "embeddings.LayerNorm.": "emb_ln.",
        "attention.output.dense.": "mixer.out_proj.",
        "attention.output.LayerNorm.": "norm1.",
        "intermediate.dense.": "mlp.fc1.",
        "output.dense.": "mlp.fc2.",
        "output.LayerNorm.": "norm2.",
    }
    for old, new in names.items():
        weights = {name.replace(old, new): weight for name, weight in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_jina_reranker_v2_gives_what_its_weights_give_under_transformers_names(tmp_path: Path) -> None:
    source = tiny_cross_encoder(tmp_path / "native", kind="xlm-roberta")
    folder = as_jina_reranker_v2(source, tmp_path / "jina-reranker-v2")
    rows = [Row(ids(*range(10, 10 + length))) for length in (3, 40)]
    wanted, scores = (run(load_model(each, Task.RERANK)[1], rows) for each in (source, folder))
    np.testing.assert_array_equal(scores, wanted)
    assert read(Source("x", folder, Task.RERANK)).family.model_type == "xlm-roberta"


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"position_embedding_type": "rotary"}, '`position_embedding_type`: "rotary"'),
        ({"lora_adaptations": ["x"]}, "the key `lora_adaptations`"),
        ({"auto_map": {"AutoConfig": "someone/else--configuration_xlm_roberta.XLMRobertaFlashConfig"}}, "`auto_map`"),
    ],
    ids=str,
)
def test_of_jina_reranker_v2_is_refused(tmp_path: Path, keys: dict[str, Any], expected: str) -> None:
    source = tiny_cross_encoder(tmp_path / "native", kind="xlm-roberta")
    assert expected in refusal(lambda: as_jina_reranker_v2(source, tmp_path / "tiny"), Task.RERANK, **keys)


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
