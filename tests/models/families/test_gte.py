"""GTE in the hub's layouts: `gte` equals sentence-transformers, `new` what its paper and code compute."""

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
from torch.nn import functional as F

from tests.conftest import serving
from tests.models.encoders import (
    DOCUMENTS,
    QUERIES,
    TEXTS,
    assert_equal_to_sentence_transformers,
    assert_near_in_bfloat16,
    refusal,
)
from tests.models.families import TinyModel
from tests.models.loaded import load_model, run
from tests.tiny_checkpoints import (
    _as_sentence_transformer,
    _write_xlm_roberta_tokenizer,
    copy_tokenizer,
    edit_json,
    plain_tokenizer,
    write,
)
from vecmill.core.errors import StartupError
from vecmill.core.types import Row, Task
from vecmill.models.cards import choose_prompts, supported_dimensions
from vecmill.models.checkpoint import Source, read
from vecmill.models.source import find

WIDTH, HEADS, INNER, LAYERS, LENGTH = 32, 4, 48, 2, 100
OWN_CODE = {
    "new": {
        "AutoConfig": "Alibaba-NLP/new-impl--configuration.NewConfig",
        "AutoModel": "Alibaba-NLP/new-impl--modeling.NewModel",
    },
    "gte": {
        "AutoConfig": "configuration_hf_alibaba_nlp_gte.GteConfig",
        "AutoModel": "modeling_hf_alibaba_nlp_gte.GteModel",
    },
}
NTK = {"type": "ntk", "factor": 8.0}


