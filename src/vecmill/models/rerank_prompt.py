"""How a reranker reads a query and a document, and which of its numbers is the score. Reads no tensors.

What the files say is honoured as sentence-transformers' CrossEncoder does: the LogitScore module, the chat template, a
classification head. Where they say nothing, Qwen3-Reranker's own recipe holds for the models of that name, and no other
decoder is taken for a reranker.

Sources: https://huggingface.co/Qwen/Qwen3-Reranker-0.6B (the transformers recipe; single line breaks);
https://sbert.net/docs/package_reference/cross_encoder/
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from tokenizers import Tokenizer

from vecmill.core.errors import StartupError
from vecmill.core.types import Task
from vecmill.models.chat_template import SPECIAL_TOKENS, Pieces, ReadTemplate, Slot, UnfitTemplateError, read_template
from vecmill.models.checkpoint import LIBRARY_CONFIG, Checkpoint, read_json

PREFIX = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
SUFFIX = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
DEFAULT_INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
QWEN3 = (
    f"{PREFIX}<Instruct>: ",
    Slot.INSTRUCTION,
    "\n<Query>: ",
    Slot.QUERY,
    "\n<Document>: ",
    Slot.DOCUMENT,
    SUFFIX,
)
NAMED = (("Qwen", r"Qwen3-Reranker-[\d.]+B"), ("tomaarsen", r"Qwen3-Reranker-[\d.]+B-seq-cls"))

DECODERS = ("qwen3",)
ACTIVATIONS = ("Identity", "Sigmoid")  # neither changes the order; scores are the sigmoid, raw scores the logit
MODULE_CONFIG = "sentence_bert_config.json"
TOKENS_FILE = "special_tokens_map.json"
DEFAULT, TEMPLATE_FILE, TEMPLATE_FOLDER = "default", "chat_template.jinja", "additional_chat_templates"
# Arguments of transformers' apply_chat_template and of what it calls, not the template's variables.
NOT_VARIABLES = (
    *("conversation", "conversations", "messages", "tools", "documents", "continue_final_message", "tokenize"),
    *("sanitize_control_tokens", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
    *("return_assistant_tokens_mask", "tokenizer_kwargs", "processor_kwargs"),
)
STRUCTURED = ("content[0]", ".type", "'type'", '"type"', "item.type", "message.content[")


@dataclass(frozen=True, slots=True)
class PairPrompt:
    """The text around a pair, without an instruction and with one."""

    plain: Pieces
    instructed: Pieces
    variables: frozenset[str] = frozenset()
    """Those of the chat template, which special tokens may be among."""

    @property
    def takes_instruction(self) -> bool:
        return Slot.INSTRUCTION in self.instructed

    @property
    def fixed_text(self) -> str:
        """All that is the same around every pair."""
        return "".join(piece for piece in (*self.plain, *self.instructed) if not isinstance(piece, Slot))


QWEN3_PROMPT = PairPrompt(QWEN3, QWEN3)


@dataclass(frozen=True, slots=True)
class Answers:
    """The score is the logit of one token after the prompt, less that of another, if there is one, times a factor."""

    true: int
    false: int | None = None
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class RerankForm:
    """How one reranker works."""

    prompt: PairPrompt | None
    """None: the tokenizer's own template for pairs."""
    answers: Answers | None
    """None: a classification head gives the score."""


@lru_cache(maxsize=16)  # templates are rendered and tokenizers read for it, and a start asks several times
def rerank_form(checkpoint: Checkpoint) -> RerankForm:
    """What the files of a reranker say, or its name.

    Raises:
        StartupError: they do not say that it is a reranker, or what they say is not supported.
    """
    _check_activation(checkpoint)
    architecture = str(next(iter(checkpoint.config.get("architectures") or ()), "missing"))
    if checkpoint.logit_score:
        return RerankForm(_prompt(checkpoint), _answers(checkpoint))
    if architecture.endswith("ForCausalLM"):
        return _causal(checkpoint)
    if checkpoint.model_type in DECODERS and not architecture.endswith("ForSequenceClassification"):
        raise StartupError(
            f"{checkpoint.named}: `architectures` in config.json is {architecture}, which has no head that scores; a "
            f"reranker is a ...ForSequenceClassification, or a ...ForCausalLM with a LogitScore module."
        )
    return RerankForm(_prompt(checkpoint), None)


