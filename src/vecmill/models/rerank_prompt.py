"""How a reranker reads a query and a document, and which of its numbers is the score. Reads no tensors.

What the files say is honoured as sentence-transformers' CrossEncoder does: the LogitScore module, the chat template, a
classification head. Where they say nothing, the prompt of a published model of that name holds, and no other decoder is
taken for a reranker.

Source: https://sbert.net/docs/package_reference/cross_encoder/
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from vecmill.core.errors import StartupError
from vecmill.core.types import Task
from vecmill.models.chat_template import SPECIAL_TOKENS, PairPrompt, ReadTemplate, UnfitTemplateError, read_template
from vecmill.models.checkpoint import LIBRARY_CONFIG, Checkpoint
from vecmill.models.families import decoders
from vecmill.models.family import AnswerWords
from vecmill.models.keys import read_json
from vecmill.models.tokenizer_files import DEFAULT_TEMPLATE, TEMPLATE_FILE, chat_templates, parsed

ACTIVATIONS = ("Identity", "Sigmoid")  # neither changes the order; scores are the sigmoid, raw scores the logit
MODULE_CONFIG = "sentence_bert_config.json"
TOKENS_FILE = "special_tokens_map.json"
# Arguments of transformers' apply_chat_template and of what it calls, not the template's variables.
NOT_VARIABLES = (
    *("conversation", "conversations", "messages", "tools", "documents", "continue_final_message", "tokenize"),
    *("sanitize_control_tokens", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
    *("return_assistant_tokens_mask", "tokenizer_kwargs", "processor_kwargs"),
)
STRUCTURED = ("content[0]", ".type", "'type'", '"type"', "item.type", "message.content[")


@dataclass(frozen=True, slots=True)
class Answers:
    """The score is the logit of one token after the prompt, less that of another, if there is one, times a factor."""

    true: int
    false: int | None = None
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class RerankForm:
    """How a reranker reads pairs, and what its score is."""

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
    if checkpoint.scores_vectors:
        return RerankForm(_template_prompt(checkpoint, None) if _are_messages(checkpoint) else None, None)
    if checkpoint.logit_score:
        return RerankForm(_prompt(checkpoint), _answers(checkpoint))
    if architecture.endswith("ForCausalLM"):
        return _causal(checkpoint)
    if checkpoint.family.has_two_label_head(checkpoint.config):
        return RerankForm(_two_label_prompt(checkpoint), None)
    if checkpoint.family.is_decoder and not architecture.endswith("ForSequenceClassification"):
        raise StartupError(
            f"{checkpoint.named}: `architectures` in config.json is {architecture}, which has no head that scores; a "
            f"reranker is a ...ForSequenceClassification, or a ...ForCausalLM with a LogitScore module."
        )
    return RerankForm(_prompt(checkpoint), None)


def check_form(checkpoint: Checkpoint) -> None:
    """Refuse a reranker whose files put its pairs into a form that is not supported.

    Raises:
        StartupError: they do, or the checkpoint is no reranker.
    """
    if checkpoint.task is Task.RERANK:
        rerank_form(checkpoint)


def padding_token(checkpoint: Checkpoint) -> int | None:
    """The padding token of a decoder with a head on the last token, which skips it at the end of a row; else None."""
    family = checkpoint.family
    if not family.is_decoder or checkpoint.network.pooling or checkpoint.scores_vectors:
        return None
    if family.has_two_label_head(checkpoint.config) or rerank_form(checkpoint).answers is not None:
        return None
    token = checkpoint.config.get("pad_token_id")
    return token if isinstance(token, int) and _is_id(token) else None


def _published_prompt(checkpoint: Checkpoint) -> PairPrompt | None:
    """How a reranker of this name, or of this family, reads pairs; None: its files have to say."""
    if checkpoint.published is not None and checkpoint.published.pair_prompt is not None:
        return checkpoint.published.pair_prompt
    return checkpoint.family.pair_prompt if checkpoint.family.pair_prompt_flag is None else None


def _causal(checkpoint: Checkpoint) -> RerankForm:
    """A causal language model without a LogitScore module."""
    family, prompt = checkpoint.family, _published_prompt(checkpoint)
    if prompt is None and family.pair_prompt_flag and checkpoint.config.get(family.pair_prompt_flag) is True:
        prompt = family.pair_prompt
    if prompt is not None:
        return RerankForm(prompt, _words(checkpoint))
    with suppress(UnfitTemplateError):
        if (template := _template(checkpoint)).names_its_roles:
            return RerankForm(_pair_prompt(template), Answers(*answer_tokens(checkpoint, "yes", "no")))
    raise StartupError(
        f"{checkpoint.named}: this is a causal language model, and nothing in its files says that it is a reranker: no "
        f"LogitScore in modules.json, no chat template with the roles `query` and `document`. Name a "
        f"Qwen/Qwen3-Reranker, or save the model with sentence-transformers' CrossEncoder."
    )


def _two_label_prompt(checkpoint: Checkpoint) -> PairPrompt:
    """Of a reranker whose files have no template for pairs: its name says which one it is."""
    if checkpoint.published is None or checkpoint.published.pair_prompt is None:
        raise StartupError(
            f"{checkpoint.named}: nothing in its files says how it reads a pair, and its name is not that of a model "
            f"whose prompt is known: keep the name of the model on the hub (Querit-4B) as the folder's."
        )
    return checkpoint.published.pair_prompt


def _words(checkpoint: Checkpoint) -> Answers:
    """The tokens of the card's words; vLLM's `classifier_from_token` may name others."""
    card = _answer_words(checkpoint)
    words = checkpoint.config.get("classifier_from_token")
    if not words:
        return Answers(*answer_tokens(checkpoint, card.true, card.false), card.scale)
    if not isinstance(words, list) or len(words) > 2:
        raise StartupError(
            f"{checkpoint.named}: `classifier_from_token` in config.json must name one token, or those of no and yes."
        )
    *no, yes = map(str, words)
    return Answers(*answer_tokens(checkpoint, yes, no[0] if no else None), card.scale)


def _answer_words(checkpoint: Checkpoint) -> AnswerWords:
    return checkpoint.published.answers if checkpoint.published is not None else AnswerWords()


def answer_tokens(checkpoint: Checkpoint, yes: str = "yes", no: str | None = "no") -> tuple[int, int | None]:
    """The ids of two words, or of one.

    Raises:
        StartupError: the tokenizer has no such tokens, so it is another model's.
    """
    _, tokenizer = parsed(checkpoint.tokenizer_file)
    words = [yes] if no is None else [yes, no]
    tokens = [token for word in words if (token := tokenizer.token_to_id(word)) is not None]
    if len(tokens) < len(words):
        raise StartupError(
            f"{checkpoint.named}: {checkpoint.tokenizer_file} does not have all of the tokens "
            f"{' and '.join(f'`{word}`' for word in words)}."
        )
    return tokens[0], None if no is None else tokens[1]


def _answers(checkpoint: Checkpoint) -> Answers:
    module = checkpoint.logit_score
    true, false = module.get("true_token_id"), module.get("false_token_id")
    if not _is_id(true) or not (false is None or _is_id(false)):
        raise StartupError(
            f"{checkpoint.named}: the LogitScore module has true_token_id={true!r} and false_token_id={false!r}; the "
            f"first must be a token's id, the second may be left out."
        )
    return Answers(int(true or 0), None if false is None else int(false), _answer_words(checkpoint).scale)


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _check_activation(checkpoint: Checkpoint) -> None:
    """Raise StartupError for an activation that changes the order of scores: relevance scores are always sigmoids."""
    config = checkpoint.config
    saved = config.get("sentence_transformers")
    activations = {
        LIBRARY_CONFIG: checkpoint.library_config.get("activation_fn"),
        "config.json": (saved.get("activation_fn") if isinstance(saved, Mapping) else None)
        or config.get("sbert_ce_default_activation_function"),
    }
    for file, name in activations.items():
        parts = str(name).split(".")
        if name is not None and (parts[0] != "torch" or parts[-1] not in ACTIVATIONS):
            raise StartupError(
                f"{checkpoint.named}: {file} names the activation {name!r} for its scores; supported are torch's "
                f"{' and '.join(ACTIVATIONS)}."
            )


def _prompt(checkpoint: Checkpoint) -> PairPrompt | None:
    """The chat template where sentence-transformers renders it, else that of the model's name; else none."""
    published = _published_prompt(checkpoint)
    if not _are_messages(checkpoint):
        if published is None and checkpoint.logit_score:
            raise StartupError(
                f"{checkpoint.named}: it has a LogitScore module, but {MODULE_CONFIG} does not say that pairs are "
                f"messages (`modality_config`): nothing would stand between a query and a document, which is not "
                f"supported."
            )
        return published
    return _template_prompt(checkpoint, published)


