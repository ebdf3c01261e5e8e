"""Which models the settings mean on this device."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from vecmill.config import ModelSettings
from vecmill.core.errors import StartupError
from vecmill.core.types import Task
from vecmill.models.checkpoint import Source, read
from vecmill.models.rerank_prompt import check_form
from vecmill.models.source import GPU_DEFAULTS, find
from vecmill.models.tokenizer_loading import load_tokenizer

logger = logging.getLogger(__name__)

AUTO = "auto"
NONE = "none"


def chosen_sources(
    models: ModelSettings, device: torch.device, report: Callable[[str], None] = lambda message: None
) -> list[Source]:
    """The folders of EMBED_MODEL, then those of RERANK_MODEL; `report` is told of what is fetched from the hub.

    Raises:
        StartupError: one is not to be found.
    """
    named = [(Task.EMBED, name) for name in models.embed_model] + [(Task.RERANK, name) for name in models.rerank_model]
    sources = (_find(task, name, models, device, report) for task, name in named if name != NONE)
    return [source for source in sources if source is not None]


def _find(
    task: Task, name: str, models: ModelSettings, device: torch.device, report: Callable[[str], None]
) -> Source | None:
    if name != AUTO:
        return _named(task, name, models, report)
    if device.type == "cuda":
        default = GPU_DEFAULTS[task]
        try:
            return _named(task, default, models, report)
        except StartupError as error:
            instead = "the small bundled model is served" if task is Task.EMBED else "documents are ranked by cosine"
            logger.warning("%s INSTEAD, %s. `vecmill pull %s` fetches it.", error.message, instead, default)
    return find(AUTO, task) if task is Task.EMBED else None


def _check(source: Source) -> None:
    checkpoint = read(source)
    check_form(checkpoint)
    load_tokenizer(checkpoint)


def _named(task: Task, name: str, models: ModelSettings, report: Callable[[str], None]) -> Source:
    token = models.hf_token.get_secret_value() if models.hf_token else None
    # What no family here can run is refused before its weights are fetched.
    return find(
        name,
        task,
        hf_token=token,
        revision=models.revision_of(name),
        check=_check,
        report=lambda fetched, complete: report(f"fetching {name}: {fetched / 1e9:.1f} GB, {complete} files complete"),
    )
