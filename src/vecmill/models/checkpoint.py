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
from vecmill.models import config_keys
from vecmill.models.modules import check_sentence_transformers, pooling_modes, read_modules
from vecmill.models.source import Source

Pooling = Literal["mean", "cls", "lasttoken"]

HASHED_BLOCKS, HASHED_BLOCK = 64, 65_536

NOMIC_TRAINED = 2048  # what the code of nomic's files takes for the positions that it was trained on
POOLING_MODES: Mapping[str, Pooling] = {"mean": "mean", "cls": "cls", "lasttoken": "lasttoken"}


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
    revision: str
    normalizes: bool = False
    """Whether its own files make unit vectors."""
    similarity: str = "cosine"
    """How its vectors are compared: the name of sentence-transformers' function."""

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
    def architecture(self) -> dict[str, Any]:
        """The keys of `config.json` that make the model, without those that change nothing."""
        return config_keys.architecture(self.config, self.task)

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
    config = read_json(folder / "config.json")
    modules = _modules(folder, named, task, config)
    for needed in ("config.json", "tokenizer.json"):
        if not (folder / needed).is_file():
            raise StartupError(f"{named}: {folder} has no {needed}, so it is not a model folder.")
    config_keys.check_config(named, folder / "config.json", config, task)
    # Without modules.json sentence-transformers does not read it.
    said = read_json(folder / "config_sentence_transformers.json") if modules else {}
    check_sentence_transformers(named, folder / "config_sentence_transformers.json", said, task)
    positions = _positions(folder, config)
    max_model_len = _max_model_len(folder, positions)
    _check_longrope(folder, named, config, max_model_len)
    return Checkpoint(
        source=source,
        config=config,
        pooling=_pooling(folder, named, config, modules) if task is Task.EMBED else None,
        normalizes="Normalize" in modules,
        similarity=said.get("similarity_fn_name") or "cosine",
        positions=positions,
        max_model_len=max_model_len,
        prompts=said.get("prompts") or {},
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
    """The modules by class, with their folders; empty where there is no modules.json."""
    if task is Task.EMBED and _is_a(config, "ForSequenceClassification"):
        raise StartupError(f"{named}: this is a reranker; name it in RERANK_MODEL instead.")
    path = folder / "modules.json"
    return read_modules(folder, named, task, _load(path), read_json) if path.is_file() else {}


def _is_a(config: Mapping[str, Any], ending: str) -> bool:
    """Whether one of its `architectures` has this ending."""
    names = config.get("architectures")
    return isinstance(names, list) and any(str(name).endswith(ending) for name in names)


def _check_longrope(folder: Path, named: str, config: Mapping[str, Any], max_model_len: int) -> None:
    """One text beyond the length for which the short factors are would turn its whole batch over to the long ones."""
    kind, parameters = config_keys.rope_type(config)
    short = parameters.get("original_max_position_embeddings") or config.get("max_position_embeddings", 0)
    if kind == "longrope" and max_model_len > short:
        raise StartupError(
            f"{named}: config.json has longrope, whose short and long factors take turns at {short} tokens, so that a "
            f"vector would depend on its batch: set `max_seq_length` in {folder}/sentence_bert_config.json to {short}."
        )


def _positions(folder: Path, config: Mapping[str, Any]) -> int:
    backbone = config.get("text_config") or config
    # nomic: positions beyond those trained need rotary scaling, which makes vectors depend on the longest of a batch.
    keys = ("max_trained_positions", "max_position_embeddings", "n_positions")
    said = next((backbone[key] for key in keys if backbone.get(key)), None)
    if said is not None and said == backbone.get("n_positions") and config.get("model_type") == "nomic_bert":
        said = min(said, NOMIC_TRAINED)
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
        names = config.get("architectures") or [""]
        return "lasttoken" if str(names[0]).endswith("ForCausalLM") else "mean"
    said = read_json(folder / modules["Pooling"] / "config.json")
    if not said:
        raise StartupError(f"{named}: {folder / modules['Pooling']} has no config.json that says how to pool.")
    modes = pooling_modes(said)
    if len(modes) != 1 or modes[0] not in POOLING_MODES:
        raise StartupError(
            f"{named}: pooling {'+'.join(sorted(modes)) or 'none'} is not supported; mean, cls and lasttoken are."
        )
    return POOLING_MODES[modes[0]]


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
