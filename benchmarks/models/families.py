"""Families of encoders in the shapes of the hub's models: texts packed end to end by vecmill, against padded batches
through sentence-transformers, which sorts texts by their length. Both read the same folder, random weights in it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from benchmarks.lib.minilm import bundled_model, sample_texts
from benchmarks.lib.timing import TimedSide
from benchmarks.models.builds import RandomValues, fill, matmul_parameters
from benchmarks.models.shapes import QWEN3_0_6B, Shape
from benchmarks.models.workloads import batches, run_model
from benchmarks.serving.wide_model import TOKENIZER_FILES
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification
from transformers.initialization import no_init_weights
from transformers.utils import logging

from vecmill.core.types import Row, Task, TokenIds
from vecmill.models.checkpoint import Source, read
from vecmill.models.networks import load_model
from vecmill.models.weights import Target

VOCABULARY = 30522  # the bundled model's tokenizer, whatever the family: it is only looked up
LONGEST = 512
BATCH = 32
QUERY = "where is the length of a padded batch computed?"

_BASE: Shape = {
    "vocab_size": VOCABULARY,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 514,
    "pad_token_id": 0,
}
_MODERNBERT: Shape = {
    "vocab_size": VOCABULARY,
    "hidden_size": 768,
    "num_hidden_layers": 22,
    "num_attention_heads": 12,
    "intermediate_size": 1152,
    "max_position_embeddings": 8192,
    "local_attention": 128,
    "global_attn_every_n_layers": 3,
    "pad_token_id": 0,
    "bos_token_id": 101,
    "cls_token_id": 101,
    "eos_token_id": 102,
    "sep_token_id": 102,
}
_DEBERTA: Shape = {
    **_BASE,
    "max_position_embeddings": 512,
    "layer_norm_eps": 1e-7,
    "max_relative_positions": -1,
    "norm_rel_ebd": "layer_norm",
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
    "position_buckets": 256,
    "relative_attention": True,
    "share_att_key": True,
    "type_vocab_size": 0,
}


@dataclass(frozen=True)
class FamilyShape:
    """A model of the hub, but for its vocabulary and its values."""

    kind: str
    """`model_type`."""
    shape: Shape
    task: Task = Task.EMBED
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Keys of `shape` that the family's config.json calls otherwise."""

    @property
    def config(self) -> dict[str, Any]:
        """What config.json is made with."""
        own = {"num_labels": 1} if self.task is Task.RERANK else {}
        return {self.renamed.get(key, key): value for key, value in self.shape.items()} | own


OF_DISTILBERT = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "intermediate_size": "hidden_dim",
}
FAMILY_SHAPES: Mapping[str, FamilyShape] = {
    "ModernBERT-base": FamilyShape("modernbert", _MODERNBERT),
    "ettin-32m": FamilyShape(
        "modernbert",
        {
            **_MODERNBERT,
            "hidden_size": 384,
            "num_hidden_layers": 10,
            "num_attention_heads": 6,
            "intermediate_size": 576,
        },
    ),
    "EmbeddingGemma": FamilyShape(
        "gemma3_text",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 768,
            "num_hidden_layers": 24,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "intermediate_size": 1152,
            "max_position_embeddings": 2048,
            "query_pre_attn_scalar": 256,
            "sliding_window": 512,
            "sliding_window_pattern": 6,
            "use_bidirectional_attention": True,
            "pad_token_id": 0,
            "bos_token_id": 101,
            "eos_token_id": 102,
        },
    ),
    "Qwen3-Embedding-0.6B": FamilyShape(
        "qwen3",
        {**QWEN3_0_6B, "vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 101, "eos_token_id": 102},
    ),
    "MPNet-base": FamilyShape("mpnet", {**_BASE, "pad_token_id": 1, "layer_norm_eps": 1e-5}),
    "RoBERTa-base": FamilyShape("roberta", {**_BASE, "type_vocab_size": 1, "layer_norm_eps": 1e-5}),
    "DistilBERT": FamilyShape(
        "distilbert", {**_BASE, "num_hidden_layers": 6, "max_position_embeddings": 512}, renamed=OF_DISTILBERT
    ),
    "GTE-multilingual-base": FamilyShape("gte", {**_BASE, "max_position_embeddings": 8192, "type_vocab_size": 1}),
    "nomic-embed-text-v1.5": FamilyShape(
        "nomic_bert", {**_BASE, "max_position_embeddings": 2048, "rope_theta": 1000.0, "hidden_act": "silu"}
    ),
    "ALBERT-base": FamilyShape("albert", {**_BASE, "embedding_size": 128, "hidden_act": "gelu_new"}),
    "Llama-3.2-1B": FamilyShape(
        "llama",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 2048,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "intermediate_size": 8192,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "pad_token_id": 0,
            "bos_token_id": 101,
            "eos_token_id": 102,
        },
    ),
    "DeBERTa-v3-base, reranker": FamilyShape("deberta-v2", _DEBERTA, Task.RERANK),
}


