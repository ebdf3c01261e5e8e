"""ELECTRA (ms-marco-electra-base): BERT, with token embeddings that may be narrower than its layers.

Source: Clark et al. 2020 (https://arxiv.org/abs/2003.10555).
"""

from __future__ import annotations

from collections.abc import Mapping

from vecmill.core.types import Task
from vecmill.models.encoders import ENCODER_KEYS, cross_encoder, embedder
from vecmill.models.family import Family, HubModel, Positions
from vecmill.models.keys import HARMLESS, Rule, whole

KEYS: Mapping[str, Rule] = {
    **ENCODER_KEYS,
    "embedding_size": whole(),
    "summary_last_dropout": HARMLESS,  # as all of `summary_*`, of multiple choice
}
OF_PRETRAINING = ("discriminator_predictions.", "generator_lm_head.", "generator_predictions.")

ELECTRA = Family(
    model_type="electra",
    architectures=r"Electra\w+",
    tasks={
        Task.EMBED: embedder("Electra", "electra.", KEYS, unused=OF_PRETRAINING),
        Task.RERANK: cross_encoder("Electra", "electra.", KEYS, types=True),
    },
    positions=Positions.FROM_ZERO,
    examples=(HubModel("cross-encoder/ms-marco-electra-base", Task.RERANK, 109_483_009, "see its card", 512),),
)
