"""What a checkpoint's files say about it, in the hub's sentence-transformers layout. Reads no tensors.

Source of the layout: https://sbert.net/docs/package_reference/sentence_transformer/models.html
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vecmill.core.errors import StartupError
from vecmill.core.types import Task
from vecmill.models.source import Source

Pooling = Literal["mean", "cls", "lasttoken"]

HASHED_BLOCKS, HASHED_BLOCK = 64, 65_536

LIBRARY_CONFIG = "config_sentence_transformers.json"
LIBRARY_TYPES = {Task.EMBED: "SentenceTransformer", Task.RERANK: "CrossEncoder"}
ALWAYS_NAMED = ("query", "document")  # prompts that every SentenceTransformer has, empty where the files have none

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
    library_config: Mapping[str, Any]
    """`config_sentence_transformers.json`, as far as sentence-transformers reads it."""
    include_prompt: bool
    """Whether the tokens of a prompt are pooled."""
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
    def prompts(self) -> Mapping[str, str]:
        """Those of the files, by name."""
        return {name: text or "" for name, text in (self.library_config.get("prompts") or {}).items()}

    @property
    def default_prompt_name(self) -> str | None:
        """Of the prompt that goes before a text of which nothing is said."""
        name: str | None = self.library_config.get("default_prompt_name")
        return name

    def is_called(self, owner: str, name: str) -> bool:
        """Whether its id is the owner's model of a name (a regular expression), or it is a folder that is named so.

        `_name_or_path` in config.json does not count: a fine-tune has that of the model that it was made from.
        """
        *owners, last = self.id.split("/")
        by_owner = not owners or owners[-1].casefold() == owner.casefold()
        return by_owner and re.fullmatch(name, last, re.IGNORECASE) is not None

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
    for needed in ("config.json", "tokenizer.json"):
        if not (folder / needed).is_file():
            raise StartupError(f"{named}: {folder} has no {needed}, so it is not a model folder.")
    config = read_json(folder / "config.json")
    modules = _modules(folder, named, task, config)
    positions = _positions(folder, config)
    logit_score = _module_config(folder, modules, "LogitScore")
    if "LogitScore" in modules and not logit_score:
        raise StartupError(f"{named}: {folder / modules['LogitScore']} has no config.json that names its tokens.")
    return Checkpoint(
        source=source,
        config=config,
        pooling=_pooling(folder, named, config, modules) if task is Task.EMBED else None,
        positions=positions,
        max_model_len=_max_model_len(folder, positions),
        library_config=_library_config(folder, named, task, modules),
        include_prompt=bool(_module_config(folder, modules, "Pooling").get("include_prompt", True)),
        logit_score=logit_score,
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
    kind = read_json(folder / LIBRARY_CONFIG).get("model_type")
    if task is Task.RERANK and "Pooling" in modules and kind != LIBRARY_TYPES[Task.RERANK]:
        raise StartupError(f"{named}: this is an embedding model; name it in EMBED_MODEL instead.")
    if unknown := set(modules) - MODULES[task]:
        raise StartupError(
            f"{named}: modules.json has {', '.join(sorted(unknown))}; supported are {', '.join(sorted(MODULES[task]))}."
        )
    return modules


def _module_config(folder: Path, modules: Mapping[str, str], kind: str) -> dict[str, Any]:
    return read_json(folder / modules[kind] / "config.json") if kind in modules else {}


def _library_config(folder: Path, named: str, task: Task, modules: Mapping[str, str]) -> dict[str, Any]:
    """`config_sentence_transformers.json`; empty where sentence-transformers does not read it, without modules.json."""
    said = read_json(folder / LIBRARY_CONFIG) if modules else {}
    kind = said.get("model_type", LIBRARY_TYPES[Task.EMBED])
    if task is Task.EMBED and kind == LIBRARY_TYPES[Task.RERANK]:
        raise StartupError(f"{named}: this is a reranker; name it in RERANK_MODEL instead.")
    if kind != LIBRARY_TYPES[task]:
        if task is Task.EMBED or "LogitScore" in modules:
            raise StartupError(
                f"{named}: {LIBRARY_CONFIG} has `model_type`: {kind!r}; supported: {LIBRARY_TYPES[task]!r}."
            )
        return {}  # what another kind of model says of itself is not a reranker's
    _check_prompts(named, task, said)
    return said


def _check_prompts(named: str, task: Task, said: Mapping[str, Any]) -> None:
    prompts = said.get("prompts") or {}
    if not isinstance(prompts, dict) or not all(text is None or isinstance(text, str) for text in prompts.values()):
        raise StartupError(f"{named}: `prompts` in {LIBRARY_CONFIG} must be an object of texts.")
    default = said.get("default_prompt_name")
    known = {*prompts, *(ALWAYS_NAMED if task is Task.EMBED else ())}
    if default is not None and default not in known:
        raise StartupError(
            f"{named}: `default_prompt_name` in {LIBRARY_CONFIG} is {str(default)[:100]!r}, which is none of its "
            f"prompts ({', '.join(sorted(prompts)) or 'there are none'}); add the prompt, or remove the name."
        )


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
    said = _module_config(folder, modules, "Pooling")
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
