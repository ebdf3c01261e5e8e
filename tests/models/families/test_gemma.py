"""bge-reranker-v2-gemma equals its library's recipe, put together here of transformers' model and tokenizer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.checkpoints.variants import reference_logits, refusal
from tests.conftest import serving
from tests.models.families import TinyModel
from tests.models.test_tolerances import OF_A_LOGIT, OF_A_RELEVANCE
from tests.tiny_checkpoints import GEMMA_MERGES, edit_json, gemma_vocabulary, write
from vecmill.config import load_settings
from vecmill.core.errors import StartupError
from vecmill.core.types import Task
from vecmill.engine.loader import load
from vecmill.models.families import published_model

QUESTION = (
    "Given a query A and a passage B, determine whether the passage contains an answer to the query by providing a "
    "prediction of either 'Yes' or 'No'."
)
QUERY = "How do I parse dates?"
DOCUMENTS = ("one", "", "the fox " * 90, "naïve 你好\n", "\n\nthe thing", " spaced  out ", "<eos> B: \nA: 'Yes'")
LINE_BREAKS = ("\n", "\n\n", "\n\n\n")


def tiny_gemma(folder: Path, **config: Any) -> Path:
    """A two-layer Gemma of 32 dimensions under the published name: a plain language model whose head is its embedding.
    Its tokenizer has "Yes" and, as Gemma's, line breaks as added tokens."""
    from transformers import GemmaConfig, GemmaForCausalLM, GemmaTokenizer

    folder = folder / "bge-reranker-v2-gemma"
    vocabulary = dict(gemma_vocabulary())
    for piece in (*LINE_BREAKS, "Y", "Ye", "Yes"):
        vocabulary.setdefault(piece, len(vocabulary))
    merges: Any = [*GEMMA_MERGES, ("Y", "e"), ("Ye", "s")]
    tokenizer = GemmaTokenizer(vocab=vocabulary, merges=merges, add_bos_token=True, model_max_length=256)
    tokenizer.add_tokens(list(LINE_BREAKS))
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    settings = {
        **{"vocab_size": len(vocabulary), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 24, "max_position_embeddings": 512},
        **{"hidden_act": "gelu", "initializer_range": 0.3},
    }
    model: Any = GemmaForCausalLM(GemmaConfig(**{**settings, **config}))
    for name, weight in model.named_parameters():
        if weight.ndim == 1:
            torch.nn.init.normal_(weight, std=0.3)
        elif "embed_tokens" in name:
            weight.data /= 3
    model.save_pretrained(folder)
    edit_json(folder / "config.json", hidden_act="gelu", hidden_activation=None)  # as the hub has it
    return folder


TINY = (TinyModel(Task.RERANK, "gemma", tiny_gemma, prefixes=True),)


