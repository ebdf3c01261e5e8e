"""nomic-embed-text-v1.5 and other nomic BERTs: rotary positions, post-norm, mean pooling; SwiGLU, or a plain GELU and
in every other layer a mixture of experts (nomic-embed-text-v2-moe).

Sources: Nussbaum et al. 2024 (https://arxiv.org/abs/2402.01613); Nussbaum and Duderstadt 2025
(https://arxiv.org/abs/2502.07972); https://huggingface.co/nomic-ai/nomic-embed-text-v1.5 and -v2-moe; the code that the
hub's files were made with (https://huggingface.co/nomic-ai/nomic-bert-2048).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vecmill.core.errors import StartupError
from vecmill.core.types import Task
from vecmill.models.config_keys import (
    COMMON,
    MOST_LAYERS,
    MOST_POSITIONS,
    NO_HEAD,
    ROTARY,
    ConfigFile,
    check_rope,
    own_code,
    rope_type,
)
from vecmill.models.family import ConfigJson, Family, HubModel, Network, Positions, PublishedModel, TaskSpec
from vecmill.models.keys import HARMLESS, HONOURED, Rule, only, positive, rules, whole

GATED: Mapping[str, str] = {"swiglu": "silu", "geglu": "gelu", "glu": "sigmoid"}
"""Feed-forward layers with a gate, and the gate's activation."""
PLAIN = "gelu"  # without one
BIASES = ("mlp_fc1_bias", "mlp_fc2_bias", "qkv_proj_bias")
KEYS: Mapping[str, Rule] = {
    **COMMON,
    **ROTARY,
    "auto_map": own_code(
        r"(nomic-ai/nomic-bert-2048--)?(configuration|modeling)_hf_nomic_bert\.NomicBert\w+", "nomic-ai/nomic-bert-2048"
    ),
    "layer_norm_eps": positive(),
    "pad_token_id": whole(0),
    "type_vocab_size": whole(),
    # The keys of the code that the hub's files were made with, where the native class has others or none.
    "n_embd": whole(),
    "n_head": whole(),
    "n_inner": whole(),
    "n_layer": whole(largest=MOST_LAYERS),
    "n_positions": whole(largest=MOST_POSITIONS),
    "max_trained_positions": whole(largest=MOST_POSITIONS),
    "layer_norm_epsilon": positive(),
    "rotary_emb_base": positive(),
    "activation_function": only(*GATED, PLAIN),
    "causal": only(False),
    **rules(only(False, True), BIASES),
    "num_experts": whole(0, null=True),  # these of mixtures of experts, see `_check_experts`
    "moe_every_n_layers": whole(0, null=True),
    "moe_top_k": whole(null=True),
    "moe_normalize_expert_weights": only(False, True, None),
    "expert_choice_router": only(False, None, cure="Experts that choose their tokens are not implemented."),
    "num_shared_experts": only(0, None, cure="Experts that every token goes through are not implemented."),
    "ffn_div": HONOURED,
    "parallel_block": only(False),
    "parallel_block_tied_norm": HARMLESS,  # of parallel blocks
    "prenorm": only(False),
    "reorder_and_upcast_attn": only(False),
    "rotary_emb_fraction": only(1.0),
    "rotary_emb_interleaved": only(False),
    "rotary_emb_scale_base": only(None),
    "rotary_scaling_factor": HARMLESS,  # beyond the positions it was trained on, where texts are cut
    "scale_attn_by_inverse_layer_idx": only(False),
    "scale_attn_weights": only(True),
    "use_rms_norm": only(False, None),
    **rules(HARMLESS, ("add_pooling_layer", "dense_seq_output", "pad_vocab_size_multiple", "use_flash_attn")),
    **rules(HARMLESS, ("moe_impl", "moe_resid_pdrop", "router_aux_loss_coef")),  # how they are computed and trained
    **NO_HEAD,
}
NATIVE_KEYS: Mapping[str, str] = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_inner": "intermediate_size",
    "layer_norm_epsilon": "layer_norm_eps",
    "max_trained_positions": "max_position_embeddings",
}
# Where a file has the hub's keys, these must be among them: the code's defaults are others than the native class's.
REQUIRED = (
    *("n_embd", "n_head", "n_inner", "n_layer", "layer_norm_epsilon"),
    *("activation_function", "rotary_emb_base", "rotary_emb_fraction"),
)
NATIVE_THETA = 1000.0  # of the native class, where its keys do not say
TRAINED_POSITIONS = 2048  # what the code takes where the file has `n_positions` alone


