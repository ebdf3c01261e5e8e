"""GTE (gte-multilingual-base and its reranker, gte-*-en-v1.5, snowflake-arctic-embed-m-v2.0, stella_en_400M_v5): an
encoder with rotary positions and a gated feed-forward layer, the norms after each residual.

The hub's files were made with code of their own, as `new` (Alibaba) or `gte` (Snowflake); transformers has the same
network as `gte`. Its rotations are stretched by NTK scaling that does not depend on the text, which transformers'
class gets as a larger base and a `linear` factor.

Sources: Zhang et al. 2024 (https://arxiv.org/abs/2407.19669); https://huggingface.co/Alibaba-NLP/new-impl, the code;
Yu et al. 2024 (https://arxiv.org/abs/2412.04506); https://kexue.fm/archives/9706 for the NTK scaling.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from vecmill.core.errors import StartupError
from vecmill.core.types import Task
from vecmill.models.config_keys import COMMON, HEAD, NO_HEAD, ROTARY, ConfigFile, check_rope, own_code, rope_type
from vecmill.models.encoders import check_one_label
from vecmill.models.family import ConfigJson, Family, HubModel, Network, Positions, PublishedModel, TaskSpec
from vecmill.models.keys import HARMLESS, Rule, check_keys, only, positive, rules, whole

KEYS: Mapping[str, Rule] = {
    **COMMON,
    **{key: rule for key, rule in ROTARY.items() if key != "head_dim"},
    "auto_map": own_code(
        r"(Alibaba-NLP/new-impl--)?(configuration|modeling)\.New\w+"
        r"|(Snowflake/[\w.-]+--)?(configuration|modeling)_hf_alibaba_nlp_gte\.Gte\w+",
        "Alibaba-NLP/new-impl",
    ),
    "layer_norm_eps": positive(),
    "type_vocab_size": whole(0),
    "position_embedding_type": only("rope", None, cure="Learned positions are not implemented for this family."),
    "layer_norm_type": only("layer_norm", None, cure="RMS norms are not implemented for this family."),
    "logn_attention_scale": only(
        False, None, cure="Scores that grow with the logarithm of a text's length are not implemented."
    ),
    # Other ways to compute the same, and where the files of packed weights are split: their names say it.
    **rules(HARMLESS, ("logn_attention_clip1", "pack_qkv", "unpad_inputs", "use_memory_efficient_attention")),
}
OWN_DEFAULTS: Mapping[str, Any] = {"vocab_size": 30528, "max_position_embeddings": 2048, "rope_theta": 10_000.0}
"""Of the hub's `new`, where transformers' class has others."""
HIDDEN_SIZE, HEADS = 768, 12  # of both, where config.json does not say
NTK: Mapping[str, Rule] = {
    "type": only("ntk"),
    "rope_type": only("ntk"),
    "factor": positive(),
    "mixed_b": only(None, cure="Mixed NTK scaling is not implemented."),
}


def _check_rope(config: ConfigFile) -> None:
    """Raise StartupError for parameters of rotations that are neither the hub's own nor transformers', or too few."""
    content = config.content
    kind, parameters = rope_type(content)
    if kind != "ntk":
        check_rope(config)
    else:
        if content.get("rope_parameters") is not None:
            raise config.unsupported("rope_parameters", "null beside an NTK `rope_scaling`")
        check_keys(config.named, config.path, parameters, NTK, within="rope_scaling")
        if "factor" not in parameters:
            raise StartupError(f"{config.named}: {config.path.name} leaves out `rope_scaling.factor`.")
    # The code that such files were made with has another base than transformers' class where the file has none.
    made_with_own_code = kind == "ntk" or content.get("auto_map") is not None
    if (
        made_with_own_code
        and not parameters.get("rope_theta")
        and "rope_theta" not in {**_defaults(content), **content}
    ):
        raise StartupError(f"{config.named}: {config.path.name} leaves out `rope_theta`, which has no one default.")


def _defaults(config: ConfigJson) -> Mapping[str, Any]:
    return OWN_DEFAULTS if config.get("model_type") == "new" else {}


def _arguments(config: ConfigJson, positions: int) -> dict[str, Any]:
    """The native class's keys, from the hub's or the native ones."""
    native: dict[str, Any] = {**_defaults(config), **config, "model_type": "gte"}
    kind, parameters = rope_type(config)
    if kind != "ntk":
        return native
    factor, theta = float(parameters["factor"]), float(native.pop("rope_theta"))
    head_dim = native.get("hidden_size", HIDDEN_SIZE) // native.get("num_attention_heads", HEADS)
    stretched = {"rope_type": "linear", "rope_theta": theta * factor, "factor": factor ** (2 / head_dim)}
    return {**native, "rope_parameters": stretched, "rope_scaling": None}


def _max_positions(config: ConfigJson) -> int | None:
    positions: int | None = {**_defaults(config), **config}.get("max_position_embeddings")
    return positions


PARTS = {
    "attention.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.q_proj": ("self_attn.q_proj",),
    "attention.k_proj": ("self_attn.k_proj",),
    "attention.v_proj": ("self_attn.v_proj",),
    "attention.o_proj": ("self_attn.o_proj",),
    "attn_ln": ("post_attention_layernorm",),
    "mlp.up_gate_proj": ("mlp.up_proj", "mlp.gate_proj"),
    "mlp_ln": ("post_mlp_layernorm",),
}
LAYERS = "encoder.layer."
# The buffers that some fine-tunes have stored are computed from config.json.
UNUSED = ("embeddings.rotary_emb.", "embeddings.position_ids", "lm_head.", "rotary_emb.")


def _in_encoder(name: str) -> Sequence[str]:
    """The hub's names of the encoder's weights, or the native ones, without a prefix."""
    if name.startswith(UNUSED):
        return ()
    if not name.startswith(LAYERS):
        return (name,)
    number, _, rest = name.removeprefix(LAYERS).partition(".")
    part, _, leaf = rest.rpartition(".")
    return tuple(f"layers.{number}.{native}.{leaf}" for native in PARTS.get(part, (part,)))


def _rename(name: str) -> Sequence[str]:
    """An embedder's. gte-multilingual-base also has a weight for each token, for sparse vectors."""
    name = name.removeprefix("new.").removeprefix("gte.")
    return () if name.startswith(("classifier.", "pooler.")) else _in_encoder(name)