def check_form(checkpoint: Checkpoint) -> None:
    """Refuse a reranker whose files put its pairs into a form that is not supported.

    Raises:
        StartupError: they do, or they do not make a reranker of what is named as one.
    """
    if checkpoint.task is Task.RERANK:
        rerank_form(checkpoint)


def padding_token(checkpoint: Checkpoint) -> int | None:
    """The token that a decoder's classification head passes over where it ends a row; it looks at the one before."""
    if checkpoint.model_type not in DECODERS or rerank_form(checkpoint).answers is not None:
        return None
    said = checkpoint.config.get("pad_token_id")
    return said if isinstance(said, int) and _is_id(said) else None


def is_named(checkpoint: Checkpoint) -> bool:
    """Whether it is a Qwen3-Reranker by its name."""
    return any(checkpoint.is_called(owner, name) for owner, name in NAMED)


def _causal(checkpoint: Checkpoint) -> RerankForm:
    """A causal language model without a LogitScore module."""
    if is_named(checkpoint) or checkpoint.config.get("is_original_qwen3_reranker") is True:
        no, yes = _words(checkpoint)
        return RerankForm(QWEN3_PROMPT, Answers(yes, no))
    with suppress(UnfitTemplateError):
        if (template := _template(checkpoint)).names_its_roles:
            return RerankForm(_pair_prompt(template), Answers(*answer_tokens(checkpoint)))
    raise StartupError(
        f"{checkpoint.named}: this is a causal language model, and nothing in its files says that it is a reranker: no "
        f"LogitScore in modules.json, no chat template with the roles `query` and `document`. Name a "
        f"Qwen/Qwen3-Reranker, or save the model with sentence-transformers' CrossEncoder."
    )


def _words(checkpoint: Checkpoint) -> tuple[int, int]:
    """The tokens of no and yes; vLLM's `classifier_from_token` may name others."""
    words = checkpoint.config.get("classifier_from_token") or ["no", "yes"]
    if not isinstance(words, list) or len(words) != 2:
        raise StartupError(f"{checkpoint.named}: `classifier_from_token` in config.json must name two tokens.")
    no, yes = (str(word) for word in words)
    true, false = answer_tokens(checkpoint, yes, no)
    return false, true


def answer_tokens(checkpoint: Checkpoint, yes: str = "yes", no: str = "no") -> tuple[int, int]:
    """The ids of two words.

    Raises:
        StartupError: the tokenizer has no such tokens, so it is another model's.
    """
    tokenizer = Tokenizer.from_file(str(checkpoint.tokenizer_file))
    found = tokenizer.token_to_id(yes), tokenizer.token_to_id(no)
    if found[0] is None or found[1] is None:
        raise StartupError(f"{checkpoint.named}: {checkpoint.tokenizer_file} has no tokens `{yes}` and `{no}`.")
    return found[0], found[1]


def _answers(checkpoint: Checkpoint) -> Answers:
    said = checkpoint.logit_score
    true, false = said.get("true_token_id"), said.get("false_token_id")
    if not _is_id(true) or not (false is None or _is_id(false)):
        raise StartupError(
            f"{checkpoint.named}: the LogitScore module has true_token_id={true!r} and false_token_id={false!r}; the "
            f"first must be a token's id, the second may be left out."
        )
    return Answers(int(true or 0), None if false is None else int(false))


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _check_activation(checkpoint: Checkpoint) -> None:
    """Refuse what would change scores other than by the sigmoid that every relevance score here is made with."""
    config = checkpoint.config
    saved = config.get("sentence_transformers")
    said = {
        LIBRARY_CONFIG: checkpoint.library_config.get("activation_fn"),
        "config.json": (saved.get("activation_fn") if isinstance(saved, Mapping) else None)
        or config.get("sbert_ce_default_activation_function"),
    }
    for file, name in said.items():
        parts = str(name).split(".")
        if name is not None and (parts[0] != "torch" or parts[-1] not in ACTIVATIONS):
            raise StartupError(
                f"{checkpoint.named}: {file} names the activation {name!r} for its scores; supported are torch's "
                f"{' and '.join(ACTIVATIONS)}."
            )


