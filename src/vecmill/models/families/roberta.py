"""RoBERTa, XLM-R and CamemBERT: one architecture, three vocabularies.

transformers has three classes of the same code, under the same names of weights; only the text that they were trained
on and their tokenizers differ. Models: all-distilroberta-v1, granite-embedding-*-english, bge-m3, bge-reranker-*,
multilingual-e5, sentence-camembert, crossencoder-camembert.

Sources: Liu et al. 2019 (https://arxiv.org/abs/1907.11692); Conneau et al. 2020 (https://arxiv.org/abs/1911.02116);
Martin et al. 2020 (https://arxiv.org/abs/1911.03894); https://huggingface.co/BAAI/bge-reranker-v2-m3.
"""

from __future__ import annotations

from collections.abc import Mapping

from vecmill.core.types import Task
from vecmill.models.encoders import ENCODER_KEYS, cross_encoder, embedder
from vecmill.models.family import DEFAULT_INSTRUCTION, Family, Positions, PublishedModel, TaskSpec
from vecmill.models.keys import Rule, whole

KEYS: Mapping[str, Rule] = {**ENCODER_KEYS, "pad_token_id": whole(0)}  # positions are counted from it
E5_INSTRUCT = f"Instruct: {DEFAULT_INSTRUCTION}\nQuery: "


def _tasks(name: str) -> Mapping[Task, TaskSpec]:
    """All name their weights after RoBERTa."""
    return {
        Task.EMBED: embedder(name, "roberta.", KEYS, options={"add_pooling_layer": False}),
        Task.RERANK: cross_encoder(name, "roberta.", KEYS),
    }


ROBERTA = Family(
    model_type="roberta",
    architectures=r"Roberta\w+",
    tasks=_tasks("Roberta"),
    positions=Positions.AFTER_PADDING,
)
XLM_ROBERTA = Family(
    model_type="xlm-roberta",
    architectures=r"(XLM)?Roberta\w+",
    tasks=_tasks("XLMRoberta"),
    positions=Positions.AFTER_PADDING,
    published=(PublishedModel("intfloat", r"multilingual-e5-large-instruct", {"query": E5_INSTRUCT, "document": ""}),),
)
CAMEMBERT = Family(
    model_type="camembert",
    architectures=r"(Camembert|Roberta)\w+",
    tasks=_tasks("Camembert"),
    positions=Positions.AFTER_PADDING,
)
