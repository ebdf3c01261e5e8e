"""What a checkpoint's files say about it, in the hub's sentence-transformers layout. Reads no tensors.

Source of the layout: https://sbert.net/docs/package_reference/sentence_transformer/models.html
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vecmill.core.errors import StartupError
from vecmill.core.types import Task
from vecmill.models import weight_files
from vecmill.models.chat_template import Messages, UnfitTemplateError, read_messages
from vecmill.models.config_keys import rope_type
from vecmill.models.families import family_of, own_modules, published_model
from vecmill.models.families.static_embedding import STATIC_EMBEDDING
from vecmill.models.family import Adapters, Family, Network, Pooling, Positions, PublishedModel, TextFormat
from vecmill.models.fingerprint import Fingerprint, commit_of
from vecmill.models.keys import read_any_json, read_json
from vecmill.models.modules import (
    KINDS,
    LIBRARY_TYPES,
    NO_MODULES,
    STATIC,
    Head,
    Modules,
    check_sentence_transformers,
    pooling_modes,
    read_modules,
    width_after,
)
from vecmill.models.tokenizer_files import (
    DEFAULT_TEMPLATE,
    PROCESSOR_FILES,
    TokenizerSettings,
    as_it_stands,
    chat_templates,
    tokenizer_settings,
)

LIBRARY_CONFIG = "config_sentence_transformers.json"
ALWAYS_NAMED = ("query", "document")  # prompts that every SentenceTransformer has, empty where the files have none

POOLING_MODES: Mapping[str, Pooling] = {"mean": "mean", "cls": "cls", "lasttoken": "lasttoken"}


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model's files are and the id it is served under."""

    id: str
    folder: Path
    task: Task = Task.EMBED

    @property
    def named(self) -> str:
        """The setting that names it, for error texts."""
        return f"{self.task.value.upper()}_MODEL={self.id}"


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """A model folder, read. Compared and hashed by identity, so that what is made of one can be cached."""

    source: Source
    family: Family
    config: Mapping[str, Any]
    """`config.json`."""
    pooling: Pooling | None
    """None for a reranker with a head of its transformer's own, or of a language model."""
    positions: int
    """Tokens that the weights have positions for or were trained on."""
    max_model_len: int
    tokenizer: TokenizerSettings
    library_config: Mapping[str, Any]
    """`config_sentence_transformers.json`, as far as sentence-transformers reads it."""
    include_prompt: bool
    """Whether the tokens of a prompt are pooled."""
    logit_score: Mapping[str, Any]
    """A reranker's `LogitScore` module; empty where there is none."""
    within: str = ""
    """The folder in its folder that has weights and tokenizer."""
    of_tokens: tuple[Head, ...] = ()
    """What each token's vector goes through before the pooling."""
    of_vectors: tuple[Head, ...] = ()
    """What a pooled vector goes through, less a last Normalize."""
    normalizes: bool = False
    """Whether its own files make unit vectors."""
    scores_vectors: bool = False
    """Of a reranker: whether it pools hidden states as an embedder does, and the last of `of_vectors` gives the
    score."""
    similarity: str = "cosine"
    """How its vectors are compared: the name of sentence-transformers' function."""
    commit: str | None = None
    """The hub's, for a folder of its cache. Only shown: whether the files are still that commit's is not known."""
    messages: Messages = field(default_factory=Messages)
    """How an embedder's texts become messages of a chat template; by itself: they do not."""
    fingerprint: Fingerprint = field(default_factory=Fingerprint)
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
    def pools(self) -> bool:
        """Whether it is an embedder's network that it runs through."""
        return self.task is Task.EMBED or self.scores_vectors

    @property
    def network(self) -> Network:
        """The classes of transformers that it runs through."""
        return self.family.tasks[_spec_of(self.task, self.scores_vectors)].network

    @property
    def arguments(self) -> dict[str, Any]:
        """What the network's config class is made with: the keys of `config.json` that make the model."""
        return self.family.arguments(self.config, _spec_of(self.task, self.scores_vectors), self.positions)

    @property
    def adapters(self) -> Adapters | None:
        """Its weights for tasks; None: it has none."""
        return self.network.adapters(self.config) if self.network.adapters is not None else None

    @property
    def published(self) -> PublishedModel | None:
        """What the card says of the model of its id, or of its folder's name."""
        return published_model(self.id)

    @property
    def text_format(self) -> TextFormat:
        """What its tokens need beyond the tokenizer's own template; of an embedder."""
        if self.family.text_format is not None:
            return self.family.text_format(self.config)
        end = self.tokenizer.end_token if self.family.add_eos_token else None
        return TextFormat(end, unpooled="nothing" if self.include_prompt else "prompt")

    @property
    def prompts(self) -> Mapping[str, str]:
        """Those of the files, by name; each with what a chat template puts between it and a text."""
        of_library = {name: text or "" for name, text in (self.library_config.get("prompts") or {}).items()}
        prompts = {**self.family.prompts(self.config), **of_library}
        return {name: text + self.messages.separator if text else "" for name, text in prompts.items()}

    @property
    def default_prompt_name(self) -> str | None:
        """Name of the prompt for texts whose request names neither prompt nor role."""
        name: str | None = self.library_config.get("default_prompt_name")
        return name

    @property
    def tokenizer_file(self) -> Path:
        return self.folder / self.within / "tokenizer.json"

    @property
    def weight_files(self) -> list[Path]:
        """The safetensors that are read.

        Raises:
            StartupError: there are none; the sentence says what there is instead, and what to do.
        """
        model = self.id if self.commit else str(self.folder)
        folder = self.folder / self.within
        listing = weight_files.list_folder(self.named, folder, model)
        names = listing.chosen(self.weight_index)
        return [folder / name for name in names]

    def weight_index(self) -> Any:
        """What the index of the weights says; it is not looked at where there is `model.safetensors`."""
        return read_any_json(self.folder / self.within / weight_files.INDEX)

    @property
    def heads(self) -> tuple[Head, ...]:
        """The modules that its hidden states and vectors go through, in order."""
        return (*self.of_tokens, *self.of_vectors)

    @property
    def head_files(self) -> list[Path]:
        """The safetensors of the heads. Raises StartupError where one is missing."""
        return [self.head_file(head) for head in self.heads if head.trained]

    def head_file(self, head: Head) -> Path:
        """The safetensors of a head. Raises StartupError where it is missing."""
        file = self.folder / head.path / weight_files.SINGLE
        if not file.is_file():
            pickled = file.with_name(weight_files.PICKLE).is_file()
            name = file.relative_to(self.folder).as_posix()
            raise weight_files.no_head_file(self.named, name, self.id, pickled=pickled)
        return file

    def width_after_heads(self, width: int) -> int:
        """Values of a vector, from those of a hidden state. Raises StartupError where a head takes another width."""
        return width_after(self.named, self.heads, width)

    @property
    def weight_bytes(self) -> int:
        """Of the files that are read. Raises StartupError as `weight_files`."""
        return sum(path.stat().st_size for path in (*self.weight_files, *self.head_files))

    @property
    def revision(self) -> str:
        """What is shown: the hub's commit, else a short hash of all that was read; so after the model is loaded."""
        return self.commit or self.fingerprint.shown

    def require_pooling(self) -> Pooling:
        """How one vector is made of many; of what `pools`."""
        assert self.pooling is not None  # `read` refuses it without
        return self.pooling