def _template_prompt(checkpoint: Checkpoint, published: PairPrompt | None) -> PairPrompt:
    """The chat template, or `published` where it is not made for pairs."""
    try:
        prompt = _pair_prompt(_template(checkpoint))
    except UnfitTemplateError as error:
        if published is not None:  # the first releases have the chat template of the model that they were made from
            return published
        raise StartupError(f"{checkpoint.named}: its chat template {error}.") from None
    if not checkpoint.family.is_decoder:
        raise StartupError(
            f"{checkpoint.named}: chat templates are supported for decoders only: "
            f"{', '.join(decoders(checkpoint.task))}."
        )
    return prompt


def _pair_prompt(template: ReadTemplate) -> PairPrompt:
    return PairPrompt(template.plain, template.instructed, variables=template.special_tokens)


def _are_messages(checkpoint: Checkpoint) -> bool:
    """Whether sentence-transformers gives pairs to the chat template, and not to the tokenizer."""
    if not checkpoint.library_config:  # it is no saved CrossEncoder: whatever has a template is rendered
        return bool(_chat_templates(checkpoint))
    module = _module_file(checkpoint)
    task = module.get("transformer_task", "feature-extraction")
    wanted = "text-generation" if checkpoint.logit_score else "sequence-classification"
    if task != wanted and not checkpoint.scores_vectors:
        raise StartupError(
            f"{checkpoint.named}: {MODULE_CONFIG} has `transformer_task`: {task!r}; for these modules it must be "
            f"{wanted!r}."
        )
    return "message" in (module.get("modality_config") or {})


