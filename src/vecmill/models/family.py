"""The spec that a file in `families/` fills in. Reads no tensors and imports no torch.

All that depends on a family is a field or a method here; no other file compares names of families.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Literal

from vecmill.core.types import Task
from vecmill.models.chat_template import PairPrompt
from vecmill.models.config_keys import ConfigFile, check_architectures
from vecmill.models.keys import Rule, check_keys, honoured

ConfigJson = Mapping[str, Any]
"""The object in a config.json, checked."""
Pooling = Literal["mean", "cls", "lasttoken"]
PositionBias = Literal["buckets", "disentangled", "alibi"]
"""Learned, by buckets of distances: a number, the same in all layers (MPNet), or a key and a query (DeBERTa). Or not
learned: it falls with the distance, by a slope of each head's own (ALiBi)."""
TABLE_ROWS = 512
"""Of a table of position biases at most."""
TABLE_BYTES = 268_435_456
"""So many at most: 12 heads in float32 have 512 rows for 4096 positions."""
LONGEST_FILLER = 64
"""Tokens: of a row that fills a pack up to a captured shape."""
INT64_BYTES = 8
Rename = Callable[[str], Sequence[str]]
"""A weight's name in the files to its names in the class: none leaves it out, several share its rows equally."""
DEFAULT_INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
INSTRUCT_PROMPTS = {"query": f"Instruct: {DEFAULT_INSTRUCTION}\nQuery: ", "document": ""}
"""Of the cards of several models after E5."""
PASSAGE_PROMPTS = {"query": "query: ", "document": "passage: "}
"""Of E5's cards, and of NVIDIA's."""


class Positions(Enum):
    """How the network gets the position of a token in its row."""

    FROM_ZERO = "from zero"
    """From a table of learned positions; the first token has position 0."""
    AFTER_PADDING = "after padding"
    """From such a table; the first token has the position after the padding token's id, and padding tokens are not
    counted (fairseq's convention)."""
    ALIBI = "alibi"
    """Attention falls with the distance between two tokens, which alone matters."""
    ROTARY = "rotary"
    """Queries and keys are rotated: only the distance between two tokens matters."""

    def moved_by_left_padding(self, *, same_padding: bool) -> bool:
        """Whether padding on the left changes a text's positions, so that the reference's vector depends on the batch.

        Args:
            same_padding: the tokenizer pads with the token that the network does not count.
        """
        return self is Positions.FROM_ZERO or (self is Positions.AFTER_PADDING and not same_padding)


@dataclass(frozen=True, slots=True)
class Adapters:
    """Low-rank weights that are added to those of every layer, one set for each task (LoRA)."""

    names: tuple[str, ...]
    """The tasks."""
    rank: int
    scaling: float
    """What the product of an adapter's two weights is multiplied by."""


