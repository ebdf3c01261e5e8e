"""What the encoders after BERT have in common: keys of config.json, names of weights, and heads that score a pair.

Sources: Devlin et al. 2019 (https://arxiv.org/abs/1810.04805); Reimers and Gurevych 2019
(https://arxiv.org/abs/1908.10084) for the pooling; Nogueira and Cho 2019 (https://arxiv.org/abs/1901.04085) for
cross-encoders.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from vecmill.models.config_keys import COMMON, HEAD, NO_HEAD, ConfigFile
from vecmill.models.family import Network, TaskSpec
from vecmill.models.keys import HARMLESS, Rule, only, positive, rules, whole

# Of Google's releases and of TinyBERT's; read by nothing.
OF_RELEASES = (
    *(f"pooler_{part}" for part in ("fc_size", "num_attention_heads", "num_fc_layers", "size_per_head", "type")),
    *("cell", "emb_size", "pre_trained", "structure", "training"),
)
ENCODER_KEYS: Mapping[str, Rule] = {
    **COMMON,
    **rules(HARMLESS, OF_RELEASES),
    "layer_norm_eps": positive(),
    "pad_token_id": whole(0, null=True),
    "position_embedding_type": only("absolute", None, cure="Its positions (ALiBi, relative) are not implemented."),
    "type_vocab_size": whole(),
}
# What checkpoints carry of pre-training; an encoder's own pooler is trained for next-sentence prediction.
UNUSED = ("pooler.", "embeddings.position_ids", "cls.", "lm_head.")
OWN_UNUSED = ("embeddings.position_ids", "pooler.")
"""The same with the encoder's prefix, in files of a cross-encoder."""


def check_one_label(config: ConfigFile) -> None:
    """A relevance score is one number, and a head gives it: transformers would make up one that is missing."""
    names = config.content.get("architectures") or []
    if names and not any(name.endswith("ForSequenceClassification") for name in names):
        raise config.unsupported(
            "architectures", "a ...ForSequenceClassification", "Others have no head that scores a pair."
        )
    labels = config.content.get("id2label")
    if isinstance(labels, Mapping):
        if len(labels) != 1:
            raise config.unsupported("id2label", "one label", "A reranker gives one number, the relevance score.")
    elif config.content.get("num_labels") != 1:  # transformers makes a head of two where neither key is there
        raise config.unsupported(
            "num_labels", "1", "A reranker gives one number, the relevance score; without it there are 2."
        )


def embedder(
    name: str, prefix: str, keys: Mapping[str, Rule], *, unused: Sequence[str] = (), **network: Any
) -> TaskSpec:
    """An encoder by itself.

    Args:
        name: what the names of transformers' classes begin with.
        prefix: of its weights' names where its files were saved together with a head.
        keys: of config.json, less those of a head.
        unused: how further names of weights begin that are left out.
        network: other fields of Network.
    """
    fields: dict[str, Any] = {"blocks": "encoder.layer", "token_types": True, **network}
    rename = partial(_rename, prefix, (*UNUSED, *unused))
    return TaskSpec({**keys, **NO_HEAD}, Network(f"{name}Config", f"{name}Model", rename, **fields))


def cross_encoder(
    name: str,
    prefix: str,
    keys: Mapping[str, Rule],
    *,
    head: tuple[str, ...] = ("classifier",),
    types: bool = False,
    unused: Sequence[str] = (),
    **network: Any,
) -> TaskSpec:
    """An encoder and the head that scores a pair, under the class's own names of weights.

    Args:
        name: as of an embedder; `prefix`, `keys`, `unused` and `network` too.
        head: as Network has it.
        types: whether its pairs have two token types, as its tokenizer makes them.
    """
    fields: dict[str, Any] = {"blocks": "encoder.layer", "token_types": True, **network}
    own_unused = (f"{prefix}{each}" for each in OWN_UNUSED if f"{prefix}{each}".rstrip(".") not in head)
    keys = {**keys, **HEAD, **({"type_vocab_size": whole(2)} if types else {})}
    rename = partial(_rename, "", (*own_unused, *unused))
    model = f"{name}ForSequenceClassification"
    return TaskSpec(keys, Network(f"{name}Config", model, rename, head=head, **fields), (check_one_label,))


def _rename(prefix: str, unused: tuple[str, ...], name: str) -> Sequence[str]:
    """A weight's name without the prefix; TensorFlow's names for the weights of a layer norm as torch has them."""
    name = name.removeprefix(prefix)
    if name.startswith(unused):
        return ()
    return (name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias"),)
