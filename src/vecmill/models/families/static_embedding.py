"""StaticEmbedding and model2vec (potion, static-retrieval-mrl): a text's vector is the mean of its tokens' vectors,
which lie in a table. There is no transformer, and no config.json is read.

Sources: https://huggingface.co/blog/static-embeddings; https://github.com/MinishLab/model2vec;
https://huggingface.co/minishlab/potion-base-8M.
"""

from __future__ import annotations

from collections.abc import Mapping

from vecmill.core.types import Task
from vecmill.models.config_keys import COMMON
from vecmill.models.family import Family, HubModel, Network, Positions, PublishedModel, TaskSpec
from vecmill.models.keys import HARMLESS, HONOURED, Rule, rules

# What model2vec notes of how a table was made; `normalize` and `seq_length` are its own class's, and a Normalize module
# and the tokenizer say the same to sentence-transformers.
OF_MODEL2VEC = (
    *("apply_pca", "apply_zipf", "architectures", "embedding_dtype", "hidden_dim", "normalize", "pca_dims", "pooling"),
    *("seq_length", "sif_coefficient", "token_remove_pattern", "tokenizer_name", "vocabulary_quantization"),
    *("dtype", "torch_dtype", "transformers_version"),
)
KEYS: Mapping[str, Rule] = {
    **rules(HARMLESS, OF_MODEL2VEC),
    **{key: COMMON[key] for key in ("auto_map", "is_matryoshka", "matryoshka_dimensions")},
    "model_type": HONOURED,
}
# The reference has no limit. So many are a text of some megabytes; a request has its limit of bytes besides.
MOST_TOKENS = 1_000_000

STATIC_EMBEDDING = Family(
    model_type="static_embedding",
    architectures=r".*",
    tasks={
        Task.EMBED: TaskSpec(
            KEYS, Network(config_class="", model_class="", rename=lambda name: (name,), token_table=True)
        )
    },
    positions=Positions.ROTARY,
    published=(
        PublishedModel(
            "sentence-transformers",
            r"static-(retrieval-mrl-en|similarity-mrl-multilingual)-v1",
            dimensions=(32, 64, 128, 256, 512, 1024),
        ),
    ),
    max_positions=lambda config: MOST_TOKENS,
    tokenizer_as_it_stands=True,
    examples=(
        HubModel("minishlab/potion-base-8M", Task.EMBED, 7_559_168, "mit", 1_000_000, 256),
        HubModel(
            "sentence-transformers/static-retrieval-mrl-en-v1", Task.EMBED, 31_254_528, "apache-2.0", 1_000_000, 1024
        ),
    ),
)