def _spec_of(task: Task, scores_vectors: bool) -> Task:
    """The task whose keys of config.json and whose classes a checkpoint has."""
    return Task.EMBED if scores_vectors else task


def read(source: Source) -> Checkpoint:
    """Read a model folder.

    Raises:
        StartupError: a file is missing or says something that is not supported.
    """
    folder, named, task = source.folder, source.named, source.task
    weight_files.refuse_adapter(named, folder)
    config = read_json(named, folder / "config.json")
    modules = _modules(folder, named, task, config)
    if STATIC in modules.folders:
        config = {**config, "model_type": STATIC_EMBEDDING.model_type}  # whatever it says: the reference reads none
    else:
        _check_is_model(folder, named, config)
    family = family_of(named, folder / "config.json", config, _spec_of(task, modules.score))
    if task is Task.EMBED and family.has_two_label_head(config):
        raise StartupError(f"{named}: this is {KINDS[Task.RERANK]}.")
    library = _library_config(folder, named, task, modules)
    positions = _positions(folder, family, config)
    within = modules.folders.get(STATIC, "")
    tokenizer = (
        as_it_stands(named, folder / within / "tokenizer.json")
        if STATIC in modules.folders
        else tokenizer_settings(named, folder, task, text_half=family.text_half, pools=modules.score)
    )
    max_model_len = positions if tokenizer.max_length is None else int(min(tokenizer.max_length, positions))
    _check_longrope(folder, named, config, max_model_len)
    logit_score = _module_config(folder, named, modules, "LogitScore")
    if "LogitScore" in modules.folders and not logit_score:
        raise StartupError(
            f"{named}: {folder / modules.folders['LogitScore']} has no config.json that names its tokens."
        )
    if (width := family.width(config)) is not None:
        width_after(named, (*modules.of_tokens, *modules.of_vectors), width)
    include_prompt = bool(_module_config(folder, named, modules, "Pooling").get("include_prompt", True))
    if modules.score:
        _check_scored(folder, named, family, library, include_prompt)
    fingerprint = Fingerprint()
    fingerprint.add_files(folder, modules.paths)
    of_vectors, normalizes = _less_last_normalize(modules.of_vectors)
    return Checkpoint(
        source=source,
        family=family,
        config=config,
        pooling=_pooling(folder, named, config, modules) if task is Task.EMBED or modules.score else None,
        within=within,
        of_tokens=modules.of_tokens,
        of_vectors=of_vectors,
        normalizes=normalizes,
        scores_vectors=modules.score,
        similarity=library.get("similarity_fn_name") or "cosine",
        positions=positions,
        max_model_len=max_model_len,
        tokenizer=tokenizer,
        library_config=library,
        include_prompt=include_prompt,
        logit_score=logit_score,
        messages=_messages(named, folder, tokenizer),
        commit=commit_of(folder),
        fingerprint=fingerprint,
    )