def tiny_gte(
    folder: Path,
    kind: str = "new",
    task: Task = Task.EMBED,
    *,
    english: bool = False,
    packed: bool = True,
    seed: int = 0,
    **keys: Any,
) -> Path:
    """A two-layer GTE of 32 dimensions: config.json, names of weights and tokenizer as the hub's, its code left out.

    Args:
        kind: `model_type`.
        english: with BERT's tokenizer and no token types, as gte-base-en-v1.5; else XLM-RoBERTa's.
        packed: whether queries, keys and values are one weight.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if english:
        copy_tokenizer(find("auto").folder, folder)
        edit_json(folder / "tokenizer_config.json", model_max_length=LENGTH)
    else:
        _write_xlm_roberta_tokenizer(folder, max_length=LENGTH)
    vocab_size = plain_tokenizer(folder).get_vocab_size()
    architecture = {"new": "New", "gte": "Gte"}[kind]
    config = {
        **{"vocab_size": vocab_size, "hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": LAYERS},
        **{"num_attention_heads": HEADS, "max_position_embeddings": 128, "type_vocab_size": 0 if english else 1},
        **{"model_type": kind, "auto_map": OWN_CODE[kind], "hidden_act": "gelu", "hidden_dropout_prob": 0.1},
        **{"attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0, "initializer_range": 0.02},
        **{"layer_norm_eps": 1e-12, "layer_norm_type": "layer_norm", "logn_attention_clip1": False},
        **{"logn_attention_scale": False, "pack_qkv": packed, "position_embedding_type": "rope"},
        **{"rope_scaling": NTK if kind == "new" else None, "rope_theta": 20000, "torch_dtype": "float32"},
        **{"pad_token_id": 0 if english else 1, "unpad_inputs": "true", "use_memory_efficient_attention": "true"},
        **{"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "transformers_version": "4.39.1"},
    }
    head = task is Task.RERANK
    config["architectures"] = [f"{architecture}{'ForSequenceClassification' if head else 'Model'}"]
    write(folder / "config.json", {**config, **keys})
    prefix = kind if head else ""
    weights = {f"{prefix}.{name}" if prefix else name: value for name, value in _encoder(config, packed, seed).items()}
    save_file({**weights, **(_head(prefix, seed) if head else {})}, folder / "model.safetensors")
    if head:
        return folder
    return _as_sentence_transformer(folder, ["Transformer", "Pooling", "Normalize"], "cls_token", None, LENGTH)


def _encoder(config: dict[str, Any], packed: bool, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, int]] = {"embeddings.word_embeddings.weight": (config["vocab_size"], WIDTH)}
    if config["type_vocab_size"]:
        shapes["embeddings.token_type_embeddings.weight"] = (config["type_vocab_size"], WIDTH)
    biases, norms = {}, ["embeddings.LayerNorm"]
    for layer in (f"encoder.layer.{number}" for number in range(LAYERS)):
        parts = {"qkv_proj": 3 * WIDTH} if packed else dict.fromkeys(("q_proj", "k_proj", "v_proj"), WIDTH)
        for part, out in {**parts, "o_proj": WIDTH}.items():
            shapes[f"{layer}.attention.{part}.weight"] = (out, WIDTH)
            biases[f"{layer}.attention.{part}.bias"] = out
        shapes[f"{layer}.mlp.up_gate_proj.weight"] = (2 * INNER, WIDTH)
        shapes[f"{layer}.mlp.down_proj.weight"] = (WIDTH, INNER)
        biases[f"{layer}.mlp.down_proj.bias"] = WIDTH
        norms += [f"{layer}.attn_ln", f"{layer}.mlp_ln"]
    weights = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    weights |= {name: 0.1 * torch.randn(size, generator=generator) for name, size in biases.items()}
    for norm in norms:
        weights[f"{norm}.weight"] = 1 + 0.1 * torch.randn(WIDTH, generator=generator)
        weights[f"{norm}.bias"] = 0.1 * torch.randn(WIDTH, generator=generator)
    return weights


def _head(prefix: str, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed + 1)
    shapes = {
        **{f"{prefix}.pooler.dense.weight": (WIDTH, WIDTH), f"{prefix}.pooler.dense.bias": (WIDTH,)},
        **{"classifier.weight": (1, WIDTH), "classifier.bias": (1,)},
    }
    return {name: 0.5 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


class Reference:
    """The network of the paper and of the hub's `new`, one text after the other, in float64."""

    def __init__(self, folder: Path) -> None:
        self.config = json.loads((folder / "config.json").read_text("utf-8"))
        stored = load_file(folder / "model.safetensors")
        self.weights = {name.removeprefix("new."): weight.double() for name, weight in stored.items()}
        self.tokenizer = plain_tokenizer(folder)
        self.tokenizer.enable_truncation(LENGTH)

    def linear(self, name: str, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def norm(self, name: str, hidden: Tensor) -> Tensor:
        scale, shift = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return F.layer_norm(hidden, (WIDTH,), scale, shift, self.config["layer_norm_eps"])

    def rotated(self, heads: Tensor) -> Tensor:
        """(heads, T, head_dim), turned by its positions; the NTK scaling is that of a length beyond the trained."""
        size = WIDTH // HEADS
        factor = (self.config["rope_scaling"] or {"factor": 1.0})["factor"]
        base, exponents = self.config["rope_theta"] * factor, torch.arange(0, size, 2).double() / size
        frequencies = base**-exponents / factor ** (2 / size)
        angles = torch.outer(torch.arange(heads.shape[1]).double(), frequencies)
        turns = torch.polar(torch.ones_like(angles), angles)
        first, second = heads.chunk(2, dim=-1)
        turned = torch.complex(first, second) * turns
        return torch.cat((turned.real, turned.imag), dim=-1)

    def attention(self, layer: str, hidden: Tensor) -> Tensor:
        if f"{layer}.qkv_proj.weight" in self.weights:
            query, key, value = self.linear(f"{layer}.qkv_proj", hidden).chunk(3, dim=-1)
        else:
            query, key, value = (self.linear(f"{layer}.{part}_proj", hidden) for part in "qkv")
        query, key, value = (part.reshape(len(part), HEADS, -1).transpose(0, 1) for part in (query, key, value))
        scores = self.rotated(query) @ self.rotated(key).mT / (WIDTH // HEADS) ** 0.5
        return self.linear(f"{layer}.o_proj", (scores.softmax(-1) @ value).transpose(0, 1).flatten(1))

    def first_token(self, ids: list[int]) -> Tensor:
        hidden = self.weights["embeddings.word_embeddings.weight"][ids]
        if (types := self.weights.get("embeddings.token_type_embeddings.weight")) is not None:
            hidden = hidden + types[0]
        hidden = self.norm("embeddings.LayerNorm", hidden)
        for layer in (f"encoder.layer.{number}" for number in range(LAYERS)):
            hidden = self.norm(f"{layer}.attn_ln", hidden + self.attention(f"{layer}.attention", hidden))
            up, gate = self.linear(f"{layer}.mlp.up_gate_proj", hidden).chunk(2, dim=-1)
            hidden = self.norm(f"{layer}.mlp_ln", hidden + self.linear(f"{layer}.mlp.down_proj", F.gelu(gate) * up))
        return hidden[0]

    def vectors(self, texts: list[str]) -> NDArray[np.float32]:
        firsts = [self.first_token(self.tokenizer.encode(text).ids) for text in texts]
        vectors: NDArray[np.float32] = F.normalize(torch.stack(firsts)).numpy()
        return vectors

    def logits(self, query: str, documents: list[str]) -> NDArray[np.float32]:
        firsts = torch.stack([self.first_token(self.tokenizer.encode(query, each).ids) for each in documents])
        scores: NDArray[np.float32] = self.linear("classifier", self.linear("pooler.dense", firsts).tanh())[
            :, 0
        ].numpy()
        return scores


hub_new, hub_gte = tiny_gte, partial(tiny_gte, kind="gte")
rerank_new, rerank_gte = partial(tiny_gte, task=Task.RERANK), partial(tiny_gte, kind="gte", task=Task.RERANK)
TINY = (
    TinyModel(Task.EMBED, "new", hub_new),
    TinyModel(Task.EMBED, "gte", partial(hub_gte, english=True)),
    TinyModel(Task.RERANK, "new", rerank_new),
    TinyModel(Task.RERANK, "gte", rerank_gte),
)


async def test_new_equals_its_paper_and_code(tmp_path: Path) -> None:
    embedders = [
        hub_new(tmp_path / "gte-multilingual-base"),
        hub_new(tmp_path / "gte-base-en-v1.5", english=True, rope_scaling={"type": "ntk", "factor": 2.0}),
        hub_new(tmp_path / "apart", packed=False, rope_scaling=None),
    ]
    with_sparse_head(embedders[0])
    reranker = rerank_new(tmp_path / "gte-multilingual-reranker-base")
    async with serving(embed_model=",".join(map(str, embedders)), rerank_model=str(reranker)) as client:
        for folder in embedders:
            answer = await client.post("/v1/embeddings", json={"model": folder.name, "input": TEXTS})
            vectors = np.array([entry["embedding"] for entry in answer.json()["data"]])
            np.testing.assert_allclose(vectors, Reference(folder).vectors(TEXTS), atol=1e-5, err_msg=folder.name)
        for query in QUERIES[:1]:
            body = {"query": query, "texts": DOCUMENTS, "raw_scores": True}
            answer = await client.post("/rerank", json=body)
            scores = {result["index"]: result["score"] for result in answer.json()}
            wanted = Reference(reranker).logits(query, DOCUMENTS)
            assert np.ptp(wanted) > 0.1
            np.testing.assert_allclose([scores[index] for index in range(len(DOCUMENTS))], wanted, atol=1e-5, rtol=1e-5)


def with_sparse_head(folder: Path) -> None:
    """Names as gte-multilingual-base has them, and its weight for each token."""
    weights = {f"new.{name}": weight for name, weight in load_file(folder / "model.safetensors").items()}
    weights |= {"classifier.weight": torch.ones(1, WIDTH), "classifier.bias": torch.ones(1)}
    save_file(weights, folder / "model.safetensors")
    edit_json(folder / "config.json", architectures=["NewModel", "NewForTokenClassification"])


def saved_by_transformers(folder: Path) -> Path:
    """The native layout of today's release."""
    from transformers import GteConfig, GteModel

    hub_gte(folder)
    model = GteModel.from_pretrained(folder, dtype=torch.float32)
    scaled = {"rope_type": "linear", "rope_theta": 40000.0, "factor": 1.2}
    config = GteConfig.from_dict({**model.config.to_dict(), "rope_parameters": scaled})
    changed = GteModel(config)
    changed.load_state_dict(model.state_dict())
    changed.save_pretrained(folder)
    return folder


async def test_gte_equals_sentence_transformers(tmp_path: Path) -> None:
    embedders = [hub_gte(tmp_path / "arctic"), saved_by_transformers(tmp_path / "native")]
    embedders += [hub_gte(tmp_path / "english", english=True, hidden_act="silu", rope_theta=500000)]
    await assert_equal_to_sentence_transformers(embedders, [rerank_gte(tmp_path / "pairs")])


@pytest.mark.parametrize("tiny", TINY[:3:2], ids=str)
def test_bfloat16_is_near(tmp_path: Path, tiny: TinyModel) -> None:
    assert_near_in_bfloat16(tiny, tiny.write(tmp_path / "tiny"))


def test_the_ntk_scaling_counts(tmp_path: Path) -> None:
    """So that the tests above would notice one that is left out."""
    row = Row(np.arange(10, 90).astype(np.int32))
    plain, scaled = (
        run(load_model(hub_new(tmp_path / str(factor), rope_scaling={**NTK, "factor": factor}))[1], [row])
        for factor in (1.0, 8.0)
    )
    assert np.abs(plain - scaled).max() > 1e-2


def test_prompts_and_dimensions(tmp_path: Path) -> None:
    cut = hub_gte(tmp_path / "arctic", matryoshka_dimensions=[256])
    arctic = read(Source("Snowflake/snowflake-arctic-embed-m-v2.0", cut))
    assert choose_prompts(arctic).by_name == {"query": "query: "}
    assert supported_dimensions(arctic, 768) == (256, 768)
    elastic = read(Source("Alibaba-NLP/gte-multilingual-base", hub_new(tmp_path / "elastic")))
    assert supported_dimensions(elastic, 768) == range(128, 769)
    other = read(Source("other", hub_new(tmp_path / "other")))
    assert supported_dimensions(other, 768) == (768,)


REFUSED: list[tuple[Callable[[Path], Path], dict[str, Any], str]] = [
    (hub_new, {"logn_attention_scale": True}, "`logn_attention_scale`: true"),
    (hub_new, {"layer_norm_type": "rms_norm"}, '`layer_norm_type`: "rms_norm"'),
    (hub_new, {"position_embedding_type": "absolute"}, '`position_embedding_type`: "absolute"'),
    (hub_new, {"rope_scaling": {**NTK, "mixed_b": 0.6}}, "`rope_scaling.mixed_b`: 0.6"),
    (hub_new, {"rope_scaling": 8.0}, "rope_scaling in "),
    (hub_new, {"rope_scaling": {"type": "ntk"}}, "leaves out `rope_scaling.factor`"),
    (hub_new, {"rope_scaling": {**NTK, "beta": 1}}, "the key `rope_scaling.beta`"),
    (hub_gte, {"rope_scaling": {"type": "dynamic-ntk", "factor": 2.0}}, "`rope_scaling.type`"),
    (hub_gte, {"rope_parameters": {"rope_theta": 1.0}, "rope_scaling": NTK}, "`rope_parameters`"),
    (hub_gte, {"head_dim": 16}, "the key `head_dim`"),
    (hub_gte, {"auto_map": {"AutoModel": "modeling.Own"}}, "`auto_map`"),
    (hub_new, {"auto_map": {"AutoModel": "Alibaba-NLP/new-impl--modeling.New; import os"}}, "`auto_map`"),
    (rerank_new, {"id2label": {"0": "no", "1": "yes"}}, "`id2label`"),
]


@pytest.mark.parametrize(("writer", "keys", "expected"), REFUSED, ids=lambda value: value if type(value) is str else "")
def test_what_is_not_implemented_is_refused(
    tmp_path: Path, writer: Callable[[Path], Path], keys: dict[str, Any], expected: str
) -> None:
    task = Task.RERANK if writer is rerank_new else Task.EMBED
    assert expected in refusal(lambda: writer(tmp_path / "tiny"), task, **keys)


def test_the_base_of_rotations_is_not_guessed(tmp_path: Path) -> None:
    folder = hub_gte(tmp_path / "tiny")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    del config["rope_theta"]
    write(folder / "config.json", config)
    with pytest.raises(StartupError, match="leaves out `rope_theta`"):
        read(Source("tiny", folder))
    write(folder / "config.json", {**config, "model_type": "new"})  # whose default is known
    assert read(Source("tiny", folder)).arguments["rope_theta"] == 10_000.0
