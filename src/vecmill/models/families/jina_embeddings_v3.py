"""jina-embeddings-v3: an XLM-RoBERTa with rotary positions, and weights of their own for five tasks.

The hub's files were made with code of their own, under XLM-RoBERTa's `model_type`; transformers has the same network,
without the adapters, as `jina_embeddings_v3`. A request's `task` chooses adapter and prompt; a text without one is run
without any adapter, as in the hub's code.

Sources: Sturua et al. 2024 (https://arxiv.org/abs/2409.10173); https://huggingface.co/jinaai/jina-embeddings-v3;
https://huggingface.co/jinaai/xlm-roberta-flash-implementation, the code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vecmill.core.errors import StartupError
from vecmill.core.types import Task
from vecmill.models.config_keys import COMMON, NO_HEAD, ConfigFile, own_code
from vecmill.models.family import Adapters, ConfigJson, Family, HubModel, Network, Positions, PublishedModel, TaskSpec
from vecmill.models.keys import HARMLESS, HONOURED, Rule, only, positive, rules, whole

IN_FOLDERS = "Name jinaai/jina-embeddings-v3: files for transformers' own class have their adapters in folders of PEFT."
RANK, ALPHA, ROTARY_BASE = 4, 1, 10_000.0  # of the hub's code, where config.json does not say
# More are no model's, and would only take memory before the weights show that they do not fit.
MOST_TASKS, MOST_RANK = 1000, 4096
KEYS: Mapping[str, Rule] = {
    **COMMON,
    **NO_HEAD,
    "auto_map": own_code(
        r"(jinaai/xlm-roberta-flash-implementation--)?"
        r"(configuration_xlm_roberta|modeling_lora|modeling_xlm_roberta)\.XLMRoberta\w+",
        "jinaai/xlm-roberta-flash-implementation",
    ),
    "emb_pooler": only("mean", None),
    "layer_norm_eps": positive(),
    "load_trained_adapters": only(True, cure="Without adapters there is nothing that a task could choose."),
    "lora_adaptations": HONOURED,  # see `_check_tasks`
    "lora_alpha": positive(),
    "lora_rank": whole(largest=MOST_RANK),
    "pad_token_id": whole(0, null=True),
    "position_embedding_type": only("rotary"),
    "rope_parameters": only(None, cure=IN_FOLDERS),
    "rotary_emb_base": positive(),
    "task_instructions": HONOURED,  # see `_check_tasks`
    "truncate_dim": only(None, cure="Ask for `dimensions`."),
    "type_vocab_size": whole(),
    **rules(HARMLESS, ("lora_dropout_p", "lora_main_params_trainable", "use_flash_attn", "use_reentrant")),
}
NOT_NATIVE = ("emb_pooler", "load_trained_adapters", "position_embedding_type", "truncate_dim", "auto_map")
MODEL_TYPES = ("xlm-roberta", "jina_embeddings_v3")
ROLES: Mapping[str, str] = {"query": "retrieval.query", "document": "retrieval.passage"}
"""Prompts that every model has, to the task whose instruction they are."""


def _are_names(value: Any) -> bool:
    named = isinstance(value, list) and all(isinstance(name, str) and name for name in value)
    return named and 0 < len(value) == len(set(value)) <= MOST_TASKS


def _check_tasks(config: ConfigFile) -> None:
    """Each task has a name and an instruction, as the hub's code wants it. Raises StartupError where it has not."""
    content = config.content
    missing = [key for key in ("load_trained_adapters", "lora_adaptations", "task_instructions") if key not in content]
    if missing:
        raise StartupError(f"{config.named}: {config.path.name} leaves out `{missing[0]}`. {IN_FOLDERS}")
    tasks, instructions = content["lora_adaptations"], content["task_instructions"]
    if not _are_names(tasks):
        raise config.unsupported("lora_adaptations", f"a list of up to {MOST_TASKS} different names")
    texts = isinstance(instructions, Mapping) and all(isinstance(text, str) for text in instructions.values())
    if not texts or set(instructions) != set(tasks):
        raise config.unsupported("task_instructions", "an object with a text for each of `lora_adaptations`")


def _adapters(config: ConfigJson) -> Adapters:
    rank = config.get("lora_rank", RANK)
    return Adapters(tuple(config["lora_adaptations"]), rank, config.get("lora_alpha", ALPHA) / rank)


def _prompts(config: ConfigJson) -> Mapping[str, str]:
    instructions = config["task_instructions"]
    of_roles = {role: instructions[task] for role, task in ROLES.items() if task in instructions}
    return {**of_roles, **instructions}


def _arguments(config: ConfigJson, positions: int) -> dict[str, Any]:
    """The native class's keys."""
    native = {key: value for key, value in config.items() if key not in NOT_NATIVE and not key.startswith("lora_")}
    del native["task_instructions"]
    base = float(native.pop("rotary_emb_base", ROTARY_BASE))
    rope = {"rope_type": "default", "rope_theta": base}
    return {**native, "model_type": "jina_embeddings_v3", "rope_parameters": rope}


PARTS: Mapping[str, str] = {
    "mixer.Wqkv": "qkv_proj",
    "mixer.out_proj": "o_proj",
    "mlp.fc1": "fc1",
    "mlp.fc2": "fc2",
    "norm1": "post_attention_layernorm",
    "norm2": "post_mlp_layernorm",
}
LEAVES: Mapping[str, str] = {
    "parametrizations.weight.original": "weight",
    "parametrizations.weight.0.lora_A": "lora_A",
    "parametrizations.weight.0.lora_B": "lora_B",
}
LAYERS = "encoder.layers."
UNUSED = ("pooler.", "lm_head.", "embeddings.position_ids")


def _rename(name: str) -> Sequence[str]:
    """The hub's names to those of `models/adapters.py`."""
    name = name.removeprefix("roberta.").replace("emb_ln.", "embeddings.LayerNorm.")
    if name.startswith(UNUSED):
        return ()
    for stored, leaf in LEAVES.items():
        name = f"{name.removesuffix(stored)}{leaf}" if name.endswith(stored) else name
    if not name.startswith(LAYERS):
        return (name,)
    number, _, rest = name.removeprefix(LAYERS).partition(".")
    part, _, leaf = rest.rpartition(".")
    return (f"layers.{number}.{PARTS.get(part, part)}.{leaf}",)


JINA_EMBEDDINGS_V3 = Family(
    model_type="jina_embeddings_v3",
    architectures=r"(XLMRoberta(Model|LoRA)|JinaEmbeddingsV3Model)",
    tasks={
        Task.EMBED: TaskSpec(
            KEYS,
            Network(
                "JinaEmbeddingsV3Config",
                "JinaEmbeddingsV3Model",
                _rename,
                _arguments,
                options={"add_pooling_layer": False},
                token_types=True,
                adapters=_adapters,
            ),
            (_check_tasks,),
        )
    },
    positions=Positions.ROTARY,
    claims=lambda config: config.get("model_type") in MODEL_TYPES and "lora_adaptations" in config,
    own_modules={"custom_st.Transformer": "Transformer"},
    prompts=_prompts,
    published=(PublishedModel("jinaai", r"jina-embeddings-v3", dimensions=(32, 64, 128, 256, 512, 768)),),
    examples=(
        HubModel(
            "jinaai/jina-embeddings-v3",
            Task.EMBED,
            572_310_396,
            "cc-by-nc-4.0",
            8192,
            1024,
            stored="bfloat16",
            note="no commercial use",
        ),
    ),
)