@torch.inference_mode()
def logits_of_yes(folder: Path, query: str, documents: Sequence[str], room: int) -> NDArray[np.float32]:
    """FlagEmbedding's recipe for pairs of `room` tokens: each part tokenized by itself, the passage cut."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def tokens(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=False)["input_ids"]
        return ids

    line, question, [yes, *_] = tokens("\n"), tokens(QUESTION), tokens("Yes")
    scores = []
    for document in documents:
        first = [tokenizer.bos_token_id, *tokens(f"A: {query}"), *line]
        last = [*line, *question]
        pair = [*first, *tokens(f"B: {document}")[: room - len(first) - len(last)], *last]
        scores.append(float(model(input_ids=torch.tensor([pair])).logits[0, -1, yes]))
    return np.array(scores, dtype=np.float32)


async def test_scores_equal_its_librarys_recipe(tmp_path: Path) -> None:
    folder = tiny_gemma(tmp_path)
    async with serving(rerank_model=str(folder), allow_control_tokens=True) as client:
        for query in (QUERY, "two lines\nand a break\n"):
            wanted = logits_of_yes(folder, query, DOCUMENTS, room=256)
            assert wanted.std() > 0.05
            answer = await client.post("/rerank", json={"query": query, "texts": DOCUMENTS, "raw_scores": True})
            assert answer.is_success, answer.text
            served = [result["score"] for result in sorted(answer.json(), key=lambda result: int(result["index"]))]
            np.testing.assert_allclose(served, wanted, atol=OF_A_LOGIT, rtol=0)


async def test_every_dialect_gives_the_sigmoid_of_the_logit_of_yes(tmp_path: Path) -> None:
    folder = tiny_gemma(tmp_path)
    documents = [document for document in DOCUMENTS[:4] if document]
    logits = logits_of_yes(folder, QUERY, documents, room=256)
    relevance = 1 / (1 + np.exp(-logits))
    of_texts = {"query": QUERY, "texts": documents}
    of_documents = {"model": folder.name, "query": QUERY, "documents": documents}
    async with serving(rerank_model=str(folder)) as client:
        tei = (await client.post("/rerank", json=of_texts)).json()
        cohere, jina = [
            (await client.post(path, json=of_documents)).json()["results"] for path in ("/v2/rerank", "/v1/rerank")
        ]
        passages = [{"text": document} for document in documents]
        of_passages = {"model": folder.name, "query": {"text": QUERY}, "passages": passages, "truncate": "END"}
        nim = await client.post("/v1/ranking", json=of_passages)
        refused = await client.post("/v1/rerank", json={**of_documents, "instruction": "Find code"})
    assert nim.is_success, nim.text
    for results, field in ((tei, "score"), (cohere, "relevance_score"), (jina, "relevance_score")):
        given = [result[field] for result in sorted(results, key=lambda result: int(result["index"]))]
        np.testing.assert_allclose(given, relevance, atol=OF_A_RELEVANCE, rtol=0)
    given = [result["logit"] for result in sorted(nim.json()["rankings"], key=lambda result: int(result["index"]))]
    np.testing.assert_allclose(given, logits, atol=OF_A_LOGIT, rtol=0)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "instruction")


TEMPLATE = (
    "{{ bos_token }}A: {{ messages | selectattr('role', 'eq', 'query') | map(attribute='content') | first }}\n"
    "B: {{ messages | selectattr('role', 'eq', 'document') | map(attribute='content') | first }}\n" + QUESTION
)


def saved_by_sentence_transformers(folder: Path) -> Path:
    """The same with a chat template and a LogitScore, so that the prompt is tokenized whole."""
    folder = tiny_gemma(folder)
    folder = folder.rename(folder.with_name("another-name"))
    kinds = (("", "base.modules.transformer.Transformer"), ("1_LogitScore", "cross_encoder.modules.LogitScore"))
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.{kind}"}
        for index, (path, kind) in enumerate(kinds)
    ]
    write(folder / "modules.json", modules)
    yes = json.loads((folder / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]["Yes"]
    write(folder / "1_LogitScore" / "config.json", {"true_token_id": yes, "false_token_id": None})
    write(folder / "config_sentence_transformers.json", {"model_type": "CrossEncoder"})
    forward = {"method": "forward", "method_output_name": "logits"}
    module = {"transformer_task": "text-generation", "module_output_name": "causal_logits"}
    modality_config = {"text": forward, "message": {**forward, "format": "flat"}}
    write(folder / "sentence_bert_config.json", {**module, "modality_config": modality_config})
    (folder / "chat_template.jinja").write_text(TEMPLATE, "utf-8")
    return folder


async def test_a_template_whose_tokenizer_has_no_words_is_cut_where_no_token_crosses(tmp_path: Path) -> None:
    folder = saved_by_sentence_transformers(tmp_path)
    documents = tuple(document for document in DOCUMENTS if "<eos>" not in document)
    async with serving(rerank_model=str(folder)) as client:
        for query in (QUERY, "two lines\nand breaks\n\n"):
            body = {"query": query, "texts": list(documents), "raw_scores": True}
            answer = (await client.post("/rerank", json=body)).json()
            served = [result["score"] for result in sorted(answer, key=lambda result: int(result["index"]))]
            wanted = reference_logits(folder, documents, query)
            np.testing.assert_allclose(served, wanted, atol=OF_A_LOGIT, rtol=0)


def test_float16_is_refused(tmp_path: Path) -> None:
    settings = load_settings({"dtype": "float16", "rerank_model": str(tiny_gemma(tmp_path))})
    with pytest.raises(StartupError, match="range of float16: set DTYPE to auto, bfloat16 or float32"):
        load(settings.model, settings.engine, lambda percent, message: None)


def test_a_plain_gemma_is_no_reranker(tmp_path: Path) -> None:
    folder = tiny_gemma(tmp_path)
    assert "nothing in its files says that it is a reranker" in refusal(folder.rename(tmp_path / "gemma"), rerank=True)
    assert "model_type 'gemma' is not supported" in refusal(tmp_path / "gemma")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"use_bidirectional_attention": True}, "`use_bidirectional_attention`: true"),
        ({"hidden_activation": "silu"}, '`hidden_activation`: "silu"'),
        ({"query_pre_attn_scalar": 256}, "`query_pre_attn_scalar`"),
        ({"architectures": ["Gemma2ForCausalLM"]}, "`architectures`"),
        ({"auto_map": {"AutoModel": "modeling.Own"}}, "`auto_map`"),
    ],
)
def test_what_is_not_implemented_is_refused(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    folder = tiny_gemma(tmp_path)
    edit_json(folder / "config.json", **changes)
    assert sentence in refusal(folder, rerank=True)


def test_its_card_is_known_by_name_alone() -> None:
    card = published_model("BAAI/bge-reranker-v2-gemma")
    assert card is not None
    assert (card.answers.true, card.answers.false, card.answers.scale) == ("Yes", None, 1)
    assert published_model("BAAI/bge-reranker-v2.5-gemma2-lightweight") is None
