"""From a loaded model's card and files to what serves its requests."""

from __future__ import annotations

from collections.abc import Iterable

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
from vecmill.models.text_format import text_format


def assemble(
    loaded: Iterable[tuple[str, ModelCard, Checkpoint]], settings: InferenceSettings, threads: WorkerThreads
) -> ServedModels:
    """Read every tokenizer. `loaded` are the scheduler's key, the card and the files of each model.

    Raises:
        StartupError: a tokenizer is not that of its model.
    """
    if settings.token_ids is TokenVocabulary.CL100K:
        cl100k()  # not with the first request that needs it: reading it holds the interpreter
    embedders, rerankers = [], []
    for key, card, checkpoint in loaded:
        if card.task is Task.EMBED:
            tokenizer = _text_tokenizer(card, checkpoint, threads)
            embedders.append(ServedEmbedder(key, card, tokenizer, model_fingerprint(card)))
        else:
            rerankers.append(ServedReranker(key, card, _pair_tokenizer(card, checkpoint, settings, threads)))
    return ServedModels(embedders, rerankers, strict=settings.strict_model)


def _pool(
    card: ModelCard, checkpoint: Checkpoint, threads: WorkerThreads, *, control_tokens: bool = True
) -> TokenizerPool:
    return TokenizerPool(
        checkpoint.tokenizer_file, card.vocab_size, card.max_model_len, threads, control_tokens=control_tokens
    )


def _text_tokenizer(card: ModelCard, checkpoint: Checkpoint, threads: WorkerThreads) -> TextTokenizer:
    pool = _pool(card, checkpoint, threads)
    return TextTokenizer(pool, text_format(checkpoint), card.max_model_len, card.vocab_size)


def _pair_tokenizer(
    card: ModelCard, checkpoint: Checkpoint, settings: InferenceSettings, threads: WorkerThreads
) -> PairTokenizer:
    pool = _pool(card, checkpoint, threads, control_tokens=settings.allow_control_tokens)
    form = rerank_form(checkpoint)
    default = None if card.default_prompt_name is None else card.prompts.get(card.default_prompt_name)
    padding = padding_token(checkpoint)
    if form.prompt is None:
        return CrossEncoderTokenizer(pool, card.max_model_len, default or "", padding)
    control = pool if settings.allow_control_tokens else _pool(card, checkpoint, threads)
    try:
        return InstructTokenizer(pool, control, card.max_model_len, form.prompt, default, padding)
    except UnfitTemplateError as error:
        raise StartupError(f"{checkpoint.named}: its chat template {error}.") from None