@dataclass(frozen=True, slots=True)
class Network:
    """How a family is built: classes by name (a spec imports no torch), and what goes into them."""

    config_class: str
    model_class: str
    """Of transformers, one of `transformers_networks.OWN_CLASSES`, or one of `bert.CLASSES`, which is transformers' own
    written again."""
    rename: Rename
    arguments: Callable[[ConfigJson, int], dict[str, Any]] = lambda config, positions: dict(config)
    """Keyword arguments of the config class, made of the honoured keys of config.json and the number of positions."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further keyword arguments of the model class."""
    token_table: bool = False
    """Whether it is no network at all, but a table of token vectors whose mean is a text's: no class is made."""
    blocks: str = "layers"
    """Path of the repeated transformer blocks, from the base model."""
    merged: tuple[str, ...] = ()
    """Names of the classes whose projections of the same input are merged, see `merge_projections`."""
    layout: Callable[[Collection[str]], Mapping[str, Any]] | None = None
    """From the names of the weights in the files to further keys of the config class, where the class can have several
    layouts and config.json does not say which; None: it has one."""
    in_float32: tuple[str, ...] = ()
    """How names of weights in the class end that are kept in float32, whatever the others' type."""
    token_types: bool = False
    """Whether the model class takes `token_type_ids`."""
    head: tuple[str, ...] = ("classifier",)
    """Of a cross-encoder: paths of the head's modules from the model class, in the order they run on the hidden state
    of the first token. A name of an activation stands for it."""
    head_pooling: Callable[[ConfigJson], Pooling] = lambda config: "cls"
    """Of a cross-encoder: what its head gets of the hidden states."""
    position_bias: PositionBias | None = None
    """How attention gets a bias for each distance of two tokens. Flash kernels take none: it is SDPA always, and a pass
    is not captured as a CUDA graph."""
    adapters: Callable[[ConfigJson], Adapters] | None = None
    """Of a network whose files have adapters, `models/adapters.py` runs it; None: they have none."""
    latent_attention: str | None = None
    """Key of config.json with the sizes of NV-Embed's block after the layers; None: the model has no such block."""
    pooling: Pooling | None = None
    """Fixed by the architecture, whatever a checkpoint's files say; None: the files say how to pool. Of a reranker with
    a classification head, which hidden states it is given; None: the last token's."""
    both_ways: bool = False
    """Of a reranker on a decoder: whether tokens look at those after them too, so that rows can share no prefix."""
    score_divisor: str | None = None
    """Key of config.json with a number that scores of a classification head are divided by."""


@dataclass(frozen=True, slots=True)
class TaskSpec:
    """A family at one task: as an embedder, or as a reranker."""

    keys: Mapping[str, Rule]
    """Every key that config.json may have, with the values that are supported. A key that is not here is refused."""
    network: Network
    checks: tuple[Callable[[ConfigFile], None], ...] = ()
    """Each raises StartupError where keys do not fit each other."""


@dataclass(frozen=True, slots=True)
class AnswerWords:
    """What a reranker on a language model is asked for: its score is the logit of one token, less that of another."""

    true: str = "yes"
    false: str | None = "no"
    """None: there is no other."""
    scale: float = 1.0
    """Logits are multiplied by it before the sigmoid."""


@dataclass(frozen=True, slots=True)
class PublishedModel:
    """What the card of a model at https://huggingface.co prescribes and its files leave out."""

    owner: str
    name: str
    """A regular expression that matches the whole name."""
    prompts: Mapping[str, str] = field(default_factory=dict)
    """Of an embedder, by name: what goes before a text."""
    completes_files: bool = False
    """Whether `prompts` are added to those of files that have others: the files name prompts of tasks, and none of the
    roles `query` and `document`."""
    dimensions: Sequence[int] = ()
    """Sizes that vectors may be cut to, a range where every size in it is one; empty: as the family has it."""
    pair_prompt: PairPrompt | None = None
    """Of a reranker: the text around a pair, where its files have no template for pairs."""
    answers: AnswerWords = AnswerWords()
    """Of a reranker: the words, where its files name no tokens, and the scale."""

    def is_called(self, model_id: str) -> bool:
        """Whether this is the model of an id, or of a folder's name."""
        *owners, last = model_id.split("/")
        by_owner = not owners or owners[-1].casefold() == self.owner.casefold()
        return by_owner and re.fullmatch(self.name, last, re.IGNORECASE) is not None


