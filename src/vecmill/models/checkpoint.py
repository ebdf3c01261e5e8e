"""What a checkpoint's files say about it, in the hub's sentence-transformers layout. Reads no tensors.

Source of the layout: https://sbert.net/docs/package_reference/sentence_transformer/models.html
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vecmill.core.errors import StartupError
from vecmill.core.types import Task
from vecmill.models import weight_files
from vecmill.models.fingerprint import Fingerprint, commit_of
from vecmill.models.source import Source

Pooling = Literal["mean", "cls", "lasttoken"]

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
    prompts: Mapping[str, str]
    """Those of `config_sentence_transformers.json`."""
    logit_score: Mapping[str, Any]
    """A reranker's `LogitScore` module; empty where there is none."""
    commit: str | None = None
    """The hub's, for a folder of its cache. Only shown: whether the files are still that commit's is not known."""
    fingerprint: Fingerprint = field(default_factory=Fingerprint, compare=False)
    """Of what has been read; whole when the model is loaded."""

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
        """The safetensors that are read.

        Raises:
            StartupError: there are none; the sentence says what there is instead, and what to do.
        """
        model = self.id if self.commit else str(self.folder)
        listing = weight_files.list_folder(self.named, self.folder, model)
        names = listing.chosen(self.weight_index)
        return [self.folder / name for name in names]

    def weight_index(self) -> Any:
        """What the index of the weights says; it is not looked at where there is `model.safetensors`."""
        return _load(self.folder / weight_files.INDEX)

    @property
    def weight_bytes(self) -> int:
        """Of the files that are read. Raises StartupError as `weight_files`."""
        return sum(path.stat().st_size for path in self.weight_files)

    @property
    def revision(self) -> str:
        """What is shown: the hub's commit, else a short hash of all that was read; so after the model is loaded."""
        return self.commit or self.fingerprint.shown

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
    weight_files.refuse_adapter(named, folder)
    weight_files.refuse_other_formats(named, folder)
    for needed in ("config.json", "tokenizer.json"):
        if not (folder / needed).is_file():
            raise StartupError(f"{named}: {folder} has no {needed}, so it is not a model folder.")
    config = read_json(folder / "config.json")
    modules = _modules(folder, named, task, config)
    positions = _positions(folder, config)
    fingerprint = Fingerprint()
    fingerprint.add_files(folder, modules.values())
    return Checkpoint(
        source=source,
        config=config,
        pooling=_pooling(folder, named, config, modules) if task is Task.EMBED else None,
        positions=positions,
        max_model_len=_max_model_len(folder, positions),
        prompts=read_json(folder / "config_sentence_transformers.json").get("prompts") or {},
        logit_score=read_json(folder / modules.get("LogitScore", "missing") / "config.json"),
        commit=commit_of(folder),
        fingerprint=fingerprint,
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


def _max_model_len(folder: Path, positions: int) -> int:
    """sentence-transformers' rule: its own file first, else the tokenizer's limit; never more than the positions."""
    said = read_json(folder / "sentence_bert_config.json").get("max_seq_length")
    if said is None:
        said = read_json(folder / "tokenizer_config.json").get("model_max_length")
    return positions if said is None else int(min(said, positions))


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