def _check_scored(folder: Path, named: str, family: Family, library: Mapping[str, Any], include_prompt: bool) -> None:
    """What a reranker that scores pooled vectors needs beside its modules."""
    if not library:
        raise StartupError(
            f"{named}: modules.json has a Dense that gives scores, and {folder / LIBRARY_CONFIG} does not say "
            f"`model_type`: {LIBRARY_TYPES[Task.RERANK]!r}: without it sentence-transformers does not read the modules."
        )
    if not include_prompt:
        raise StartupError(
            f"{named}: the Pooling's config.json has `include_prompt`: false; supported for a reranker is true."
        )
    if family.text_format is not None:
        raise StartupError(f"{named}: {family.model_type} is not served as a reranker.")


def _check_is_model(folder: Path, named: str, config: Mapping[str, Any]) -> None:
    """Raise StartupError for a folder without what makes a transformer."""
    weight_files.refuse_other_formats(named, folder)
    if not (folder / "config.json").is_file():
        raise StartupError(f"{named}: {folder} has no config.json, so it is not a model folder.")
    if config.get("model_type") == "model2vec":
        raise StartupError(
            f"{named}: {folder} has no modules.json with a StaticEmbedding: model2vec writes it from its release 0.4 "
            f"on, with `StaticModel.from_pretrained(folder).save_pretrained(folder)`."
        )


def _less_last_normalize(heads: tuple[Head, ...]) -> tuple[tuple[Head, ...], bool]:
    """The heads without the Normalizes at the end, and whether there are such: unit vectors are made after cutting."""
    trained = [place for place, head in enumerate(heads, 1) if head.trained]
    kept = heads[: max(trained, default=0)]
    return kept, len(kept) < len(heads)


def _modules(folder: Path, named: str, task: Task, config: Mapping[str, Any]) -> Modules:
    """The modules; none where there is no modules.json."""
    if task is Task.EMBED and _is_a(config, "ForSequenceClassification"):
        raise StartupError(f"{named}: this is {KINDS[Task.RERANK]}.")
    path = folder / "modules.json"
    return read_modules(folder, named, task, read_any_json(path), own_modules(config)) if path.is_file() else NO_MODULES


def _is_a(config: Mapping[str, Any], ending: str) -> bool:
    """Whether one of its `architectures` has this ending."""
    names = config.get("architectures")
    return isinstance(names, list) and any(str(name).endswith(ending) for name in names)


def _check_longrope(folder: Path, named: str, config: Mapping[str, Any], max_model_len: int) -> None:
    """One text beyond the length for which the short factors are would turn its whole batch over to the long ones."""
    kind, parameters = rope_type(config)
    short = parameters.get("original_max_position_embeddings") or config.get("max_position_embeddings", 0)
    if kind == "longrope" and max_model_len > short:
        raise StartupError(
            f"{named}: config.json has longrope, whose short and long factors take turns at {short} tokens, so that a "
            f"vector would depend on its batch: set `max_seq_length` in {folder}/sentence_bert_config.json to {short}."
        )


