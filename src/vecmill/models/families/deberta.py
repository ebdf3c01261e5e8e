"""DeBERTa v2 and v3 (mxbai-rerank-*-v1): cross-encoders whose attention tells content and distance apart.

Sources: He et al. 2020 (https://arxiv.org/abs/2006.03654) and 2021 (https://arxiv.org/abs/2111.09543);
https://huggingface.co/mixedbread-ai/mxbai-rerank-base-v1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vecmill.core.types import Task
from vecmill.models.config_keys import ACTIVATIONS, ConfigFile
from vecmill.models.encoders import ENCODER_KEYS, cross_encoder
from vecmill.models.family import BiasTable, Family, HubModel, Positions, TaskSpec
from vecmill.models.keys import HARMLESS, LARGEST_NUMBER, Rule, only, rules, whole

BOTH = {"c2p", "p2c"}


def _is_both(value: Any) -> bool:
    parts = value.lower().split("|") if isinstance(value, str) else value
    return isinstance(parts, list) and len(parts) == len(BOTH) and {str(part).strip() for part in parts} == BOTH


def _is_span(value: Any) -> bool:
    return value == -1 or whole(2, LARGEST_NUMBER).accepts(value)


SPAN = Rule(_is_span, "-1, a whole number from 2 on")
KEYS: Mapping[str, Rule] = {
    **ENCODER_KEYS,
    "type_vocab_size": only(0, cure="Token types are not implemented for this family."),
    "relative_attention": only(True),
    "position_biased_input": only(False, cure="Absolute positions are not implemented for this family."),
    "pos_att_type": Rule(_is_both, '["p2c", "c2p"], "p2c|c2p"'),
    "share_att_key": only(True, cure="Projections of distances of their own are not implemented."),
    "norm_rel_ebd": only("layer_norm", "none"),
    "position_buckets": SPAN,
    "max_relative_positions": SPAN,
    "conv_kernel_size": only(0, None, cure="The convolution of deberta-v2-xxlarge is not implemented."),
    "embedding_size": whole(),
    "attention_head_size": whole(),
    "pooler_hidden_size": whole(),
    "pooler_hidden_act": only(*ACTIVATIONS),
    **rules(HARMLESS, ("cls_dropout", "legacy", "pooler_dropout")),
}
# Keys whose defaults in transformers' class are others than what is implemented.
REQUIRED = ("pos_att_type", "position_biased_input", "relative_attention", "share_att_key")


def _check_distances(config: ConfigFile) -> None:
    content = config.content
    for key in REQUIRED:
        if key not in content:
            raise config.unsupported(key, KEYS[key].supported, "Left out, it has another value.")
    width = content.get("hidden_size")
    if content.get("pooler_hidden_size", width) != width:
        raise config.unsupported("pooler_hidden_size", f"`hidden_size` ({width})")


SPEC = cross_encoder(
    "DebertaV2",
    "deberta.",
    KEYS,
    head=("pooler", "classifier"),
    unused=("deberta.embeddings.position_embeddings.",),
    blocks="layers",
    token_types=False,
    position_bias="disentangled",
)
DEBERTA_V2 = Family(
    model_type="deberta-v2",
    architectures=r"DebertaV2\w+",
    tasks={Task.RERANK: TaskSpec(SPEC.keys, SPEC.network, (_check_distances, *SPEC.checks))},
    positions=Positions.FROM_ZERO,
    examples=(
        HubModel(
            "mixedbread-ai/mxbai-rerank-xsmall-v1",
            Task.RERANK,
            70_830_337,
            "apache-2.0",
            512,
            stored="float16",
            bias=BiasTable(1, 512, 12 * 384 * 1024),
        ),
        HubModel(
            "mixedbread-ai/mxbai-rerank-base-v1",
            Task.RERANK,
            184_422_913,
            "apache-2.0",
            512,
            stored="float16",
            bias=BiasTable(1, 512, 12 * 768 * 1024),
        ),
        HubModel(
            "mixedbread-ai/mxbai-rerank-large-v1",
            Task.RERANK,
            435_062_785,
            "apache-2.0",
            512,
            stored="float16",
            bias=BiasTable(1, 512, 24 * 1024 * 1024),
        ),
    ),
)