def tiny(model: FamilyShape) -> FamilyShape:
    """The same family, small enough for a smoke run."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    narrow = {"num_key_value_heads": 2, "head_dim": 16} if "head_dim" in model.shape else {}
    return FamilyShape(model.kind, {**model.shape, **sizes, **narrow}, model.task, model.renamed)


@dataclass(frozen=True)
class BothSides:
    """The same texts through vecmill and through sentence-transformers."""

    packed: Callable[[], Tensor]
    padded: Callable[[], Tensor]
    tokens: Sequence[int]
    """Of each text."""
    packs: int
    parameters: int


def both_sides(model: FamilyShape, target: Target, texts: int, batch_tokens: int) -> Iterator[BothSides]:
    """One pair of sides, while its folder is there."""
    with TemporaryDirectory() as made:
        folder = Path(made) / "model"
        write_family(folder, model, target.dtype)
        loaded = load_model(read(Source(model.kind, folder, model.task)), target)
        documents = sample_texts(texts)
        ids = tokenize(documents, QUERY if model.task is Task.RERANK else None)
        packs = batches([Row(row) for row in ids], batch_tokens)
        yield BothSides(
            partial(run_model, loaded, packs, target.device),
            sentence_transformers(model, folder, documents, target),
            [len(row) for row in ids],
            len(packs),
            matmul_parameters(loaded.modules),
        )


def write_family(folder: Path, model: FamilyShape, dtype: torch.dtype) -> None:
    """transformers' own class with random weights, saved as the hub's models are."""
    logging.disable_progress_bar()
    config = AutoConfig.for_model(model.kind, **model.config)
    made = AutoModel if model.task is Task.EMBED else AutoModelForSequenceClassification
    with no_init_weights():
        network = made.from_config(config, dtype=dtype)
    fill(network, RandomValues(torch.device("cpu"), dtype))
    network.save_pretrained(folder)
    bundled = bundled_model()
    for name in TOKENIZER_FILES:
        if (bundled / name).is_file():
            shutil.copy(bundled / name, folder / name)
    (folder / "sentence_bert_config.json").write_text(f'{{"max_seq_length": {LONGEST - 2}}}')


def tokenize(texts: Sequence[str], query: str | None) -> list[TokenIds]:
    """Of each text, or of each pair, as sentence-transformers has them."""
    tokenizer = Tokenizer.from_file(str(bundled_model() / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(LONGEST - 2)
    inputs: list[Any] = [*texts] if query is None else [(query, text) for text in texts]
    return [np.array(encoding.ids, dtype=np.int32) for encoding in tokenizer.encode_batch(inputs)]


def sentence_transformers(
    model: FamilyShape, folder: Path, texts: Sequence[str], target: Target
) -> Callable[[], Tensor]:
    """Its `encode`, or a cross-encoder's `predict`, of all texts in one call."""
    from sentence_transformers import CrossEncoder, SentenceTransformer, models

    options: dict[str, Any] = {"batch_size": BATCH, "show_progress_bar": False, "convert_to_tensor": True}
    device = str(target.device)
    if model.task is Task.RERANK:
        encoder = CrossEncoder(str(folder), device=device, max_length=LONGEST - 2, model_kwargs={"dtype": target.dtype})
        pairs = [(QUERY, text) for text in texts]
        identity = torch.nn.Identity()
        return lambda: encoder.predict(pairs, activation_fn=identity, **options).float().cpu().view(-1, 1)
    transformer = models.Transformer(str(folder), max_seq_length=LONGEST - 2, model_kwargs={"dtype": target.dtype})
    pooling = models.Pooling(transformer.get_embedding_dimension(), pooling_mode="mean")
    embedder = SentenceTransformer(modules=[transformer, pooling], device=device)
    return lambda: embedder.encode(list(texts), **options).float().cpu()


def timed(sides: BothSides, dtype: torch.dtype) -> dict[str, TimedSide]:
    """The same useful work on both sides: computing padding does not count."""
    operations = 2.0 * sides.parameters * sum(sides.tokens)
    weights = sides.parameters * dtype.itemsize * sides.packs
    return {
        "packed": TimedSide(sides.packed, operations, weights),
        "sentence-transformers": TimedSide(sides.padded, operations, weights),
    }