def _messages(named: str, folder: Path, tokenizer: TokenizerSettings) -> Messages:
    """What the chat template does to a text and its prompt, where sentence-transformers gives them to it."""
    if not tokenizer.messages:
        return Messages()
    if not any((folder / name).is_file() for name in PROCESSOR_FILES):
        raise StartupError(
            f"{named}: sentence-transformers gives its texts to a chat template (`message` in `modality_config`), and "
            f"{folder} has no {PROCESSOR_FILES[0]}: without one no special tokens are put around them, which is not "
            f"supported. Fetch the model again."
        )
    source = chat_templates(named, folder, tokenizer.arguments).get(DEFAULT_TEMPLATE, "")
    try:
        return read_messages(source, structured=tokenizer.messages == "structured")
    except UnfitTemplateError as error:
        raise StartupError(f"{named}: its chat template, which texts are given to, {error}.") from None


def _module_config(folder: Path, named: str, modules: Modules, kind: str) -> dict[str, Any]:
    known = kind in modules.folders
    return read_json(named, folder / modules.folders[kind] / "config.json") if known else {}


def _library_config(folder: Path, named: str, task: Task, modules: Modules) -> dict[str, Any]:
    """`config_sentence_transformers.json`; empty where sentence-transformers does not read it, without modules.json."""
    library = read_json(named, folder / LIBRARY_CONFIG) if modules.folders else {}
    kind = library.get("model_type", LIBRARY_TYPES[Task.EMBED])
    scores = modules.score or "LogitScore" in modules.folders
    if task is Task.RERANK and not scores and kind != LIBRARY_TYPES[task]:
        return {}  # what another kind of model says of itself is not a reranker's
    check_sentence_transformers(named, folder / LIBRARY_CONFIG, library, task)
    if library and kind != LIBRARY_TYPES[task]:
        raise StartupError(f"{named}: {LIBRARY_CONFIG} has `model_type`: {kind!r}; supported: {LIBRARY_TYPES[task]!r}.")
    _check_prompts(named, task, library)
    return library


def _check_prompts(named: str, task: Task, library: Mapping[str, Any]) -> None:
    prompts = library.get("prompts") or {}
    if not isinstance(prompts, dict) or not all(text is None or isinstance(text, str) for text in prompts.values()):
        raise StartupError(f"{named}: `prompts` in {LIBRARY_CONFIG} must be an object of texts.")
    default = library.get("default_prompt_name")
    known = {*prompts, *(ALWAYS_NAMED if task is Task.EMBED else ())}
    if default is not None and not (isinstance(default, str) and default in known):
        raise StartupError(
            f"{named}: `default_prompt_name` in {LIBRARY_CONFIG} is {str(default)[:100]!r}, which is none of its "
            f"prompts ({', '.join(sorted(prompts)) or 'there are none'}); add the prompt, or remove the name."
        )


def _positions(folder: Path, family: Family, config: Mapping[str, Any]) -> int:
    """Tokens of the longest row."""
    positions = family.max_positions(config)
    if positions is None:
        raise StartupError(f"{folder}/config.json does not say how many positions the model has.")
    before_first = config.get("pad_token_id", 1) + 1 if family.positions is Positions.AFTER_PADDING else 0
    return int(positions) - before_first


def _pooling(folder: Path, named: str, config: Mapping[str, Any], modules: Modules) -> Pooling:
    if STATIC in modules.folders:
        return "mean"
    if not modules.folders:  # what sentence-transformers adds to a bare decoder or encoder
        names = config.get("architectures") or [""]
        return "lasttoken" if str(names[0]).endswith("ForCausalLM") else "mean"
    module = _module_config(folder, named, modules, "Pooling")
    if not module:
        raise StartupError(f"{named}: {folder / modules.folders['Pooling']} has no config.json that says how to pool.")
    modes = pooling_modes(module)
    if len(modes) != 1 or modes[0] not in POOLING_MODES:
        raise StartupError(
            f"{named}: pooling {'+'.join(sorted(modes)) or 'none'} is not supported; mean, cls and lasttoken are."
        )
    return POOLING_MODES[modes[0]]
