"""The families that are served, each in a file of its own. A spec imports no torch: files are checked without it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vecmill.core.errors import StartupError
from vecmill.core.types import Task
from vecmill.models.families.albert import ALBERT
from vecmill.models.families.bert import BERT
from vecmill.models.families.deberta import DEBERTA_V2
from vecmill.models.families.distilbert import DISTILBERT
from vecmill.models.families.electra import ELECTRA
from vecmill.models.families.embedding_gemma2 import EMBEDDING_GEMMA2
from vecmill.models.families.gemma import GEMMA
from vecmill.models.families.gemma3 import GEMMA3
from vecmill.models.families.gte import GTE, NEW
from vecmill.models.families.jina_bert import JINA_BERT
from vecmill.models.families.jina_embeddings_v3 import JINA_EMBEDDINGS_V3
from vecmill.models.families.llama import LLAMA
from vecmill.models.families.llama_bidirec import LLAMA_BIDIREC
from vecmill.models.families.ministral3 import MINISTRAL3, MISTRAL3
from vecmill.models.families.mistral import MISTRAL
from vecmill.models.families.modernbert import MODERNBERT
from vecmill.models.families.mpnet import MPNET
from vecmill.models.families.nomic_bert import NOMIC_BERT
from vecmill.models.families.nv_embed import NV_EMBED
from vecmill.models.families.qwen2 import QWEN2
from vecmill.models.families.qwen3 import QWEN3
from vecmill.models.families.roberta import CAMEMBERT, ROBERTA, XLM_ROBERTA
from vecmill.models.families.static_embedding import STATIC_EMBEDDING
from vecmill.models.family import Family, PublishedModel

FAMILIES: Mapping[str, Family] = {
    family.model_type: family
    for family in (
        BERT,
        ROBERTA,
        XLM_ROBERTA,
        MODERNBERT,
        CAMEMBERT,
        DISTILBERT,
        ELECTRA,
        ALBERT,
        MPNET,
        DEBERTA_V2,
        JINA_BERT,
        EMBEDDING_GEMMA2,
        GEMMA,
        GEMMA3,
        GTE,
        NEW,
        JINA_EMBEDDINGS_V3,
        LLAMA_BIDIREC,
        MINISTRAL3,
        MISTRAL3,
        LLAMA,
        MISTRAL,
        NOMIC_BERT,
        NV_EMBED,
        QWEN2,
        QWEN3,
        STATIC_EMBEDDING,
    )
}
"""By `model_type` in config.json."""


def family_of(named: str, file: Path, config: Mapping[str, Any], task: Task) -> Family:
    """The family of a config.json, whose every key is known and says what is implemented.

    Args:
        named: the setting that names the model, for the error.
        file: the config.json, for the error.

    Raises:
        StartupError: the family is not served for the task, a key is not known, or its value is not supported.
    """
    served = {model_type: family for model_type, family in FAMILIES.items() if task in family.tasks}
    model_type = _model_type(config)
    if model_type not in served:
        raise StartupError(
            f"{named}: model_type {model_type!r} is not supported; supported: {', '.join(sorted(served))}. "
            f"`vecmill models` lists them with models that fit this machine."
        )
    served[model_type].check_config(named, file, config, task)
    return served[model_type]


def _model_type(config: Mapping[str, Any]) -> str:
    """Of the family that a config.json is of, whichever `model_type` it has."""
    claiming = (family.model_type for family in FAMILIES.values() if family.claims(config))
    return next(claiming, None) or str(config.get("model_type", "missing"))


def own_modules(config: Mapping[str, Any]) -> Mapping[str, str]:
    """Classes in the modules.json beside a config.json that are a checkpoint's own code, implemented here."""
    return next((family.own_modules for family in FAMILIES.values() if family.claims(config)), {})


def published_model(model_id: str) -> PublishedModel | None:
    """What is known of the model of an id, or of a folder's name, whatever the family of its files.

    `_name_or_path` in config.json does not count: a fine-tune has that of the model that it was made from.
    """
    models = (model for family in FAMILIES.values() for model in family.published)
    return next((model for model in models if model.is_called(model_id)), None)


def decoders(task: Task) -> list[str]:
    """The `model_type` of the causal language models that are served for a task."""
    return [family.model_type for family in FAMILIES.values() if family.is_decoder and task in family.tasks]