def _prompt(checkpoint: Checkpoint) -> PairPrompt | None:
    """The chat template where sentence-transformers renders it, else that of the model's name; else none."""
    if not _are_messages(checkpoint):
        if is_named(checkpoint):
            return QWEN3_PROMPT
        if checkpoint.logit_score:
            raise StartupError(
                f"{checkpoint.named}: it has a LogitScore module, but {MODULE_CONFIG} does not say that pairs are "
                f"messages (`modality_config`): nothing would stand between a query and a document, which is not "
                f"supported."
            )
        return None
    try:
        found = _pair_prompt(_template(checkpoint))
    except UnfitTemplateError as error:
        if is_named(checkpoint):  # the first releases have the chat template of the model that they were made from
            return QWEN3_PROMPT
        raise StartupError(f"{checkpoint.named}: its chat template {error}.") from None
    if read_json(checkpoint.folder / "tokenizer_config.json").get("truncation_side", "right") != "right":
        raise StartupError(
            f"{checkpoint.named}: `truncation_side` in tokenizer_config.json would cut the beginning of its chat "
            f"template; supported is 'right'."
        )
    if checkpoint.model_type not in DECODERS:
        raise StartupError(
            f"{checkpoint.named}: chat templates are supported for decoders only: {', '.join(DECODERS)}."
        )
    return found


def _pair_prompt(template: ReadTemplate) -> PairPrompt:
    return PairPrompt(template.plain, template.instructed, template.special_tokens)


def _are_messages(checkpoint: Checkpoint) -> bool:
    """Whether sentence-transformers gives pairs to the chat template, and not to the tokenizer."""
    if not checkpoint.library_config:  # it is no saved CrossEncoder: whatever has a template is rendered
        return bool(chat_templates(checkpoint))
    said = read_json(checkpoint.folder / MODULE_CONFIG)
    task = said.get("transformer_task", "feature-extraction")
    wanted = "text-generation" if checkpoint.logit_score else "sequence-classification"
    if task != wanted:
        raise StartupError(
            f"{checkpoint.named}: {MODULE_CONFIG} has `transformer_task`: {task!r}; for these modules it must be "
            f"{wanted!r}."
        )
    return "message" in (said.get("modality_config") or {})


def chat_templates(checkpoint: Checkpoint) -> dict[str, str]:
    """The chat templates of a checkpoint by name; the module's arguments win over files, as transformers has it.

    Raises:
        StartupError: one is no text.
    """
    said = checkpoint.tokenizer.arguments.get("chat_template")
    named = said if said is not None else _template_files(checkpoint)
    if named is None:
        named = read_json(checkpoint.folder / "tokenizer_config.json").get("chat_template")
    if isinstance(named, list) and all(isinstance(one, dict) for one in named):
        named = {one.get("name"): one.get("template") for one in named}
    found = named if isinstance(named, dict) else {} if named is None else {DEFAULT: named}
    if not all(isinstance(text, str) for one in found.items() for text in one):
        raise StartupError(
            f"{checkpoint.named}: `chat_template` in tokenizer_config.json (or in `processor_kwargs`) must be a text, "
            f"or a list of objects with the texts `name` and `template`."
        )
    return found


def _template_files(checkpoint: Checkpoint) -> dict[str, str] | None:
    folder = checkpoint.folder
    files = {path.stem: path for path in sorted((folder / TEMPLATE_FOLDER).glob("*.jinja"))}
    if (folder / TEMPLATE_FILE).is_file():
        files = {DEFAULT: folder / TEMPLATE_FILE, **files}
    try:
        return {name: path.read_text("utf-8") for name, path in files.items()} or None
    except UnicodeDecodeError:
        raise StartupError(
            f"{checkpoint.named}: a chat template in {folder} (*.jinja) is not UTF-8; fetch the model again."
        ) from None


