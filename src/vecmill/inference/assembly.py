"""From a loaded model's card and files to what serves its requests."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from vecmill.cache.key import model_fingerprint
from vecmill.config import InferenceSettings
from vecmill.core.errors import StartupError
from vecmill.core.threads import WorkerThreads
from vecmill.core.types import ModelCard, Task, TokenVocabulary
from vecmill.inference.pairs import CrossEncoderTokenizer, InstructTokenizer, PairTokenizer
from vecmill.inference.served import ServedEmbedder, ServedModels, ServedReranker
from vecmill.inference.token_ids import cl100k
from vecmill.inference.tokenization import TextTokenizer
from vecmill.inference.tokenizer_pool import TokenizerPool
from vecmill.models.chat_template import UnfitTemplateError
from vecmill.models.checkpoint import Checkpoint
from vecmill.models.rerank_prompt import padding_token, rerank_form
from vecmill.models.tokenizer_files import ReadTokenizer


def assemble(
    loaded: Iterable[tuple[str, ModelCard, Checkpoint, ReadTokenizer]],
    settings: InferenceSettings,
    threads: WorkerThreads,
) -> ServedModels:
    """Ready every tokenizer. `loaded` are the scheduler's key, the card, the files and the tokenizer of each model.

    Raises:
        StartupError: a tokenizer is not that of its model.
    """
    if settings.token_ids is TokenVocabulary.CL100K:
        cl100k()  # not with the first request that needs it: reading it holds the interpreter
    embedders, rerankers = [], []
    for key, card, checkpoint, read in loaded:
        if card.task is Task.EMBED:
            tokenizer = _text_tokenizer(card, checkpoint, read, threads)
            embedders.append(ServedEmbedder(key, card, tokenizer, model_fingerprint(card)))
        else:
            rerankers.append(ServedReranker(key, card, _pair_tokenizer(card, checkpoint, read, settings, threads)))
    return ServedModels(embedders, rerankers, strict=settings.strict_model)


def _text_tokenizer(
    card: ModelCard, checkpoint: Checkpoint, read: ReadTokenizer, threads: WorkerThreads
) -> TextTokenizer:
    pool = TokenizerPool(read, card.vocab_size, card.max_model_len, threads)
    return TextTokenizer(pool, checkpoint.text_format, card.max_model_len, card.vocab_size)


def _pair_tokenizer(
    card: ModelCard,
    checkpoint: Checkpoint,
    read: ReadTokenizer,
    settings: InferenceSettings,
    threads: WorkerThreads,
) -> PairTokenizer:
    form = rerank_form(checkpoint)
    make = partial(TokenizerPool, read, card.vocab_size, card.max_model_len, threads)
    pool = make(control_tokens=settings.allow_control_tokens, prompt=form.prompt.fixed_text if form.prompt else "")
    default = None if card.default_prompt_name is None else card.prompts.get(card.default_prompt_name)
    padding = padding_token(checkpoint)
    if form.prompt is None:
        return CrossEncoderTokenizer(pool, card.max_model_len, default or "", padding)
    control = pool if settings.allow_control_tokens else make()
    try:
        return InstructTokenizer(pool, control, card.max_model_len, form.prompt, default, padding)
    except UnfitTemplateError as error:
        raise StartupError(f"{checkpoint.named}: its chat template {error}.") from None
