"""BERT and XLM-R (MiniLM, bge-*, e5, gte, ms-marco-MiniLM, bge-reranker-*): one vector per text, one score per pair.

Sources: Devlin et al. 2019 (https://arxiv.org/abs/1810.04805); Conneau et al. 2020 (https://arxiv.org/abs/1911.02116);
Reimers and Gurevych 2019 (https://arxiv.org/abs/1908.10084) for the pooling; Nogueira and Cho 2019
(https://arxiv.org/abs/1901.04085) for cross-encoders; https://huggingface.co/BAAI/bge-reranker-v2-m3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from vecmill.core.types import Task
from vecmill.models.config_keys import COMMON, HEAD, NO_HEAD
from vecmill.models.encoders import check_one_label
from vecmill.models.family import DEFAULT_INSTRUCTION, Family, Network, Positions, PublishedModel, TaskSpec
from vecmill.models.keys import HARMLESS, Rule, only, positive, rules, whole

# Of Google's releases and of TinyBERT's; read by nothing.
OF_RELEASES = (
    *(f"pooler_{part}" for part in ("fc_size", "num_attention_heads", "num_fc_layers", "size_per_head", "type")),
    *("cell", "emb_size", "pre_trained", "structure", "training"),
)
BERT_KEYS: Mapping[str, Rule] = {
    **COMMON,
    **rules(HARMLESS, OF_RELEASES),
    "layer_norm_eps": positive(),
    "pad_token_id": whole(0, null=True),
    "position_embedding_type": only("absolute", None, cure="Its positions (ALiBi, relative) are not implemented."),
    "type_vocab_size": whole(),
}
XLM_ROBERTA_KEYS: Mapping[str, Rule] = {**BERT_KEYS, "pad_token_id": whole(0)}  # positions are counted from it


# What checkpoints carry of pre-training; an encoder's own pooler is trained for next-sentence prediction.
UNUSED = ("pooler.", "embeddings.position_ids", "cls.", "lm_head.")
UNUSED_BESIDE_HEAD = ("bert.embeddings.position_ids", "roberta.embeddings.position_ids", "roberta.pooler.")


def _rename(prefix: str, name: str) -> Sequence[str]:
    """An encoder's weights, with or without the model's own prefix."""
    name = name.removeprefix(prefix)
    return () if name.startswith(UNUSED) else (_layer_norm_name(name),)


def _rename_with_head(name: str) -> Sequence[str]:
    """An encoder's weights and its classification head's, under the class's own names."""
    return () if name.startswith(UNUSED_BESIDE_HEAD) else (_layer_norm_name(name),)


def _layer_norm_name(name: str) -> str:
    """TensorFlow's names for the weights of a layer norm, as torch has them."""
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def _embedder(config_class: str, model_class: str, prefix: str) -> Network:
    return Network(
        config_class,
        model_class,
        rename=partial(_rename, prefix),
        options={"add_pooling_layer": False},
        blocks="encoder.layer",
        token_types=True,
    )


def _cross_encoder(config_class: str, model_class: str) -> Network:
    return Network(config_class, model_class, _rename_with_head, blocks="encoder.layer", token_types=True)


BGE_EN = "Represent this sentence for searching relevant passages: "
BGE_ZH = "为这个句子生成表示以用于检索相关文章："  # noqa: RUF001  # as the card has it
E5_INSTRUCT = f"Instruct: {DEFAULT_INSTRUCTION}\nQuery: "

BERT = Family(
    model_type="bert",
    architectures=r"Bert\w+",
    tasks={
        Task.EMBED: TaskSpec({**BERT_KEYS, **NO_HEAD}, _embedder("BertConfig", "BertModel", "bert.")),
        Task.RERANK: TaskSpec(
            {**BERT_KEYS, **HEAD, "type_vocab_size": whole(2)},
            _cross_encoder("BertConfig", "BertForSequenceClassification"),
            (check_one_label,),
        ),
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
XLM_ROBERTA = Family(
    model_type="xlm-roberta",
    architectures=r"(XLM)?Roberta\w+",
    tasks={
        Task.EMBED: TaskSpec(
            {**XLM_ROBERTA_KEYS, **NO_HEAD}, _embedder("XLMRobertaConfig", "XLMRobertaModel", "roberta.")
        ),
        Task.RERANK: TaskSpec(
            {**XLM_ROBERTA_KEYS, **HEAD},
            _cross_encoder("XLMRobertaConfig", "XLMRobertaForSequenceClassification"),
            (check_one_label,),
        ),
    },
    positions=Positions.AFTER_PADDING,
    published=(PublishedModel("intfloat", r"multilingual-e5-large-instruct", {"query": E5_INSTRUCT, "document": ""}),),
)