def _template(checkpoint: Checkpoint) -> ReadTemplate:
    """The chat template that pairs are given to.

    Raises:
        UnfitTemplateError: there is none, or it cannot be used.
    """
    said = read_json(checkpoint.folder / MODULE_CONFIG) if checkpoint.library_config else {}
    options = dict(_options(checkpoint, said.get("processing_kwargs") or {}))
    sources = chat_templates(checkpoint)
    named = options.pop("chat_template", None)
    if named is not None and set(sources) <= {DEFAULT}:
        source = str(named)  # a template itself
    elif (source := sources.get(named or DEFAULT, "")) == "":
        others = f"; there are {', '.join(sorted(sources))}" if sources else ""
        raise UnfitTemplateError(f"{named or ''} is missing ({TEMPLATE_FILE}, tokenizer_config.json{others})".lstrip())
    form = ((said.get("modality_config") or {}).get("message") or {}).get("format", "auto")
    if form == "auto":
        only_one = sources.get(DEFAULT, "") if len(sources) == 1 else ""
        form = "flat" if only_one and not any(part in only_one for part in STRUCTURED) else "structured"
    return read_template(source, _special_tokens(checkpoint), options, structured=form == "structured")


def _options(checkpoint: Checkpoint, said: Any) -> Mapping[str, Any]:
    """What the files give to the template besides the messages."""
    options: Any = said.get("chat_template") or {} if isinstance(said, Mapping) else None
    if not isinstance(options, Mapping):
        raise StartupError(
            f"{checkpoint.named}: `processing_kwargs` in {MODULE_CONFIG}, and `chat_template` in it, must be objects."
        )
    others = [f"processing_kwargs.{key}" for key, value in said.items() if key != "chat_template" and value]
    others += [f"processing_kwargs.chat_template.{key}" for key in NOT_VARIABLES if key in options]
    if not options.get("restore_suffix", True):
        others.append("processing_kwargs.chat_template.restore_suffix")
    if others:
        raise StartupError(f"{checkpoint.named}: {MODULE_CONFIG} has {', '.join(others)}, which is not supported.")
    return {key: value for key, value in options.items() if key != "restore_suffix"}


def _special_tokens(checkpoint: Checkpoint) -> dict[str, str]:
    """By the names that templates have for them, in the order in which transformers merges the files."""
    said = read_json(checkpoint.folder / "tokenizer_config.json")
    arguments = checkpoint.tokenizer.arguments
    old = {} if "added_tokens_decoder" in {**said, **arguments} else read_json(checkpoint.folder / TOKENS_FILE)
    merged = {**said, **{key: value for key, value in arguments.items() if value or key not in old}}
    merged |= {key: value for key, value in old.items() if not arguments.get(key)}
    extra = merged.get("extra_special_tokens")
    found = {name: merged.get(name) for name in SPECIAL_TOKENS} | (extra if isinstance(extra, dict) else {})
    texts = {name: token.get("content") if isinstance(token, dict) else token for name, token in found.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def check_special_tokens(checkpoint: Checkpoint, tokens: Mapping[str, Any]) -> None:
    """Hold the special tokens that a chat template uses against those of the tokenizer that transformers makes.

    Raises:
        StartupError: the tokenizer has others than the files.
    """
    prompt = rerank_form(checkpoint).prompt
    used = prompt.variables if prompt else ()
    named = _special_tokens(checkpoint) if used else {}
    if wrong := [name for name in used if name in tokens and str(tokens[name]) != named.get(name)]:
        raise StartupError(
            f"{checkpoint.named}: its chat template uses {', '.join(sorted(wrong))}, which the tokenizer's class names "
            f"otherwise than its files: name it in tokenizer_config.json."
        )
