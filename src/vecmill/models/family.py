"""What one file in `families/` says of a model family. Reads no tensors and imports no torch.

The rest of the house asks these fields and never compares names of families.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Literal

from vecmill.core.types import Task
from vecmill.models.chat_template import PairPrompt
from vecmill.models.config_keys import ConfigFile, check_architectures
from vecmill.models.keys import Rule, check_keys, honoured

Config = Mapping[str, Any]
"""The object in a config.json, checked."""
Pooling = Literal["mean", "cls", "lasttoken"]
Rename = Callable[[str], Sequence[str]]
"""A weight's name in the files to its names in the class: none leaves it out, several share its rows equally."""
DEFAULT_INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"


class Positions(Enum):
    """Where the first token of a row stands."""

    FROM_ZERO = "from zero"
    """A table of learned positions."""
    AFTER_PADDING = "after padding"
    """As before, but counted from the id of padding on, and padding is not counted (fairseq's convention)."""
    ROTARY = "rotary"
    """Only distances count."""

    def moved_by_left_padding(self, *, same_padding: bool) -> bool:
        """Whether padding on the left moves a text, so that its reference vector depends on what it is batched with.

        `same_padding`: the tokenizer pads with the id that the model counts positions around.
        """
        return self is Positions.FROM_ZERO or (self is Positions.AFTER_PADDING and not same_padding)


@dataclass(frozen=True, slots=True)
class Network:
    """The classes of transformers that a family runs through, by name, and how a checkpoint becomes one of them."""

    config_class: str
    model_class: str
    rename: Rename
    arguments: Callable[[Config, int], dict[str, Any]] = lambda config, positions: dict(config)
    """The config class's, of the keys that are honoured and the number of positions."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """The model class's own arguments."""
    blocks: str = "layers"
    """Where the repeated blocks are, from the base model."""
    merged: tuple[str, ...] = ()
    """Classes whose projections of the same input become one product, see `merged_projections`."""
    token_types: bool = False
    """Whether it is told which of two texts a token is of."""
    latent_attention: str | None = None
    """The key of config.json with the sizes of NV-Embed's block after the layers; None: there is none."""
    pooling: Pooling | None = None
    """What the network itself does, whatever the files say; None: it leaves that to them."""


@dataclass(frozen=True, slots=True)
class TaskSpec:
    """A family as an embedder, or as a reranker."""

    keys: Mapping[str, Rule]
    """Every key that its config.json may have."""
    network: Network
    checks: tuple[Callable[[ConfigFile], None], ...] = ()
    """Of keys that must fit each other. Each raises StartupError."""


@dataclass(frozen=True, slots=True)
class PublishedModel:
    """What the card of a model on the hub prescribes and its files leave out. Source: the card of that name."""

    owner: str
    name: str
    """A regular expression."""
    prompts: Mapping[str, str] = field(default_factory=dict)
    dimensions: tuple[int, ...] = ()
    """Sizes that its vectors may be cut to, beside what holds for the family."""
    pair_prompt: PairPrompt | None = None
    """How it reads pairs, where it is a reranker whose files need not say so."""

    def is_called(self, model_id: str) -> bool:
        """Whether this is the model of an id, or of a folder's name."""
        *owners, last = model_id.split("/")
        by_owner = not owners or owners[-1].casefold() == self.owner.casefold()
        return by_owner and re.fullmatch(self.name, last, re.IGNORECASE) is not None


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
    """All that is known of the checkpoints of one `model_type`."""

    model_type: str
    """In config.json. Clients see it as the family, and the cache's keys hold it."""
    architectures: str
    """A pattern of the class names that `architectures` in config.json may have."""
    tasks: Mapping[Task, TaskSpec]
    positions: Positions
    published: tuple[PublishedModel, ...] = ()
    native_keys: Mapping[str, str] = field(default_factory=dict)
    """Keys of config.json that transformers' class has under another name: theirs to its."""
    max_positions: Callable[[Config], int | None] = lambda config: config.get("max_position_embeddings")
    """How many positions the weights have or were trained on; None: config.json does not say."""
    dimensions: Callable[[int], Sequence[int]] = lambda width: (width,)
    """Sizes that every model's vectors may be cut to, of its width (Matryoshka representation learning)."""
    layer_norm_before_slice: bool = False
    """Whether a vector is normed, without weights, before it is cut."""
    text_format: Callable[[Config], TextFormat] | None = None
    """None: as sentence-transformers has it."""
    tokenizer_as_it_stands: bool = False
    """Whether tokenizer.json counts alone, since the reference is code of its own that reads nothing else."""
    is_decoder: bool = False
    """Whether it is a causal language model: it can be given a pair as one text and answer with a token, and its
    classification head looks at the last token."""
    pair_prompt: PairPrompt | None = None
    """How it reads pairs where the files do not say, but for `pair_prompt_flag`."""
    pair_prompt_flag: str | None = None
    """The key of config.json that says, if true, that it is a reranker and reads them so."""

    def check_config(self, named: str, path: Path, config: Mapping[str, Any], task: Task) -> None:
        """Every key of a config.json is known, and says what is implemented.

        Args:
            named: the setting that names the model, for the error.

        Raises:
            StartupError: a key is not known, or its value is not supported.
        """
        spec = self.tasks[task]
        check_keys(named, path, config, spec.keys)
        file = ConfigFile(named, path, config)
        check_architectures(file, self.architectures)
        for check in spec.checks:
            check(file)

    def arguments(self, config: Config, task: Task, positions: int) -> dict[str, Any]:
        """What transformers' config class is made with: no keys that change nothing."""
        spec = self.tasks[task]
        return spec.network.arguments(honoured(config, spec.keys), positions)

    def width(self, config: Config) -> int | None:
        """Values of a hidden state; None where config.json leaves it to the class's default."""
        native = {self.native_keys.get(key, key): value for key, value in config.items()}
        width: int | None = native.get("hidden_size")
        return width
