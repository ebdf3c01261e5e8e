"""RoBERTa, XLM-R and CamemBERT: one architecture, three vocabularies; and jina-reranker-v2-base-multilingual, an XLM-R
whose files have other names and keys.

transformers has three classes of the same code, under the same names of weights; only the text that they were trained
on and their tokenizers differ. Models: all-distilroberta-v1, granite-embedding-*-english, bge-m3, bge-reranker-*,
multilingual-e5, sentence-camembert, crossencoder-camembert.

Sources: Liu et al. 2019 (https://arxiv.org/abs/1907.11692); Conneau et al. 2020 (https://arxiv.org/abs/1911.02116);
Martin et al. 2020 (https://arxiv.org/abs/1911.03894); https://huggingface.co/BAAI/bge-reranker-v2-m3; the code of
https://huggingface.co/jinaai/jina-reranker-v2-base-multilingual.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from vecmill.core.types import Task
from vecmill.models.config_keys import own_code
from vecmill.models.encoders import ENCODER_KEYS, cross_encoder, embedder
from vecmill.models.family import INSTRUCT_PROMPTS, Family, HubModel, Positions, PublishedModel, TaskSpec
from vecmill.models.keys import HARMLESS, Rule, rules, whole

KEYS: Mapping[str, Rule] = {**ENCODER_KEYS, "pad_token_id": whole(0)}  # positions are counted from it


def _tasks(name: str) -> Mapping[Task, TaskSpec]:
    """All name their weights after RoBERTa."""
    return {
        Task.EMBED: embedder(name, "roberta.", KEYS, options={"add_pooling_layer": False}),
        Task.RERANK: cross_encoder(name, "roberta.", KEYS),
    }


# Of flash attention's BERT, after which jina-reranker-v2 names its weights.
FLASH_PARTS: Mapping[str, Sequence[str]] = {
    "mixer.Wqkv": tuple(f"attention.self.{part}" for part in ("query", "key", "value")),
    "mixer.out_proj": ("attention.output.dense",),
    "norm1": ("attention.output.LayerNorm",),
    "mlp.fc1": ("intermediate.dense",),
    "mlp.fc2": ("output.dense",),
    "norm2": ("output.LayerNorm",),
}
FLASH_LAYERS, FLASH_NORM = "roberta.encoder.layers.", "roberta.emb_ln."


def _with_flash_names(spec: TaskSpec) -> TaskSpec:
    """A cross-encoder's spec that takes the files of jina-reranker-v2 too."""
    native = spec.network.rename

    def rename(name: str) -> Sequence[str]:
        if name.startswith(FLASH_NORM):
            return (name.replace(FLASH_NORM, "roberta.embeddings.LayerNorm."),)
        if not name.startswith(FLASH_LAYERS):
            return native(name)
        number, _, part = name.removeprefix(FLASH_LAYERS).partition(".")
        module, _, leaf = part.rpartition(".")
        return tuple(f"roberta.encoder.layer.{number}.{each}.{leaf}" for each in FLASH_PARTS.get(module, (module,)))

    code = own_code(
        r"(jinaai/jina-reranker-v2-[\w-]+--)?(configuration|modeling)_xlm_roberta\.XLMRoberta\w+",
        "jina-reranker-v2-base-multilingual",
    )
    keys = {**spec.keys, "auto_map": code, **rules(HARMLESS, ("emb_pooler", "use_flash_attn"))}
    return TaskSpec(keys, replace(spec.network, rename=rename), spec.checks)


def _claims_flash(config: Mapping[str, Any]) -> bool:
    """jina-reranker-v2 has no `model_type`."""
    return "model_type" not in config and "XLMRobertaFlashConfig" in str(config.get("auto_map"))


OF_XLM_ROBERTA = _tasks("XLMRoberta")

ROBERTA = Family(
    model_type="roberta",
    architectures=r"Roberta\w+",
    tasks=_tasks("Roberta"),
    examples=(
        HubModel("sentence-transformers/all-distilroberta-v1", Task.EMBED, 82_118_400, "apache-2.0", 512, 768),
        HubModel(
            "ibm-granite/granite-embedding-125m-english",
            Task.EMBED,
            124_645_632,
            "apache-2.0",
            512,
            768,
            stored="bfloat16",
        ),
    ),
    positions=Positions.AFTER_PADDING,
)
XLM_ROBERTA = Family(
    model_type="xlm-roberta",
    architectures=r"(XLM)?Roberta\w+",
    tasks={**OF_XLM_ROBERTA, Task.RERANK: _with_flash_names(OF_XLM_ROBERTA[Task.RERANK])},
    claims=_claims_flash,
    examples=(
        HubModel(
            "BAAI/bge-m3",
            Task.EMBED,
            567_754_752,
            "mit",
            8192,
            1024,
            note="its weights are pickles: vecmill pull --convert-pickle",
        ),
        HubModel("intfloat/multilingual-e5-base", Task.EMBED, 278_043_648, "mit", 512, 768),
        HubModel("intfloat/multilingual-e5-large", Task.EMBED, 559_890_432, "mit", 512, 1024),
        HubModel(
            "intfloat/multilingual-e5-large-instruct", Task.EMBED, 559_890_432, "mit", 512, 1024, stored="float16"
        ),
        HubModel("Snowflake/snowflake-arctic-embed-l-v2.0", Task.EMBED, 567_754_752, "apache-2.0", 8192, 1024),
        HubModel("BAAI/bge-reranker-base", Task.RERANK, 278_044_417, "mit", 512),
        HubModel("BAAI/bge-reranker-large", Task.RERANK, 559_891_457, "mit", 512),
        HubModel("BAAI/bge-reranker-v2-m3", Task.RERANK, 567_755_777, "apache-2.0", 8192),
        HubModel(
            "jinaai/jina-reranker-v2-base-multilingual",
            Task.RERANK,
            278_437_633,
            "cc-by-nc-4.0",
            1024,
            stored="bfloat16",
        ),
    ),
    positions=Positions.AFTER_PADDING,
    published=(PublishedModel("intfloat", r"multilingual-e5-large-instruct", INSTRUCT_PROMPTS),),
)
CAMEMBERT = Family(
    model_type="camembert",
    architectures=r"(Camembert|Roberta)\w+",
    tasks=_tasks("Camembert"),
    examples=(HubModel("antoinelouis/crossencoder-camembert-base-mmarcoFR", Task.RERANK, 110_622_721, "mit", 512),),
    positions=Positions.AFTER_PADDING,
)
