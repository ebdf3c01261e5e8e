"""DistilBERT (multi-qa-distilbert-*, msmarco-distilbert-*, distiluse-*): BERT in half its layers, without token types.

Source: Sanh et al. 2019 (https://arxiv.org/abs/1910.01108).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vecmill.core.types import Task
from vecmill.models.config_keys import ACTIVATIONS, MOST_LAYERS, ConfigFile
from vecmill.models.encoders import ENCODER_KEYS, cross_encoder, embedder
from vecmill.models.family import Family, HubModel, Positions, TaskSpec
from vecmill.models.keys import HARMLESS, Rule, only, rules, whole

# transformers' class takes either name.
NATIVE_KEYS: Mapping[str, str] = {
    "dim": "hidden_size",
    "n_heads": "num_attention_heads",
    "n_layers": "num_hidden_layers",
}
WITHOUT = ("hidden_act", "intermediate_size", "layer_norm_eps", "type_vocab_size")
"""Keys of BERT that its class does not read."""
KEYS: Mapping[str, Rule] = {
    **{key: rule for key, rule in ENCODER_KEYS.items() if key not in WITHOUT},
    "activation": only(*ACTIVATIONS),
    "dim": whole(),
    "hidden_dim": whole(),
    "n_heads": whole(),
    "n_layers": whole(largest=MOST_LAYERS),
    **rules(HARMLESS, ("dropout", "qa_dropout", "seq_classif_dropout", "tie_weights_")),
    "sinusoidal_pos_embds": HARMLESS,  # what they are initialised with: the files have their values
}
WEIGHTS: Mapping[str, Any] = {"blocks": "transformer.layer", "token_types": False}
OF_PRETRAINING = ("vocab_layer_norm.", "vocab_projector.", "vocab_transform.")


def _check_names(config: ConfigFile) -> None:
    """Where a file has both names of a size, they agree."""
    for key, native in NATIVE_KEYS.items():
        if {key, native} <= config.content.keys():
            config.check_agreement(key, config.content[key], native, config.content[native])


def _checked(spec: TaskSpec) -> TaskSpec:
    return TaskSpec(spec.keys, spec.network, (_check_names, *spec.checks))


DISTILBERT = Family(
    model_type="distilbert",
    architectures=r"DistilBert\w+",
    tasks={
        Task.EMBED: _checked(embedder("DistilBert", "distilbert.", KEYS, unused=OF_PRETRAINING, **WEIGHTS)),
        Task.RERANK: _checked(
            cross_encoder("DistilBert", "distilbert.", KEYS, head=("pre_classifier", "relu", "classifier"), **WEIGHTS)
        ),
    },
    positions=Positions.FROM_ZERO,
    examples=(
        HubModel("sentence-transformers/multi-qa-distilbert-cos-v1", Task.EMBED, 66_362_880, "see its card", 512, 768),
    ),
    native_keys=NATIVE_KEYS,
)
