"""BERT (MiniLM, bge-*, e5, gte, ms-marco-MiniLM): one vector per text, one score per pair.

Source: Devlin et al. 2019 (https://arxiv.org/abs/1810.04805).
"""

from __future__ import annotations

from vecmill.core.types import Task
from vecmill.models.encoders import ENCODER_KEYS, cross_encoder, embedder
from vecmill.models.family import Family, Positions, PublishedModel

BGE_EN = "Represent this sentence for searching relevant passages: "
BGE_ZH = "为这个句子生成表示以用于检索相关文章："  # noqa: RUF001  # as the card has it

BERT = Family(
    model_type="bert",
    architectures=r"Bert\w+",
    tasks={
        Task.EMBED: embedder("Bert", "bert.", ENCODER_KEYS, options={"add_pooling_layer": False}),
        # Its tanh layer is the encoder's pooler.
        Task.RERANK: cross_encoder("Bert", "bert.", ENCODER_KEYS, head=("bert.pooler", "classifier"), types=True),
    },
    positions=Positions.FROM_ZERO,
    published=(
        PublishedModel("BAAI", r"bge-(small|base|large)-en(-v1\.5)?", {"query": BGE_EN}),
        PublishedModel("BAAI", r"bge-(small|base|large)-zh(-v1\.5)?", {"query": BGE_ZH}),
        PublishedModel(
            "intfloat",
            r"(multilingual-)?e5-(small|base|large)(-v2)?",
            {"query": "query: ", "document": "passage: "},
        ),
    ),
)
