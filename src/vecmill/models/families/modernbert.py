"""ModernBERT (gte-modernbert, modernbert-embed, granite-embedding r2, ettin, mmBERT, DenseOn; gte-reranker-modernbert):
layers that look at the whole text take turns with layers whose window is a few tokens to either side, and each kind has
its own base of rotations.

Sources: Warner et al. 2024 (https://arxiv.org/abs/2412.13663); https://huggingface.co/answerdotai/ModernBERT-base;
https://huggingface.co/Alibaba-NLP/gte-reranker-modernbert-base.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from vecmill.core.types import Task
from vecmill.models.config_keys import (
    ACTIVATIONS,
    COMMON,
    HEAD,
    NO_HEAD,
    ConfigFile,
    check_layer_types,
    check_rope_by_layer,
)
from vecmill.models.encoders import check_one_label
from vecmill.models.families.nomic_bert import NOMIC_PROMPTS
from vecmill.models.family import ConfigJson, Family, HubModel, Network, Pooling, Positions, PublishedModel, TaskSpec
from vecmill.models.keys import HARMLESS, HONOURED, Rule, only, positive, rules, whole

# Of training, of masked language modelling, of other ways to compute the same, and what the class reads in no case.
UNREAD = (
    *("cls_token_id", "decoder_bias", "deterministic_flash_attn", "embedding_dropout", "initializer_cutoff_factor"),
    *("hidden_act", "layer_norm_eps", "mlp_dropout", "position_embedding_type", "reference_compile"),
    *("repad_logits_with_grad", "sparse_pred_ignore_index", "sparse_prediction"),
)
FLAGS = ("attention_bias", "mlp_bias", "norm_bias")
OF_CLASSIFIER: Mapping[str, Rule] = {
    "classifier_activation": only(*ACTIVATIONS),
    "classifier_bias": only(False, True),
    "classifier_pooling": only("cls", "mean"),
}
KEYS: Mapping[str, Rule] = {
    **COMMON,
    **rules(HARMLESS, UNREAD),
    **rules(only(False, True), FLAGS),
    "causal_mask": only(False, None),
    "is_causal": only(False, None),
    "global_attn_every_n_layers": whole(),
    **rules(positive(), ("global_rope_theta", "local_rope_theta", "norm_eps")),
    "hidden_activation": only(*ACTIVATIONS),
    "layer_types": HONOURED,  # in place of `global_attn_every_n_layers`, see `check_layer_types`
    "local_attention": whole(),
    "pad_token_id": whole(0, null=True),
    "rope_parameters": HONOURED,  # see `check_rope_by_layer`
    "rope_scaling": only(None, cure="Put it into `rope_parameters`, for the kind of layer that it is meant for."),
}


def _check_layers(config: ConfigFile) -> None:
    """`layer_types` names the kind of each layer."""
    check_layer_types(config)
    layers, count = config.content.get("layer_types"), config.content.get("num_hidden_layers", 22)
    if layers is not None and len(layers) != count:
        raise config.unsupported("layer_types", f"a list of {count}, as `num_hidden_layers` says")


def _arguments(config: ConfigJson, positions: int) -> dict[str, Any]:
    """The class completes the parameters of rotations in the object that it is given: a copy."""
    parameters = config.get("rope_parameters")
    copied = {kind: dict(given) if given is not None else None for kind, given in (parameters or {}).items()}
    return {**config, "rope_parameters": copied if parameters is not None else None}


UNUSED = ("head.", "decoder.", "lm_head.")


def _rename(name: str) -> Sequence[str]:
    """An embedder's weights, with or without the prefix of the masked language model that it was made from."""
    return () if name.startswith(UNUSED) else (name.removeprefix("model."),)


def _rename_with_head(name: str) -> Sequence[str]:
    return () if name.startswith("decoder.") else (name,)


def _head_pooling(config: ConfigJson) -> Pooling:
    return cast(Pooling, config.get("classifier_pooling", "cls"))


CHECKS = (_check_layers, check_rope_by_layer)

MODERNBERT = Family(
    model_type="modernbert",
    architectures=r"ModernBert(Model|For\w+)",
    tasks={
        Task.EMBED: TaskSpec(
            {**KEYS, **NO_HEAD, **rules(HARMLESS, OF_CLASSIFIER)},
            Network("ModernBertConfig", "ModernBertModel", _rename, _arguments),
            CHECKS,
        ),
        Task.RERANK: TaskSpec(
            {**KEYS, **HEAD, **OF_CLASSIFIER},
            Network(
                "ModernBertConfig",
                "ModernBertForSequenceClassification",
                _rename_with_head,
                _arguments,
                head=("head", "classifier"),
                head_pooling=_head_pooling,
            ),
            (*CHECKS, check_one_label),
        ),
    },
    positions=Positions.ROTARY,
    published=(PublishedModel("nomic-ai", r"modernbert-embed-(base|large)", NOMIC_PROMPTS, dimensions=(256,)),),
    examples=(
        HubModel("Alibaba-NLP/gte-modernbert-base", Task.EMBED, 149_014_272, "apache-2.0", 8192, 768),
        HubModel("nomic-ai/modernbert-embed-base", Task.EMBED, 149_014_272, "apache-2.0", 8192, 768),
        HubModel("Alibaba-NLP/gte-reranker-modernbert-base", Task.RERANK, 149_605_633, "apache-2.0", 8192),
        HubModel("cross-encoder/ettin-reranker-17m-v1", Task.RERANK, 17_600_000, "apache-2.0", 7999),
        HubModel("cross-encoder/ettin-reranker-32m-v1", Task.RERANK, 32_800_000, "apache-2.0", 7999),
        HubModel("cross-encoder/ettin-reranker-68m-v1", Task.RERANK, 68_600_000, "apache-2.0", 7999),
        HubModel("cross-encoder/ettin-reranker-150m-v1", Task.RERANK, 150_900_000, "apache-2.0", 7999),
        HubModel("cross-encoder/ettin-reranker-400m-v1", Task.RERANK, 401_600_000, "apache-2.0", 7999),
        HubModel("cross-encoder/ettin-reranker-1b-v1", Task.RERANK, 1_000_000_000, "apache-2.0", 7999),
    ),
)
