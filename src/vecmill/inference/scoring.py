"""Queries and documents to rows and back to scores: by a reranker, or by how similar an embedder's vectors are."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby

import numpy as np

from vecmill.core.types import PromptChoice, ScoreRequest, ScoreResult, Truncation
from vecmill.inference.cache_lookup import Recall, Recalled
from vecmill.inference.cost import PAIR_TOKENS, entries, estimate, result_bytes
from vecmill.inference.finish import logit_to_relevance, similarities, similarity_to_relevance
from vecmill.inference.models import ServedEmbedder, ServedReranker
from vecmill.inference.pair_tokenizer import PairLimits, PairTokenizer
from vecmill.inference.prompts import choose_prompt
from vecmill.inference.schedule import Ran
from vecmill.inference.text_tokenizer import Tokenized


def cost(model: ServedEmbedder | ServedReranker, request: ScoreRequest) -> tuple[int, int]:
    """Tokens and bytes that a request will take, about."""
    if isinstance(model, ServedReranker):
        around = max(map(len, request.queries), default=0) + len(request.instruction or "") + PAIR_TOKENS
        return estimate(model.card, request.documents, around), 0
    query_prompt, document_prompt = _prompts(model, request)
    texts = [*request.queries, *request.documents]
    return estimate(model.card, texts, max(len(query_prompt), len(document_prompt))), result_bytes(
        model.card, len(texts)
    )


async def tokenize_pairs(tokenizer: PairTokenizer, request: ScoreRequest) -> list[Tokenized]:
    """One row for each document; documents that have a query in common are tokenized together."""
    limits = PairLimits(
        request.truncation.side,
        request.max_tokens_per_query,
        request.max_tokens_per_document,
        request.truncation.max_tokens,
        refuse=request.truncation.allowed is False,
    )
    if len(request.queries) == 1:
        return await tokenizer.encode(request.queries[0], request.documents, request.instruction, limits)
    pairs = zip(request.queries, request.documents, strict=True)
    groups = [(query, [document for _, document in group]) for query, group in groupby(pairs, key=lambda pair: pair[0])]
    done = await asyncio.gather(
        *(tokenizer.encode(query, documents, request.instruction, limits) for query, documents in groups)
    )
    return [one for group in done for one in group]


async def tokenize_apart(
    model: ServedEmbedder, request: ScoreRequest, of_query: Recall | None = None, of_document: Recall | None = None
) -> list[Tokenized | Recalled]:
    """A row for each query, then one for each document, or the vectors that were kept of them."""
    query_prompt, document_prompt = _prompts(model, request)
    own_side = replace(request.truncation, side=None)
    query = await _limited(model, own_side, request.max_tokens_per_query, query_prompt)
    document = await _limited(model, request.truncation, request.max_tokens_per_document, document_prompt)
    return [
        *await tokenize_texts(model, request.queries, query_prompt, query, of_query),
        *await tokenize_texts(model, request.documents, document_prompt, document, of_document),
    ]


async def tokenize_texts(
    model: ServedEmbedder, texts: Sequence[str], prompt: str, truncation: Truncation, recall: Recall | None
) -> list[Tokenized | Recalled]:
    """A row for each text, or the vector that was kept of it.

    Raises:
        InvalidInput: the request's limit leaves no room for any text.
    """
    encode = await model.tokenizer.encoder(prompt, truncation)
    if recall is None:
        return [*await model.tokenizer.pool.map(encode, texts)]
    return await model.tokenizer.pool.map(recall.of_texts(encode, prompt, truncation), texts)


async def _limited(model: ServedEmbedder, whole: Truncation, most: int | None, prompt: str) -> Truncation:
    """The narrower of two limits: of the whole row, and of the text without what goes around it."""
    if most is None:
        return whole
    [before] = await model.tokenizer.pool.encode_batch([prompt])
    tokens = most + len(before) + model.tokenizer.special_tokens
    if whole.max_tokens is not None and whole.max_tokens <= tokens:
        return whole
    return replace(whole, allowed=True, max_tokens=tokens)


def _prompts(model: ServedEmbedder, request: ScoreRequest) -> tuple[str, str]:
    query = choose_prompt(model.card, PromptChoice(is_query=True, instruction=request.instruction))
    return query, choose_prompt(model.card, PromptChoice(is_query=False))


def names_apart(request: ScoreRequest) -> Callable[[int], str]:
    """What the client calls the text of each row of `tokenize_apart`."""
    queries = len(request.queries)
    query = entries(request.query_param) if queries > 1 else lambda index: request.query_param
    document = entries(request.param)
    return lambda index: query(index) if index < queries else document(index - queries)


def score_result(model: ServedEmbedder | ServedReranker, request: ScoreRequest, ran: Ran) -> ScoreResult:
    """Scores from what the model gave for the rows."""
    rows = np.stack(ran.rows)
    if isinstance(model, ServedReranker):
        logits = rows[:, 0].astype(np.float64)
        scores = logits if request.raw_scores else logit_to_relevance(logits)
        return ScoreResult(scores, model.card.id, "cross_encoder", ran.prompt_tokens, ran.truncated, ran.timings)
    queries = len(request.queries)
    found = similarities(model.card, rows[:queries], rows[queries:])
    scores = found if request.raw_scores else similarity_to_relevance(model.card, found)
    truncated = tuple(index - queries for index in ran.truncated if index >= queries)
    method = model.card.similarity
    return ScoreResult(scores, model.card.id, method, ran.prompt_tokens, truncated, ran.timings, ran.told_tokens)
