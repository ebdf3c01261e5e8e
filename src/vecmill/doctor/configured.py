"""The models that the settings name, as far as they can be found without fetching anything."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vecmill.core.errors import StartupError
from vecmill.core.types import Task
from vecmill.doctor.context import Context
from vecmill.models import hub
from vecmill.models.checkpoint import Checkpoint, Source, read
from vecmill.models.rerank_prompt import check_form
from vecmill.models.source import BUNDLED_ID, GPU_DEFAULTS, bundled_instead, find, hub_id, is_hub_id
from vecmill.models.weight_files import parameters

AUTO, NONE = "auto", "none"
BYTES = {"float32": 4}  # of a parameter; all other types have 2
OTHER_BYTES = 2


@dataclass(frozen=True, slots=True)
class Configured:
    """One model. Without checkpoint and problem it is to be fetched from the hub."""

    name: str
    task: Task
    automatic: bool
    """Whether `auto` chose it: without it the server starts with something smaller."""
    checkpoint: Checkpoint | None
    problem: str | None
    """Why its files are of no use, with what would help."""

    @property
    def named(self) -> str:
        """The setting that names it."""
        return f"{self.task.value.upper()}_MODEL={self.name}"

    @property
    def to_fetch(self) -> bool:
        return self.checkpoint is None and self.problem is None

    @property
    def weight_parameters(self) -> int | None:
        """Of the files that are here; None where they cannot be read, or are not here."""
        if self.checkpoint is None:
            return None
        try:
            return parameters(self.checkpoint.weight_files)
        except (OSError, ValueError, LookupError, TypeError):
            return None


def configured(context: Context) -> list[Configured]:
    """The models of EMBED_MODEL, then those of RERANK_MODEL."""
    models = context.settings.model
    named = [(Task.EMBED, name) for name in models.embed_model] + [(Task.RERANK, name) for name in models.rerank_model]
    found = []
    for task, name in named:
        if name == AUTO and context.wants_gpu:
            found.append(_found(context, GPU_DEFAULTS[task], task, automatic=True))
        elif name == AUTO and task is Task.EMBED:
            found.append(_here(AUTO, BUNDLED_ID, task))
        elif name not in (AUTO, NONE):
            found.append(_found(context, name, task, automatic=False))
    return found


def _found(context: Context, name: str, task: Task, *, automatic: bool) -> Configured:
    revision, model = context.settings.model.revision_of(name), hub_id(name)
    if Path(name).expanduser().is_dir() or not is_hub_id(model):
        return _here(name, name, task)
    if (bundled := bundled_instead(model, task, revision)) is not None:
        return _read(name, bundled, automatic=automatic)
    folder = hub.cached(model, revision)
    if folder is None:
        return Configured(name, task, automatic, None, None)
    return _read(name, Source(model, folder, task), automatic=automatic)


def _here(wanted: str, name: str, task: Task) -> Configured:
    try:
        source = find(wanted, task)
    except StartupError as error:
        return Configured(name, task, False, None, error.message)
    return _read(name, source, automatic=False)


def _read(name: str, source: Source, *, automatic: bool) -> Configured:
    try:
        checkpoint = read(source)
        check_form(checkpoint)
        _ = checkpoint.weight_files  # which must be there
    except StartupError as error:
        return Configured(name, source.task, automatic, None, error.message)
    return Configured(name, source.task, automatic, checkpoint, None)


def bytes_per_parameter(dtype: str) -> int:
    """In memory; of `auto` the smaller of what it may become."""
    return BYTES.get(dtype, OTHER_BYTES)
