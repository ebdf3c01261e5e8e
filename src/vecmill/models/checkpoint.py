"""What a checkpoint's files say about it, in the hub's sentence-transformers layout. Reads no tensors.

Source of the layout: https://sbert.net/docs/package_reference/sentence_transformer/models.html
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vecmill.core.errors import StartupError
from vecmill.models.source import Source

Pooling = Literal["mean", "cls", "lasttoken"]

KNOWN_MODULES = {"Transformer", "Pooling", "Normalize"}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model folder, read."""

    id: str
    folder: Path
    config: Mapping[str, Any]
    """`config.json`."""
    pooling: Pooling
    max_model_len: int
    prompts: Mapping[str, str]
    revision: str

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type", "missing"))

    @property
    def tokenizer_file(self) -> Path:
        return self.folder / "tokenizer.json"


def read(source: Source, max_model_len: int | None = None) -> Checkpoint:
    """Read a model folder. `max_model_len` lowers the model's own limit, in tokens.

    Raises:
        StartupError: a file is missing or says something that is not supported.
    """
    folder = source.folder
    for needed in ("config.json", "tokenizer.json"):
        if not (folder / needed).is_file():
            raise StartupError(f"EMBED_MODEL={source.id}: {folder} has no {needed}, so it is not a model folder.")
    config = _json(folder / "config.json")
    own_length = _own_max_model_len(folder, config)
    if max_model_len is not None and max_model_len > own_length:
        raise StartupError(
            f"MAX_MODEL_LEN={max_model_len} is above the {own_length} tokens that {source.id} takes: lower it."
        )
    return Checkpoint(
        id=source.id,
        folder=folder,
        config=config,
        pooling=_pooling(source),
        max_model_len=max_model_len or own_length,
        prompts=_json(folder / "config_sentence_transformers.json").get("prompts") or {},
        revision=_revision(folder),
    )


def _json(path: Path) -> dict[str, Any]:
    """The object in `path`; empty where there is no such file."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise StartupError(f"{path} is not valid JSON ({error}); fetch the model again.") from None
    return found if isinstance(found, dict) else {}


def _own_max_model_len(folder: Path, config: Mapping[str, Any]) -> int:
    """sentence-transformers' rule: its own file first, else the tokenizer's limit; never more than the positions."""
    said = _json(folder / "sentence_bert_config.json").get("max_seq_length")
    if said is None:
        said = _json(folder / "tokenizer_config.json").get("model_max_length")
    limits = [limit for limit in (said, config.get("max_position_embeddings")) if limit is not None]
    if not limits:
        raise StartupError(f"{folder} does not say how long its inputs may be: set max_seq_length in its files.")
    return int(min(limits))


def _pooling(source: Source) -> Pooling:
    modules_file = source.folder / "modules.json"
    if not modules_file.is_file():
        return "mean"  # what sentence-transformers adds to a bare encoder
    modules = json.loads(modules_file.read_text("utf-8"))
    kinds = [str(module["type"]).rsplit(".", 1)[-1] for module in modules]
    if unknown := set(kinds) - KNOWN_MODULES:
        raise StartupError(
            f"EMBED_MODEL={source.id}: modules.json has {', '.join(sorted(unknown))}; "
            f"supported are {', '.join(sorted(KNOWN_MODULES))}."
        )
    if "Pooling" not in kinds:
        raise StartupError(f"EMBED_MODEL={source.id}: modules.json has no Pooling, so it gives no one vector per text.")
    pooling = _json(source.folder / modules[kinds.index("Pooling")]["path"] / "config.json")
    return _pooling_mode(source, pooling)


def _pooling_mode(source: Source, pooling: Mapping[str, Any]) -> Pooling:
    on = {
        key.removeprefix("pooling_mode_") for key, value in pooling.items() if key.startswith("pooling_mode_") and value
    }
    if isinstance(mode := pooling.get("pooling_mode"), str):  # written so since sentence-transformers 5.4
        on.add(mode)
    supported: dict[frozenset[str], Pooling] = {
        frozenset({"mean_tokens"}): "mean",
        frozenset({"mean"}): "mean",
        frozenset({"cls_token"}): "cls",
        frozenset({"cls"}): "cls",
        frozenset({"lasttoken"}): "lasttoken",
    }
    if frozenset(on) not in supported:
        raise StartupError(
            f"EMBED_MODEL={source.id}: pooling {'+'.join(sorted(on)) or 'none'} is not supported; "
            f"mean, cls and lasttoken are."
        )
    return supported[frozenset(on)]


def _revision(folder: Path) -> str:
    if folder.resolve().parent.name == "snapshots":  # the hub's cache names the folder after the commit
        return folder.resolve().name
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return "sha256:" + digest.hexdigest()[:12]
