"""JinaBERT (jina-embeddings-v2-*, jina-reranker-v1-turbo-en and -tiny-en): BERT with ALiBi in place of a table of
positions, and gated layers.

Its config.json has BERT's `model_type`, and names a class of code of its own.

Sources: Günther et al. 2023 (https://arxiv.org/abs/2310.19923); Press et al. 2021 (https://arxiv.org/abs/2108.12409);
the code that the hub's files were made with (https://huggingface.co/jinaai/jina-bert-implementation and
https://huggingface.co/jinaai/jina-bert-v2-qk-post-norm).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from vecmill.core.types import Task
from vecmill.models.config_keys import HEAD, NO_HEAD, ConfigFile, own_code
from vecmill.models.encoders import ENCODER_KEYS, UNUSED, check_one_label
from vecmill.models.family import BiasTable, ConfigJson, Family, HubModel, Network, Positions, TaskSpec
from vecmill.models.keys import HARMLESS, Rule, only, whole

REPOSITORIES = r"jinaai/jina-(bert-(implementation|v2-qk-post-norm)|embeddings-v2-[\w-]+|reranker-v1-[\w-]+)"
ORIGINAL = "original"  # a feed-forward layer without a gate
KEYS: Mapping[str, Rule] = {
    **ENCODER_KEYS,
    "auto_map": own_code(rf"({REPOSITORIES}--)?(configuration|modeling)_bert\.JinaBert\w+", "jina-bert-implementation"),
    "emb_pooler": only("mean", None, cure="sentence-transformers' files say how to pool."),
    "feed_forward_type": only(ORIGINAL, "geglu", "reglu"),
    "model_max_length": HARMLESS,  # the tokenizer's own counts
    "position_embedding_type": only("alibi"),
}
PARTS: Mapping[str, Sequence[str]] = {
    "attention.self.layer_norm_q": ("query_norm",),
    "attention.self.layer_norm_k": ("key_norm",),
    "layer_norm_1": ("again_norm",),
    "layer_norm_2": ("output.LayerNorm",),
    # The two layouts have gate and gated layer in another order.
    "mlp.gated_layers": ("intermediate.gate_proj", "intermediate.up_proj"),
    "mlp.up_gated_layer": ("intermediate.up_proj", "intermediate.gate_proj"),
    "mlp.wo": ("intermediate.down_proj",),
    "mlp.down_layer": ("intermediate.down_proj",),
    "mlp.layernorm": ("output.LayerNorm",),
}


def _rename(name: str) -> Sequence[str]:
    """The hub's names; those of a masked language model, which most of the files are, with its prefix."""
    name = name.removeprefix("bert.")
    return () if name.startswith(UNUSED) else _native(name)


def _rename_with_head(name: str) -> Sequence[str]:
    return () if name.startswith("bert.embeddings.position_ids") else _native(name)


def _native(name: str) -> Sequence[str]:
    before, layer, rest = name.partition("encoder.layer.")
    number, _, part = rest.partition(".")
    module, _, leaf = part.rpartition(".")
    return tuple(f"{before}{layer}{number}.{each}.{leaf}" for each in PARTS[module]) if module in PARTS else (name,)


def _layout(names: Collection[str]) -> Mapping[str, Any]:
    """No key says which of the two it is, but where the code lies."""
    return {"second_layout": any(name.endswith("attention.self.layer_norm_q.weight") for name in names)}


def _arguments(config: ConfigJson, positions: int) -> dict[str, Any]:
    """A file with a head that names no labels has one, as sentence-transformers makes it."""
    given = {key: value for key, value in config.items() if key != "model_type"}
    labels = {} if "id2label" in config else {"num_labels": 1}
    return {**given, **labels, "feed_forward_type": config.get("feed_forward_type", ORIGINAL)}


def _check_positions(config: ConfigFile) -> None:
    if "position_embedding_type" not in config.content:
        raise config.unsupported("position_embedding_type", '"alibi"', "Left out, it is a table of positions.")


def _check_one_label(config: ConfigFile) -> None:
    """The files of jina-reranker-v1 name a class without a head, and no labels."""
    names = config.content.get("architectures") or []
    if not any(name.endswith("ForSequenceClassification") for name in names):
        config = replace(config, content={"num_labels": 1, **config.content, "architectures": None})
    check_one_label(config)


def _claims(config: ConfigJson) -> bool:
    """A BERT that names JinaBERT's classes, or has ALiBi and a key of its feed-forward layers."""
    if config.get("model_type") not in ("bert", "jina_bert"):
        return False
    named = f"{config.get('auto_map')} {config.get('architectures')}"
    return "JinaBert" in named or (config.get("position_embedding_type") == "alibi" and "feed_forward_type" in config)


NETWORK = Network(
    config_class="BertConfig",
    model_class="JinaBert",
    rename=_rename,
    arguments=_arguments,
    options={"add_pooling_layer": False},
    layout=_layout,
    blocks="layers",
    merged=("JinaGatedMLP",),
    token_types=True,
    position_bias="alibi",
)
JINA_BERT = Family(
    model_type="jina_bert",
    architectures=r"(Jina)?Bert\w+",
    tasks={
        Task.EMBED: TaskSpec({**KEYS, **NO_HEAD}, NETWORK, (_check_positions,)),
        Task.RERANK: TaskSpec(
            {**KEYS, **HEAD, "type_vocab_size": whole(2)},
            replace(
                NETWORK,
                model_class="JinaBertForPairs",
                rename=_rename_with_head,
                options={},
                head=("bert.pooler", "classifier"),
            ),
            (_check_positions, _check_one_label),
        ),
    },
    positions=Positions.ALIBI,
    claims=_claims,
    examples=(
        HubModel(
            "jinaai/jina-embeddings-v2-small-en",
            Task.EMBED,
            32_428_032,
            "apache-2.0",
            8192,
            512,
            stored="float16",
            bias=BiasTable(8, 8192),
        ),
        HubModel(
            "jinaai/jina-embeddings-v2-base-en",
            Task.EMBED,
            136_777_728,
            "apache-2.0",
            8192,
            768,
            stored="float16",
            bias=BiasTable(12, 8192),
        ),
        HubModel(
            "jinaai/jina-embeddings-v2-base-de",
            Task.EMBED,
            160_223_232,
            "apache-2.0",
            8192,
            768,
            stored="float16",
            bias=BiasTable(12, 8192),
        ),
        HubModel(
            "jinaai/jina-embeddings-v2-base-zh",
            Task.EMBED,
            160_223_232,
            "apache-2.0",
            8192,
            768,
            stored="float16",
            bias=BiasTable(12, 8192),
        ),
        HubModel(
            "jinaai/jina-embeddings-v2-base-code",
            Task.EMBED,
            160_278_528,
            "apache-2.0",
            8192,
            768,
            stored="float16",
            bias=BiasTable(12, 8192),
        ),
        HubModel(
            "jinaai/jina-reranker-v1-turbo-en",
            Task.RERANK,
            37_771_777,
            "apache-2.0",
            8192,
            stored="float16",
            bias=BiasTable(12, 8192),
        ),
        HubModel(
            "jinaai/jina-reranker-v1-tiny-en",
            Task.RERANK,
            33_046_273,
            "apache-2.0",
            8192,
            stored="float16",
            bias=BiasTable(12, 8192),
        ),
    ),
)