@dataclass(frozen=True, slots=True)
class BiasTable:
    """The size of what is computed for position biases when a model is loaded, and kept beside its weights."""

    values: int
    """Of each distance: one for each head, or one bucket."""
    positions: int
    """Tokens of the longest row."""
    projected: int = 0
    """Values of the keys and queries of all buckets and layers; without them the table is of the weights' type."""

    @classmethod
    def of(cls, kind: PositionBias | None, config: ConfigJson) -> BiasTable | None:
        """Of a checkpoint; None: its network has no bias."""
        if kind is None:
            return None
        positions = int(config["max_position_embeddings"])
        if kind != "disentangled":
            return cls(int(config["num_attention_heads"]), positions)
        most = int(config.get("max_relative_positions") or -1)
        span = int(config.get("position_buckets") or -1)
        span = span if span > 0 else most if most > 0 else positions
        return cls(1, positions, 2 * 2 * span * int(config["hidden_size"]) * int(config["num_hidden_layers"]))

    def shape(self, element_size: int) -> tuple[int, int, int]:
        """`values`, rows and columns of the table; fewer rows where so many would take more than TABLE_BYTES."""
        # Steps of 16 keep every part aligned as the memory-efficient kernel wants it. A pack's filler is a row too.
        reach = -(-max(self.positions, LONGEST_FILLER) // 16) * 16
        rows = min(TABLE_ROWS, reach)
        while rows > 16 and rows * 2 * reach * self.values * element_size > TABLE_BYTES:
            rows = -(-rows // 32) * 16
        return self.values, rows, 2 * reach

    def size(self, element_size: int) -> int:
        """Bytes, for weights of that size."""
        values, rows, columns = self.shape(INT64_BYTES if self.projected else element_size)
        table = values * rows * columns * (INT64_BYTES if self.projected else element_size)
        return table + self.projected * element_size


@dataclass(frozen=True, slots=True)
class HubModel:
    """A model at https://huggingface.co that people name, for `vecmill models`. What is served does not depend on it.

    Sources: the files and cards on the hub as the registry of MTEB has them, https://github.com/embeddings-benchmark/mteb
    at a905523 (2026-08-22), with the number of parameters counted on transformers' class where it is rounded there.
    """

    id: str
    """Owner and name."""
    task: Task
    parameters: int
    licence: str
    """As the hub names it."""
    max_tokens: int
    """Of the longest text, or of the longest pair with its prompt."""
    width: int | None = None
    """Values of an embedder's vector; None: a reranker."""
    stored: Literal["float32", "bfloat16", "float16"] = "float32"
    """The type of the weights in its files, and so the size of the download."""
    note: str = ""
    """What one has to know before fetching it."""
    bias: BiasTable | None = None
    """What its network keeps beside the weights."""

    def memory_bytes(self, element_size: int) -> int:
        """Of its weights in a type, and of what is computed from them at the start, which is never float8."""
        return self.parameters * element_size + (self.bias.size(max(2, element_size)) if self.bias is not None else 0)

    @property
    def download_bytes(self) -> int:
        """Of its weights."""
        return self.parameters * (4 if self.stored == "float32" else 2)


Unpooled = Literal["nothing", "instruction", "prompt"]


@dataclass(frozen=True, slots=True)
class TextFormat:
    """What an embedder's tokens need beyond the tokenizer's own template."""

    end_token: str | None = None
    """Ends every text; added where the template does not add it."""
    end_survives_truncation: bool = True
    unpooled: Unpooled = "nothing"
    """Which leading tokens are not pooled: as many as the prompt has by itself (`instruction`, NV-Embed), or as many as
    it has with the special tokens around it, less an ending one (`prompt`, sentence-transformers' `include_prompt`)."""


@dataclass(frozen=True, slots=True)
class Family:
    """What the checkpoints of a `model_type` have in common."""

    model_type: str
    """As config.json has it. Clients are shown it as the family, and it is a part of the cache's keys."""
    architectures: str
    """A regular expression that matches every class that `architectures` in config.json may list."""
    tasks: Mapping[Task, TaskSpec]
    positions: Positions
    published: tuple[PublishedModel, ...] = ()
    examples: tuple[HubModel, ...] = ()
    """Models of each task that people name; a test asks for them."""
    claims: Callable[[Mapping[str, Any]], bool] = lambda config: False
    """Whether a config.json, not checked yet, is of this family though it has another's `model_type`, or none: it was
    made with code of its own."""
    own_modules: Mapping[str, str] = field(default_factory=dict)
    """Classes of that code in modules.json, to those of sentence-transformers that they stand for."""
    prompts: Callable[[ConfigJson], Mapping[str, str]] = lambda config: {}
    """Those that config.json holds, by name."""
    native_keys: Mapping[str, str] = field(default_factory=dict)
    """Keys of config.json that transformers' class has under another name, with that name."""
    max_positions: Callable[[ConfigJson], int | None] = lambda config: config.get("max_position_embeddings")
    """The number of positions that the weights have or were trained on; None: config.json does not say."""
    dimensions: Callable[[int], Sequence[int]] = lambda width: (width,)
    """From the width of a vector to the sizes that it may be cut to (Matryoshka representation learning)."""
    layer_norm_before_slice: Callable[[ConfigJson], bool] = lambda config: False
    """Whether a vector is layer-normed, without weights, before it is cut."""
    text_format: Callable[[ConfigJson], TextFormat] | None = None
    """None: the tokenizer's own template, and pooling as sentence-transformers does it."""
    tokenizer_as_it_stands: bool = False
    """Whether tokenizer.json alone counts: the reference is code of its own that reads no other file."""
    add_eos_token: bool = False
    """Whether an embedder's texts end with `eos_token` where tokenizer_config.json has `add_eos_token: true`, whatever
    the template says. Models of such families were trained and published with releases before transformers 5, which did
    so; 5 reads the template of tokenizer.json alone, and so pools another token (e5-mistral, gte-Qwen2)."""
    is_decoder: bool = False
    """Whether it is a causal language model: as a reranker it reads a pair as one text and answers with a token, or has
    a classification head on the last token."""
    text_half: bool = False
    """Whether its checkpoints read pictures or sound too: their text is served, by `text_config` in config.json."""
    width_key: str = "hidden_size"
    """Attribute of transformers' config class with the width of the last hidden states."""
    float16: bool = True
    """Whether hidden states stay within float16's range; where they do not, DTYPE=float16 is refused."""
    two_label_head: str = ""
    """Of rerankers: a regular expression of the `architectures` whose head, `head.weight` and `head.bias`, gives two
    logits of the last token; the score is the second less the first."""
    pair_prompt: PairPrompt | None = None
    """Of rerankers: the text around a pair where config.json has `pair_prompt_flag`; where there is no such key, around
    every pair for which the files have no chat template."""
    pair_prompt_flag: str | None = None
    """A key of config.json that says, if true, that the checkpoint is a reranker with `pair_prompt`."""

    def has_two_label_head(self, config: ConfigJson) -> bool:
        """Whether a config.json is that of a reranker with such a head."""
        names = config.get("architectures") or ()
        return bool(self.two_label_head) and any(re.fullmatch(self.two_label_head, name) for name in names)

    def check_config(self, named: str, path: Path, config: Mapping[str, Any], task: Task) -> None:
        """Raise StartupError unless every key of a config.json is known and says what is implemented.

        Args:
            named: the setting that names the model, for the error.
        """
        spec = self.tasks[task]
        check_keys(named, path, config, spec.keys)
        file = ConfigFile(named, path, config)
        check_architectures(file, self.architectures)
        for check in spec.checks:
            check(file)

    def arguments(self, config: ConfigJson, task: Task, positions: int) -> dict[str, Any]:
        """Keyword arguments of transformers' config class for a checkpoint with so many positions."""
        spec = self.tasks[task]
        return spec.network.arguments(honoured(config, spec.keys), positions)

    def width(self, config: ConfigJson) -> int | None:
        """Values of a hidden state; None where config.json leaves it to the class's default."""
        of_text = config.get("text_config") or {} if self.text_half else config
        native = {self.native_keys.get(key, key): value for key, value in of_text.items()}
        width: int | None = native.get(self.width_key)
        return width