def _module_file(checkpoint: Checkpoint) -> dict[str, Any]:
    return read_json(checkpoint.named, checkpoint.folder / MODULE_CONFIG)


def _chat_templates(checkpoint: Checkpoint) -> dict[str, str]:
    return chat_templates(checkpoint.named, checkpoint.folder, checkpoint.tokenizer.arguments)


def _template(checkpoint: Checkpoint) -> ReadTemplate:
    """The chat template that pairs are given to.

    Raises:
        UnfitTemplateError: there is none, or it cannot be used.
    """
    module = _module_file(checkpoint) if checkpoint.library_config else {}
    options = dict(_options(checkpoint, module.get("processing_kwargs") or {}))
    sources = _chat_templates(checkpoint)
    named = options.pop("chat_template", None)
    if named is not None and set(sources) <= {DEFAULT_TEMPLATE}:
        source = str(named)  # a template itself
    elif (source := sources.get(named or DEFAULT_TEMPLATE, "")) == "":
        others = f"; there are {', '.join(sorted(sources))}" if sources else ""
        raise UnfitTemplateError(f"{named or ''} is missing ({TEMPLATE_FILE}, tokenizer_config.json{others})".lstrip())
    form = ((module.get("modality_config") or {}).get("message") or {}).get("format", "auto")
    if form == "auto":
        only_one = sources.get(DEFAULT_TEMPLATE, "") if len(sources) == 1 else ""
        form = "flat" if only_one and not any(part in only_one for part in STRUCTURED) else "structured"
    return read_template(source, _special_tokens(checkpoint), options, structured=form == "structured")


def _options(checkpoint: Checkpoint, arguments: Any) -> Mapping[str, Any]:
    """What `processing_kwargs` gives to the template besides the messages."""
    options: Any = arguments.get("chat_template") or {} if isinstance(arguments, Mapping) else None
    if not isinstance(options, Mapping):
        raise StartupError(
            f"{checkpoint.named}: `processing_kwargs` in {MODULE_CONFIG}, and `chat_template` in it, must be objects."
        )
    others = [f"processing_kwargs.{key}" for key, value in arguments.items() if key != "chat_template" and value]
    others += [f"processing_kwargs.chat_template.{key}" for key in NOT_VARIABLES if key in options]
    if not options.get("restore_suffix", True):
        others.append("processing_kwargs.chat_template.restore_suffix")
    if others:
        raise StartupError(f"{checkpoint.named}: {MODULE_CONFIG} has {', '.join(others)}, which is not supported.")
    return {key: value for key, value in options.items() if key != "restore_suffix"}


def _special_tokens(checkpoint: Checkpoint) -> dict[str, str]:
    """By the names that templates have for them, in the order in which transformers merges the files."""
    named, folder, arguments = checkpoint.named, checkpoint.folder, checkpoint.tokenizer.arguments
    config = read_json(named, folder / "tokenizer_config.json")
    old = {} if "added_tokens_decoder" in {**config, **arguments} else read_json(named, folder / TOKENS_FILE)
    merged = {**config, **{key: value for key, value in arguments.items() if value or key not in old}}
    merged |= {key: value for key, value in old.items() if not arguments.get(key)}
    extra = merged.get("extra_special_tokens")
    tokens = {name: merged.get(name) for name in SPECIAL_TOKENS} | (extra if isinstance(extra, dict) else {})
    texts = {name: token.get("content") if isinstance(token, dict) else token for name, token in tokens.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def check_special_tokens(checkpoint: Checkpoint, tokens: Mapping[str, Any]) -> None:
    """Hold the special tokens that a chat template uses against those of the tokenizer that transformers makes.

    Raises:
        StartupError: the tokenizer has others than the files.
    """
    prompt = rerank_form(checkpoint).prompt
    used = prompt.variables if prompt else ()
    in_files = _special_tokens(checkpoint) if used else {}
    if wrong := [name for name in used if name in tokens and str(tokens[name]) != in_files.get(name)]:
        raise StartupError(
            f"{checkpoint.named}: its chat template uses {', '.join(sorted(wrong))}, which the tokenizer's class names "
            f"otherwise than its files: name it in tokenizer_config.json."
        )