def _check_layout(config: ConfigFile) -> None:
    """The hub's keys are there together, and agree with the native ones where a file has both."""
    content = config.content
    same = [
        (hub, content[hub], native, content[native])
        for hub, native in NATIVE_KEYS.items()
        if {hub, native} <= content.keys()
    ]
    if "rotary_emb_base" in content and (theta := _native_theta(content)) is not None:
        same += [("rotary_emb_base", content["rotary_emb_base"], "rope_theta", theta)]
    if "activation_function" in content and "hidden_act" in content:
        activation = GATED.get(content["activation_function"], PLAIN)
        same += [("activation_function", activation, "hidden_act", content["hidden_act"])]
    for pair in same:
        config.check_agreement(*pair)
    if not _has_hub_layout(content):
        return
    missing = [key for key in REQUIRED if key not in content]
    if missing:
        raise StartupError(f"{config.named}: {config.path.name} leaves out `{missing[0]}`, which has no one default.")
    if content.get("rope_scaling"):
        raise config.unsupported("rope_scaling", "null beside `rotary_emb_base`", "Put it into `rope_parameters`.")


def _has_hub_layout(content: ConfigJson) -> bool:
    return bool(content.keys() & NATIVE_KEYS.keys())


def _check_experts(config: ConfigFile) -> None:
    """The keys of mixtures of experts are there together and fit each other."""
    content = config.content
    experts, chosen = content.get("num_experts") or 0, content.get("moe_top_k") or 0
    if bool(experts) is not bool(content.get("moe_every_n_layers")):
        supported = "0, null without `moe_every_n_layers`" if experts else "from 1 on beside `moe_every_n_layers`"
        raise config.unsupported("num_experts", supported)
    if not experts:
        return
    if not 1 <= chosen <= experts:
        raise config.unsupported("moe_top_k", f"a whole number from 1 to {experts} (`num_experts`)")
    if content.get("activation_function") != PLAIN:
        raise config.unsupported("activation_function", f'"{PLAIN}" beside `num_experts`', "Experts have no gate.")
    if content.get("ffn_div") not in (1, None):
        raise config.unsupported("ffn_div", "1, null", "Experts smaller than `n_inner` are not implemented.")


def _native_theta(content: ConfigJson) -> Any:
    """The base of rotations that the native class takes; None where a file has the hub's keys alone."""
    native = (*NATIVE_KEYS.values(), "rope_parameters", "rope_scaling", "rope_theta")
    if all(content.get(key) is None for key in native):
        return None
    _, rope = rope_type(content)
    return rope.get("rope_theta", content.get("rope_theta", NATIVE_THETA))


def _arguments(config: ConfigJson, positions: int) -> dict[str, Any]:
    """The native class's keys, from the hub's or the native ones."""
    native = {NATIVE_KEYS.get(key, key): value for key, value in config.items()}
    if "rotary_emb_base" in config and config.get("rope_parameters") is None:
        # Rotary scaling beyond the trained length would make a vector depend on the longest text of its batch. Texts
        # are cut at that length instead, so the plain rotation is right.
        native["rope_parameters"] = {"rope_type": "default", "rope_theta": float(config["rotary_emb_base"])}
    every = config.get("moe_every_n_layers") or 0
    return {
        **native,
        **{key: config.get(key, _has_hub_layout(config)) for key in BIASES},  # the code's default is to have them
        "hidden_act": GATED.get(config.get("activation_function", ""), native.get("hidden_act", GATED["swiglu"])),
        "gated": config.get("activation_function") != PLAIN,
        "mixture_layers": [
            layer for layer in range(native.get("num_hidden_layers", 0)) if every and layer % every == 1
        ],
        "max_position_embeddings": positions,
    }


