"""BERT (MiniLM, bge-*, e5, gte, ms-marco-MiniLM): one vector per text, one score per pair.

Source: Devlin et al. 2019 (https://arxiv.org/abs/1810.04805).
"""

from __future__ import annotations

from vecmill.core.types import Task
from vecmill.models.encoders import ENCODER_KEYS, cross_encoder, embedder
from vecmill.models.family import PASSAGE_PROMPTS, Family, HubModel, Positions, PublishedModel

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
    examples=(
        HubModel("sentence-transformers/all-MiniLM-L6-v2", Task.EMBED, 22_713_216, "apache-2.0", 256, 384),
        HubModel("sentence-transformers/all-MiniLM-L12-v2", Task.EMBED, 33_360_000, "apache-2.0", 128, 384),
        HubModel("BAAI/bge-small-en-v1.5", Task.EMBED, 33_360_000, "mit", 512, 384),
        HubModel("BAAI/bge-base-en-v1.5", Task.EMBED, 109_482_240, "mit", 512, 768),
        HubModel("BAAI/bge-large-en-v1.5", Task.EMBED, 335_141_888, "mit", 512, 1024),
        HubModel("intfloat/e5-base-v2", Task.EMBED, 109_482_240, "mit", 512, 768),
        HubModel("thenlper/gte-base", Task.EMBED, 109_482_240, "mit", 512, 768, stored="float16"),
        HubModel(
            "mixedbread-ai/mxbai-embed-large-v1", Task.EMBED, 335_141_888, "apache-2.0", 512, 1024, stored="float16"
        ),
        HubModel("Snowflake/snowflake-arctic-embed-m-v1.5", Task.EMBED, 109_482_240, "apache-2.0", 512, 768),
        HubModel("cross-encoder/ms-marco-MiniLM-L6-v2", Task.RERANK, 22_713_601, "apache-2.0", 512),
        HubModel("cross-encoder/ms-marco-MiniLM-L12-v2", Task.RERANK, 33_360_385, "apache-2.0", 512),
    ),
    published=(
        PublishedModel("BAAI", r"bge-(small|base|large)-en(-v1\.5)?", {"query": BGE_EN}),
        PublishedModel("BAAI", r"bge-(small|base|large)-zh(-v1\.5)?", {"query": BGE_ZH}),
        PublishedModel(
            "intfloat",
            r"(multilingual-)?e5-(small|base|large)(-v2)?",
            PASSAGE_PROMPTS,
        ),
    ),
)
