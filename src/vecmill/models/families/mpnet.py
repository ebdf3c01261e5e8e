"""MPNet (all-mpnet-base-v2, multi-qa-mpnet-*, paraphrase-mpnet-*): BERT with a bias for the distance of two tokens too.

Source: Song et al. 2020 (https://arxiv.org/abs/2004.09297).
"""

from __future__ import annotations

from collections.abc import Mapping

from vecmill.core.types import Task
from vecmill.models.encoders import ENCODER_KEYS, cross_encoder, embedder
from vecmill.models.family import BiasTable, Family, HubModel, Positions
from vecmill.models.keys import Rule, only

KEYS: Mapping[str, Rule] = {
    **{key: rule for key, rule in ENCODER_KEYS.items() if key != "type_vocab_size"},
    "pad_token_id": only(1, cure="transformers' class counts positions from 1, whatever it says."),
    "relative_attention_num_buckets": only(32, cure="transformers' class computes 32, whatever it says."),
}

TABLE = BiasTable(12, 514)
MPNET = Family(
    model_type="mpnet",
    architectures=r"MPNet\w+",
    tasks={
        Task.EMBED: embedder(
            "MPNet",
            "mpnet.",
            KEYS,
            options={"add_pooling_layer": False},
            blocks="layers",
            token_types=False,
            position_bias="buckets",
        ),
        Task.RERANK: cross_encoder(
            "MPNet", "mpnet.", KEYS, blocks="layers", token_types=False, position_bias="buckets"
        ),
    },
    positions=Positions.AFTER_PADDING,
    examples=(
        HubModel(
            "sentence-transformers/all-mpnet-base-v2", Task.EMBED, 109_486_464, "apache-2.0", 384, 768, bias=TABLE
        ),
        HubModel(
            "sentence-transformers/multi-qa-mpnet-base-dot-v1",
            Task.EMBED,
            109_486_978,
            "see its card",
            512,
            768,
            bias=TABLE,
        ),
    ),
)