def _max_positions(config: ConfigJson) -> int | None:
    """Those trained: beyond them rotary scaling would make a vector depend on the longest text of its batch."""
    for key in ("max_trained_positions", "max_position_embeddings", "n_positions"):
        if (positions := config.get(key)) is not None:
            return min(positions, TRAINED_POSITIONS) if positions == config.get("n_positions") else int(positions)
    return None


PARTS = {
    "attn.Wqkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.out_proj": ("self_attn.o_proj",),
    "mlp.fc11": ("mlp.up_proj",),
    "mlp.fc12": ("mlp.gate_proj",),
    "mlp.fc1": ("mlp.up_proj",),
    "mlp.fc2": ("mlp.down_proj",),
    "norm1": ("post_attention_layernorm",),
    "norm2": ("post_mlp_layernorm",),
    "mlp.router.layer": ("mlp.router",),
}
OF_MIXTURES = {"mlp.experts.mlp.w1": "mlp.up", "mlp.experts.mlp.w2": "mlp.down", "mlp.experts.bias": "mlp.bias"}
UNUSED = ("pooler.", "cls.", "embeddings.position_ids")


def _rename(name: str) -> Sequence[str]:
    """The hub's names or the native ones."""
    name = name.removeprefix("nomic_bert.")
    if name.startswith(UNUSED):
        return ()
    if name.startswith("emb_ln."):
        return (name.replace("emb_ln.", "embeddings.LayerNorm."),)
    if not name.startswith("encoder.layers."):
        return (name,)
    _, _, layer, part = name.split(".", 3)
    if part in OF_MIXTURES:
        return (f"layers.{layer}.{OF_MIXTURES[part]}",)
    module, _, leaf = part.rpartition(".")
    return tuple(f"layers.{layer}.{native}.{leaf}" for native in PARTS.get(module, (module,)))


NOMIC_PROMPTS = {
    "query": "search_query: ",
    "document": "search_document: ",
    "clustering": "clustering: ",
    "classification": "classification: ",
}

NOMIC_BERT = Family(
    model_type="nomic_bert",
    architectures=r"NomicBert\w+",
    tasks={
        Task.EMBED: TaskSpec(
            KEYS,
            Network(
                config_class="NomicBertConfig",
                model_class="NomicBert",
                rename=_rename,
                arguments=_arguments,
                options={"add_pooling_layer": False},
                merged=("NomicBertAttention", "NomicBertMLP"),
                in_float32=("mlp.router.weight",),
                token_types=True,
            ),
            (check_rope, _check_layout, _check_experts),
        )
    },
    positions=Positions.ROTARY,
    examples=(
        HubModel("nomic-ai/nomic-embed-text-v1.5", Task.EMBED, 136_731_648, "apache-2.0", 2048, 768),
        HubModel("nomic-ai/nomic-embed-text-v1", Task.EMBED, 136_731_648, "apache-2.0", 2048, 768),
        HubModel("nomic-ai/nomic-embed-text-v2-moe", Task.EMBED, 475_292_928, "apache-2.0", 512, 768),
    ),
    published=(
        PublishedModel("nomic-ai", r"nomic-embed-text-v1", NOMIC_PROMPTS),
        PublishedModel("nomic-ai", r"nomic-embed-text-v1\.5", NOMIC_PROMPTS, dimensions=(64, 128, 256, 512, 768)),
        PublishedModel(
            "nomic-ai",
            r"nomic-embed-text-v2-moe",
            {name: NOMIC_PROMPTS[name] for name in ("query", "document")},
            dimensions=(256, 768),
        ),
    ),
    native_keys=NATIVE_KEYS,
    max_positions=_max_positions,
    layer_norm_before_slice=lambda config: not config.get("num_experts"),  # so v1.5's card; v2's only cuts
)
