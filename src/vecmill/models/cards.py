"""A model as clients see it: its card, made of its files, of what is published of its name, and of the settings.

Reads no tensors and does not know the hub.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from vecmill.core.errors import StartupError
from vecmill.core.types import INSTRUCTION_PLACE, ModelCard, PromptSource, Task
from vecmill.models.checkpoint import Checkpoint
from vecmill.models.rerank_prompt import rerank_form

README_BYTES = 16_384
LICENSE = re.compile(r"^license:\s*['\"]?(?P<license>[\w.+-]{1,100})['\"]?\s*$", re.MULTILINE | re.ASCII)
INSTRUCT = re.compile(r"^Instruct: (?P<instruction>.*)\nQuery:(?P<space> ?)$", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Prompts:
    """What goes before a model's texts."""

    by_name: Mapping[str, str]
    default_name: str | None = None
    """Name of the prompt for texts whose request names neither prompt nor role."""
    source: PromptSource | None = None
    """None: it has none."""

    @property
    def instruction_template(self) -> str | None:
        """Where an instruction goes in the query prompt; None: the model has no such place."""
        match = INSTRUCT.match(self.by_name.get("query", ""))
        return f"Instruct: {INSTRUCTION_PLACE}\nQuery:{match['space']}" if match else None


@dataclass(frozen=True, slots=True)
class OnDevice:
    """What a model has become on the device."""

    width: int
    vocab_size: int
    dtype: str
    dtype_reason: str
    device: str
    weight_bytes: int
    """In the device's memory; what is shared with another model counts once."""
    numerics: str | None = None
    """See `ModelCard`."""


def make_card(
    checkpoint: Checkpoint, loaded: OnDevice, aliases: tuple[str, ...], query_instruction: str | None
) -> ModelCard:
    """The card of a loaded model. Only after loading: the fingerprint covers the weights, too."""
    embeds = checkpoint.task is Task.EMBED
    prompts = choose_prompts(checkpoint, query_instruction)
    return ModelCard(
        id=checkpoint.id,
        task=checkpoint.task,
        family=checkpoint.family.model_type,
        revision=checkpoint.revision,
        fingerprint=checkpoint.fingerprint.hex,
        dimensions=loaded.width if embeds else None,
        supported_dimensions=supported_dimensions(checkpoint, loaded.width) if embeds else (),
        max_model_len=checkpoint.max_model_len,
        vocab_size=loaded.vocab_size,
        pooling=checkpoint.pooling if embeds else None,
        dtype=loaded.dtype,
        dtype_reason=loaded.dtype_reason,
        device=loaded.device,
        weight_bytes=loaded.weight_bytes,
        similarity=checkpoint.similarity,
        unit_vectors=checkpoint.normalizes,
        layer_norm_before_slice=_has_layer_norm(checkpoint),
        prompts=prompts.by_name,
        adapters=checkpoint.adapters.names if checkpoint.adapters is not None else (),
        default_prompt_name=prompts.default_name,
        prompts_from=prompts.source,
        instruction_template=prompts.instruction_template,
        aliases=aliases,
        license=_license(checkpoint),
        numerics=loaded.numerics,
    )


def _license(checkpoint: Checkpoint) -> str | None:
    """Of the metadata with which a README.md of the hub begins."""
    try:
        with (checkpoint.folder / "README.md").open("rb") as readme:
            head = readme.read(README_BYTES).decode("utf-8", "replace")
    except OSError:
        return None
    if not head.startswith("---"):
        return None
    match = LICENSE.search(head[3:].partition("\n---")[0])
    return match["license"] if match else None