def _rename_with_head(name: str) -> Sequence[str]:
    """A reranker's, whose encoder is under a prefix and its head is not."""
    for prefix in ("new.", "gte."):
        if name.startswith(prefix):
            return tuple(f"gte.{native}" for native in _in_encoder(name.removeprefix(prefix)))
    return (name,)


MERGED = ("GteAttention", "GteMLP")
EMBEDDER = TaskSpec(
    {**KEYS, **NO_HEAD},
    Network("GteConfig", "GteModel", _rename, _arguments, merged=MERGED, token_types=True),
    (_check_rope,),
)
RERANKER = TaskSpec(
    {**KEYS, **HEAD},
    Network(
        "GteConfig",
        "GteForSequenceClassification",
        _rename_with_head,
        _arguments,
        merged=MERGED,
        token_types=True,
        head=("gte.pooler", "classifier"),
    ),
    (_check_rope, check_one_label),
)

GTE = Family(
    model_type="gte",
    architectures=r"(Gte|New)(Model|For\w+)",
    tasks={Task.EMBED: EMBEDDER, Task.RERANK: RERANKER},
    positions=Positions.ROTARY,
    max_positions=_max_positions,
    published=(
        PublishedModel("Snowflake", r"snowflake-arctic-embed-m-v2\.0", {"query": "query: "}, dimensions=(256,)),
    ),
    examples=(
        HubModel("Snowflake/snowflake-arctic-embed-m-v2.0", Task.EMBED, 305_368_320, "apache-2.0", 8192, 768),
        HubModel(
            "alibaba-nlp-community/gte-multilingual-reranker-base",
            Task.RERANK,
            305_959_681,
            "apache-2.0",
            8192,
            stored="float16",
        ),
    ),
)
NEW = replace(
    GTE,
    model_type="new",
    published=tuple(
        PublishedModel(owner, r"gte-multilingual-base", dimensions=range(128, 769))
        for owner in ("Alibaba-NLP", "alibaba-nlp-community")
    ),
    examples=(
        HubModel(
            "Alibaba-NLP/gte-multilingual-base",
            Task.EMBED,
            305_368_320,
            "apache-2.0",
            8192,
            768,
            stored="float16",
            note="its sparse vectors are not served",
        ),
        HubModel("Alibaba-NLP/gte-base-en-v1.5", Task.EMBED, 136_776_192, "apache-2.0", 8192, 768),
        HubModel("Alibaba-NLP/gte-large-en-v1.5", Task.EMBED, 434_139_136, "apache-2.0", 8192, 1024),
        HubModel("NovaSearch/stella_en_400M_v5", Task.EMBED, 435_000_000, "mit", 512, 1024),
        HubModel(
            "Alibaba-NLP/gte-multilingual-reranker-base", Task.RERANK, 305_959_681, "apache-2.0", 8192, stored="float16"
        ),
    ),
)
