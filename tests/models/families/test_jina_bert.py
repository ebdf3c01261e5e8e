"""JinaBERT, for which transformers has no class, equals its mathematics written out for each text alone.

ALiBi both ways, gates, and the layout of jina-embeddings-v2-base-code.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from tests.conftest import serving
from tests.models.encoders import DOCUMENTS, MAX_LENGTH, QUERIES, TEXTS, assert_near_in_bfloat16, refusal
from tests.models.families import TinyModel
from tests.models.loaded import ids, load_model, run, unit
from tests.tiny_checkpoints import edit_json, plain_tokenizer
from tests.tiny_encoders import tiny_jina
from vecmill.core.errors import StartupError
from vecmill.core.types import Row, Task
from vecmill.models import family
from vecmill.models.biased_layers import alibi_slopes
from vecmill.models.checkpoint import Source, read

reranker = partial(tiny_jina, task=Task.RERANK)
TINY = (
    TinyModel(Task.EMBED, "jina_bert", tiny_jina, flash=False),
    TinyModel(Task.EMBED, "jina_bert", partial(tiny_jina, code=True), flash=False, layout="code"),
    TinyModel(Task.RERANK, "jina_bert", reranker, second_text=True, flash=False),
)


class WrittenOut:
    """JinaBERT of one text or pair, from config.json and the weights alone."""

    def __init__(self, folder: Path) -> None:
        self.config = json.loads((folder / "config.json").read_text("utf-8"))
        stored = load_file(folder / "model.safetensors")
        self.weights = {name.removeprefix("bert."): each.float() for name, each in stored.items()}

    def linear(self, name: str, value: Tensor) -> Tensor:
        return value @ self.weights[f"{name}.weight"].T + self.weights.get(f"{name}.bias", torch.zeros(()))

    def norm(self, name: str, value: Tensor) -> Tensor:
        centred = value - value.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + self.config["layer_norm_eps"]).sqrt()
        normed: Tensor = scaled * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]
        return normed

    def attention(self, name: str, value: Tensor) -> Tensor:
        heads = self.config["num_attention_heads"]
        query, key, held = (self.linear(f"{name}.self.{part}", value) for part in ("query", "key", "value"))
        if f"{name}.self.layer_norm_q.weight" in self.weights:
            query, key = self.norm(f"{name}.self.layer_norm_q", query), self.norm(f"{name}.self.layer_norm_k", key)
        query, key, held = (part.view(len(value), heads, -1).transpose(0, 1) for part in (query, key, held))
        index = torch.arange(len(value))
        distances = (index[:, None] - index[None]).abs()
        scores = query @ key.transpose(1, 2) / query.shape[-1] ** 0.5
        # The slopes of 4 heads, or of 6: those of 4, and two more between them.
        slopes = torch.tensor([2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3][:heads])[:, None, None]
        attended = (torch.softmax(scores - slopes * distances, dim=-1) @ held).transpose(0, 1).flatten(1)
        return self.norm(f"{name}.output.LayerNorm", self.linear(f"{name}.output.dense", attended) + value)

    def feed_forward(self, layer: str, value: Tensor) -> Tensor:
        kind = self.config.get("feed_forward_type", "original")
        act: Callable[[Tensor], Tensor] = torch.relu if kind == "reglu" else gelu
        if kind == "original":
            inner = self.linear(f"{layer}.output.dense", act(self.linear(f"{layer}.intermediate.dense", value)))
            return self.norm(f"{layer}.output.LayerNorm", inner + value)
        if f"{layer}.mlp.up_gated_layer.weight" in self.weights:
            up, gate = self.linear(f"{layer}.mlp.up_gated_layer", value).chunk(2, dim=-1)
            return self.norm(f"{layer}.layer_norm_2", self.linear(f"{layer}.mlp.down_layer", up * act(gate)) + value)
        gate, up = self.linear(f"{layer}.mlp.gated_layers", value).chunk(2, dim=-1)
        return self.norm(f"{layer}.mlp.layernorm", self.linear(f"{layer}.mlp.wo", act(gate) * up) + value)

    @torch.inference_mode()
    def hidden_states(self, token_ids: list[int], types: list[int] | None = None) -> Tensor:
        """(T, width)"""
        embedded = self.weights["embeddings.word_embeddings.weight"][token_ids]
        embedded = embedded + self.weights["embeddings.token_type_embeddings.weight"][types or [0] * len(token_ids)]
        hidden = self.norm("embeddings.LayerNorm", embedded)
        for number in range(self.config["num_hidden_layers"]):
            layer = f"encoder.layer.{number}"
            attended = self.attention(f"{layer}.attention", hidden)
            if f"{layer}.layer_norm_1.weight" in self.weights:
                attended = self.norm(f"{layer}.layer_norm_1", hidden + attended)
            hidden = self.feed_forward(layer, attended)
        return hidden

    def score(self, token_ids: list[int], types: list[int]) -> float:
        first = self.hidden_states(token_ids, types)[0]
        return float(self.linear("classifier", torch.tanh(self.linear("pooler.dense", first))))


def gelu(value: Tensor) -> Tensor:
    return value * (1 + torch.erf(value / 2**0.5)) / 2


def vectors_of(folder: Path, texts: list[str]) -> NDArray[np.float32]:
    tokenizer, model = plain_tokenizer(folder), WrittenOut(folder)
    tokenizer.enable_truncation(MAX_LENGTH)
    return unit(np.stack([model.hidden_states(each.ids).mean(0).numpy() for each in tokenizer.encode_batch(texts)]))


def scores_of(folder: Path, query: str) -> list[float]:
    tokenizer, model = plain_tokenizer(folder), WrittenOut(folder)
    tokenizer.enable_truncation(MAX_LENGTH)
    pairs = tokenizer.encode_batch([(query, document) for document in DOCUMENTS])
    return [model.score(pair.ids, pair.type_ids) for pair in pairs]


async def test_vectors_and_scores_equal_the_mathematics(tmp_path: Path) -> None:
    embedders = [
        tiny_jina(tmp_path / "base-en"),
        tiny_jina(tmp_path / "base-code", code=True),
        tiny_jina(tmp_path / "six-heads", num_attention_heads=6, hidden_size=24, feed_forward_type="reglu"),
        tiny_jina(tmp_path / "without-gates", feed_forward_type="original"),
    ]
    tiny = reranker(tmp_path / "reranker-tiny")
    async with serving(embed_model=",".join(map(str, embedders)), rerank_model=str(tiny)) as client:
        for folder in embedders:
            answer = await client.post("/v1/embeddings", json={"model": folder.name, "input": TEXTS})
            assert answer.is_success, answer.text
            vectors = np.array([entry["embedding"] for entry in answer.json()["data"]])
            np.testing.assert_allclose(vectors, vectors_of(folder, TEXTS), atol=1e-5, rtol=0, err_msg=folder.name)
        for query in QUERIES:
            body = {"model": tiny.name, "query": query, "documents": DOCUMENTS, "raw_scores": True}
            answer = await client.post("/v1/rerank", json=body)
            assert answer.is_success, answer.text
            results = sorted(answer.json()["results"], key=lambda result: int(result["index"]))
            wanted = scores_of(tiny, query)
            assert np.ptp(wanted) > 0.1
            np.testing.assert_allclose([each["relevance_score"] for each in results], wanted, atol=1e-5, rtol=1e-5)
        [card] = [each for each in (await client.get("/v1/models")).json()["data"] if each["id"].endswith("base-en")]
        assert card["prompts_from"] is None


@pytest.mark.parametrize("tiny", TINY, ids=str)
def test_bfloat16_is_near(tmp_path: Path, tiny: TinyModel) -> None:
    assert_near_in_bfloat16(tiny, tiny.write(tmp_path / "tiny"))


def test_long_rows_run_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more of the bias is kept or made than the bound allows, and a longer row takes more blocks."""
    monkeypatch.setattr(family, "TABLE_BYTES", 4 * 4 * 64 * 2 * 1024)
    folder = tiny_jina(tmp_path / "tiny", max_position_embeddings=1024, max_length=1024)
    model = load_model(folder)[1]
    [table] = [buffer for name, buffer in model.modules[0].named_buffers() if name.endswith("table")]
    assert table.shape == (4, 64, 2048)
    asked = []
    attend = functional.scaled_dot_product_attention

    def counted(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor, **options: Any) -> Tensor:
        asked.append(tuple(attn_mask.shape))
        return attend(query, key, value, attn_mask=attn_mask, **options)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", counted)
    token_ids = np.random.default_rng(0).integers(0, model.vocab_size, 1000)
    vector = run(model, [Row(token_ids.astype(np.int32)), Row(ids(5, 6, 7))])[0]
    assert max(queries for _, _, queries, _ in asked) == 64
    assert sum(keys == 1000 for *_, keys in asked) == 2 * -(-1000 // 64)
    wanted = WrittenOut(folder).hidden_states(token_ids.tolist()).mean(0).numpy()
    np.testing.assert_allclose(vector, wanted, atol=1e-5, rtol=1e-5)


def test_slopes() -> None:
    """Of the paper's eight heads, and of twelve, as the base models have them."""
    assert alibi_slopes(8) == [2.0**-head for head in range(1, 9)]
    assert alibi_slopes(12) == [*(2.0**-head for head in range(1, 9)), 2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5]
    assert alibi_slopes(1) == [2.0**-8]


@pytest.mark.parametrize(
    "keys", [{}, {"auto_map": None}, {"model_type": "jina_bert", "architectures": ["JinaBertModel"]}]
)
def test_it_is_known_by_its_keys(tmp_path: Path, keys: dict[str, Any]) -> None:
    folder = tiny_jina(tmp_path / "tiny")
    edit_json(folder / "config.json", **keys)
    assert read(Source("x", folder)).family.model_type == "jina_bert"


def test_weights_of_pretraining_and_a_prefix(tmp_path: Path) -> None:
    """The files of most embedders are those of a masked language model."""
    folder = tiny_jina(tmp_path / "tiny")
    rows = [Row(ids(5, 6, 7, 8))]
    wanted = run(load_model(folder)[1], rows)
    weights = {f"bert.{name}": each for name, each in load_file(folder / "model.safetensors").items()}
    weights |= {name: torch.ones(2) for name in ("bert.pooler.dense.bias", "cls.predictions.bias")}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    np.testing.assert_array_equal(run(load_model(folder)[1], rows), wanted)


@pytest.mark.parametrize(
    ("task", "keys", "expected"),
    [
        (
            Task.EMBED,
            {"position_embedding_type": "absolute"},
            '`position_embedding_type`: "absolute"; supported: "alibi"',
        ),
        (Task.EMBED, {"feed_forward_type": "swiglu"}, '`feed_forward_type`: "swiglu"'),
        (Task.EMBED, {"emb_pooler": "cls"}, "`emb_pooler`"),
        (Task.EMBED, {"alibi_scaling": 2}, "the key `alibi_scaling`"),
        (Task.EMBED, {"auto_map": {"AutoModel": "someone/else--modeling_bert.JinaBertModel"}}, "`auto_map`"),
        (
            Task.EMBED,
            {"auto_map": {"AutoModel": "jinaai/jina-bert-flash-implementation--modeling_bert.BertModel"}},
            "`auto_map`",
        ),
        (Task.RERANK, {"num_labels": 2}, "`num_labels`: 2; supported: 1"),
        (Task.RERANK, {"id2label": {"0": "no", "1": "yes"}}, "`id2label`"),
        (Task.RERANK, {"architectures": ["JinaBertForSequenceClassification"]}, "`num_labels`: null; supported: 1"),
        (Task.RERANK, {"type_vocab_size": 1}, "`type_vocab_size`"),
    ],
    ids=str,
)
def test_what_is_not_implemented_is_refused(tmp_path: Path, task: Task, keys: dict[str, Any], expected: str) -> None:
    assert expected in refusal(lambda: tiny_jina(tmp_path / "tiny", task=task), task, **keys)


def test_an_embedder_is_no_reranker(tmp_path: Path) -> None:
    folder = tiny_jina(tmp_path / "tiny")
    (folder / "modules.json").unlink()
    with pytest.raises(StartupError, match=r"do not fit JinaBertForPairs: .* missing "):
        load_model(folder, Task.RERANK)
