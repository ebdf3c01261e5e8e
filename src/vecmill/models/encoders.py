"""What families of encoders have in common: the check of a cross-encoder's labels. Reads no tensors."""

from __future__ import annotations

from collections.abc import Mapping

from vecmill.models.config_keys import ConfigFile


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
