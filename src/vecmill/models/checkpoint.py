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
from vecmill.core.types import Task
from vecmill.models.source import Source
from vecmill.models.tokenizer_files import TokenizerSettings, tokenizer_settings

Pooling = Literal["mean", "cls", "lasttoken"]

HASHED_BLOCKS, HASHED_BLOCK = 64, 65_536

# The last part of a module's type in modules.json: what runs here, by task.
MODULES = {Task.EMBED: {"Transformer", "Pooling", "Normalize"}, Task.RERANK: {"Transformer", "LogitScore"}}
POOLING_MODES: Mapping[str, Pooling] = {
    "mean_tokens": "mean",
    "mean": "mean",
    "cls_token": "cls",
    "cls": "cls",
    "lasttoken": "lasttoken",
}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model folder, read."""

    source: Source
    config: Mapping[str, Any]
    """`config.json`."""
    pooling: Pooling | None
    """None for a reranker."""
    positions: int
    """Tokens that the weights have positions for or were trained on."""
    max_model_len: int
    tokenizer: TokenizerSettings
    prompts: Mapping[str, str]
    """Those of `config_sentence_transformers.json`."""
    logit_score: Mapping[str, Any]
    """A reranker's `LogitScore` module; empty where there is none."""
    revision: str

    @property
    def id(self) -> str:
        return self.source.id

    @property
    def task(self) -> Task:
        return self.source.task

    @property
    def folder(self) -> Path:
        return self.source.folder

    @property
    def named(self) -> str:
        """The setting that names it, for error texts."""
        return self.source.named

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type", "missing"))

    @property
    def names(self) -> tuple[str, ...]:
        """What it may be called: its id, and where its files were made."""
        return (self.id, str(self.config.get("_name_or_path", "")))

    @property
    def tokenizer_file(self) -> Path:
        return self.folder / "tokenizer.json"

    @property
    def weight_files(self) -> list[Path]:
        """The safetensors of the model: those that the index lists, else the one."""
        index = read_json(self.folder / "model.safetensors.index.json").get("weight_map", {})
        return [self.folder / name for name in sorted(set(index.values()))] or sorted(self.folder.glob("*.safetensors"))

    @property
    def weight_bytes(self) -> int:
        """Of the files."""
        return sum(path.stat().st_size for path in self.weight_files if path.is_file())

    def require_pooling(self) -> Pooling:
        """How an embedder makes one vector of many."""
        assert self.pooling is not None  # `read` refuses an embedder without
        return self.pooling


def read(source: Source) -> Checkpoint:
    """Read a model folder.

    Raises:
        StartupError: a file is missing or says something that is not supported.
    """
    folder, named, task = source.folder, source.named, source.task
    if not (folder / "config.json").is_file():
        raise StartupError(f"{named}: {folder} has no config.json, so it is not a model folder.")
    config = read_json(folder / "config.json")
    modules = _modules(folder, named, task, config)
    positions = _positions(folder, config)
    tokenizer = tokenizer_settings(named, folder, task, str(config.get("model_type")))
    return Checkpoint(
        source=source,
        config=config,
        pooling=_pooling(folder, named, config, modules) if task is Task.EMBED else None,
        positions=positions,
        max_model_len=positions if tokenizer.max_length is None else int(min(tokenizer.max_length, positions)),
        tokenizer=tokenizer,
        prompts=read_json(folder / "config_sentence_transformers.json").get("prompts") or {},
        logit_score=read_json(folder / modules.get("LogitScore", "missing") / "config.json"),
        revision=_revision(folder),
    )


def read_json(path: Path) -> dict[str, Any]:
    """The object in `path`; empty where there is no such file.

    Raises:
        StartupError: it is not JSON.
    """
    if not path.is_file():
        return {}
    found = _load(path)
    return found if isinstance(found, dict) else {}


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise StartupError(f"{path} is not valid JSON ({error}); fetch the model again.") from None


def _modules(folder: Path, named: str, task: Task, config: Mapping[str, Any]) -> dict[str, str]:
    """The modules by kind, with their folders; empty where there is no modules.json."""
    path = folder / "modules.json"
    listed = _load(path) if path.is_file() else []
    modules = {str(module["type"]).rsplit(".", 1)[-1]: str(module.get("path", "")) for module in listed}
    classifies = any(str(name).endswith("ForSequenceClassification") for name in config.get("architectures") or ())
    if task is Task.EMBED and ("LogitScore" in modules or classifies):
        raise StartupError(f"{named}: this is a reranker; name it in RERANK_MODEL instead.")
    if task is Task.RERANK and "Pooling" in modules:
        raise StartupError(f"{named}: this is an embedding model; name it in EMBED_MODEL instead.")
    if unknown := set(modules) - MODULES[task]:
        raise StartupError(
            f"{named}: modules.json has {', '.join(sorted(unknown))}; supported are {', '.join(sorted(MODULES[task]))}."
        )
    return modules


def _positions(folder: Path, config: Mapping[str, Any]) -> int:
    backbone = config.get("text_config") or config
    # nomic: positions beyond those trained need rotary scaling, which makes vectors depend on the longest of a batch.
    keys = ("max_trained_positions", "max_position_embeddings", "n_positions")
    said = next((backbone[key] for key in keys if backbone.get(key)), None)
    if said is None:
        raise StartupError(f"{folder}/config.json does not say how many positions the model has.")
    before_first = backbone.get("pad_token_id", 1) + 1 if config.get("model_type") == "xlm-roberta" else 0
    return int(said) - before_first


def _pooling(folder: Path, named: str, config: Mapping[str, Any], modules: Mapping[str, str]) -> Pooling:
    if not modules:  # what sentence-transformers adds to a bare decoder or encoder
        decoder = any(str(name).endswith("ForCausalLM") for name in config.get("architectures") or ())
        return "lasttoken" if decoder else "mean"
    if "Pooling" not in modules:
        raise StartupError(f"{named}: modules.json has no Pooling, so it gives no one vector per text.")
    said = read_json(folder / modules["Pooling"] / "config.json")
    on = {key.removeprefix("pooling_mode_") for key, value in said.items() if key.startswith("pooling_mode_") and value}
    if isinstance(mode := said.get("pooling_mode"), str):  # written so since sentence-transformers 5.4
        on.add(mode)
    modes = {POOLING_MODES.get(mode) for mode in on}
    if len(modes) != 1 or None in modes:
        raise StartupError(
            f"{named}: pooling {'+'.join(sorted(on)) or 'none'} is not supported; mean, cls and lasttoken are."
        )
    return modes.pop() or "mean"


def _revision(folder: Path) -> str:
    """The hub's commit, else a hash of the weights' headers and of blocks spread over all of them.

    Reading every byte would take as long as loading; a training run changes every block.
    """
    if folder.resolve().parent.name == "snapshots":  # the hub's cache names the folder after the commit
        return folder.resolve().name
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(str(size).encode())
        with path.open("rb") as file:
            for block in range(HASHED_BLOCKS):
                file.seek(block * max(HASHED_BLOCK, size // HASHED_BLOCKS))
                digest.update(file.read(HASHED_BLOCK))
    return "sha256:" + digest.hexdigest()[:12]