def choose_prompts(checkpoint: Checkpoint, query_instruction: str | None = None) -> Prompts:
    """The model's prompts: those of its files, the empty ones included, else those of its published card.

    `query_instruction` (QUERY_INSTRUCTION) replaces the task in the query prompt, or the whole of a prompt that has no
    place for one; a model without a query prompt was not trained with any and keeps none.
    """
    prompts = _prescribed(checkpoint)
    if query_instruction is None:
        return prompts
    if checkpoint.task is Task.RERANK:
        return _instructed(checkpoint, prompts, query_instruction)
    if not prompts.by_name.get("query"):
        return prompts
    template = prompts.instruction_template or INSTRUCTION_PLACE
    query = template.replace(INSTRUCTION_PLACE, query_instruction)
    # A model with adapters has it under the task's name, too.
    same = [name for name, text in prompts.by_name.items() if checkpoint.adapters and text == prompts.by_name["query"]]
    return replace(prompts, by_name={**prompts.by_name, **dict.fromkeys(("query", *same), query)})


def _instructed(checkpoint: Checkpoint, prompts: Prompts, instruction: str) -> Prompts:
    """A reranker's default prompt is its instruction, where it takes one."""
    pair_prompt = rerank_form(checkpoint).prompt
    if pair_prompt is None or not pair_prompt.takes_instruction:
        return prompts
    name = prompts.default_name or "query"
    return replace(prompts, by_name={**prompts.by_name, name: instruction}, default_name=name)


def _prescribed(checkpoint: Checkpoint) -> Prompts:
    published = checkpoint.published
    if checkpoint.prompts or checkpoint.default_prompt_name:
        added = published.prompts if published is not None and published.completes_files else {}
        return Prompts({**added, **checkpoint.prompts}, checkpoint.default_prompt_name, "files")
    if checkpoint.task is Task.RERANK:
        pair_prompt = rerank_form(checkpoint).prompt
        instruction = pair_prompt.default_instruction if pair_prompt is not None else None
        return Prompts({"query": instruction}, "query", "card") if instruction is not None else Prompts({})
    return Prompts(published.prompts, source="card") if published is not None and published.prompts else Prompts({})


def supported_dimensions(checkpoint: Checkpoint, width: int) -> Sequence[int]:
    """Sizes that a vector may be cut to, the native one (`width`) last (Matryoshka representation learning).

    The keys in config.json are vLLM's, so an owner can add them to a checkpoint that was trained so.
    """
    sizes = checkpoint.config.get("matryoshka_dimensions")
    if isinstance(sizes, list):
        return tuple(sorted({width, *(int(size) for size in sizes if 0 < int(size) <= width)}))
    if checkpoint.config.get("is_matryoshka"):
        return range(1, width + 1)
    if checkpoint.published is not None and (published := checkpoint.published.dimensions):
        if isinstance(published, range):
            return range(min(published.start, width), width + 1)
        return (*(size for size in published if size < width), width)
    # What a family was trained for is said of its own vectors, not of those that another layer makes of them.
    return (width,) if _has_trained_heads(checkpoint) else checkpoint.family.dimensions(width)


def _has_layer_norm(checkpoint: Checkpoint) -> bool:
    """Whether its vectors are layer-normed before they are cut."""
    return checkpoint.family.layer_norm_before_slice(checkpoint.config) and not _has_trained_heads(checkpoint)


def _has_trained_heads(checkpoint: Checkpoint) -> bool:
    return any(head.trained for head in checkpoint.heads)


def with_aliases(named: Mapping[str, str], model_aliases: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Every name to the id of its model: those there are, and MODEL_ALIASES.

    Raises:
        StartupError: an alias is another model's name, or of none that is loaded.
    """
    known, ids = dict(named), ", ".join(named)
    for alias, name in model_aliases:
        if name not in known:
            raise StartupError(f"MODEL_ALIASES={alias}={name}: {name} is not loaded; these are: {ids}.")
        if alias in known:
            raise StartupError(f"MODEL_ALIASES={alias}={name}: {alias} is a model's own name; choose another.")
        known[alias] = known[name]
    return known


def aliases_of(model_id: str, known: Mapping[str, str]) -> tuple[str, ...]:
    """The names of a model besides its id."""
    return tuple(name for name in known if known[name] == model_id != name)
