"""cohere, its clients of both API versions; 5 in some environments, 7 in others."""

from __future__ import annotations

from collections.abc import Iterator

import cohere
import pytest
from given import (
    DOCUMENTS,
    KEY,
    LOCKED_URL,
    LONG_TEXT,
    LONG_VECTOR,
    MODEL,
    QUERY,
    TEXTS,
    TOKENS,
    URL,
    VECTORS,
    assert_ranking,
    assert_signs,
    assert_vectors,
    cosine,
)


@pytest.fixture
def v1() -> Iterator[cohere.Client]:
    with cohere.Client(api_key="none", base_url=URL) as client:
        yield client


@pytest.fixture
def v2() -> Iterator[cohere.ClientV2]:
    with cohere.ClientV2(api_key="none", base_url=URL) as client:
        yield client


def test_v1_embed_answers_a_bare_list(v1: cohere.Client) -> None:
    answer = v1.embed(texts=TEXTS, model="m", input_type="search_query")
    assert answer.response_type == "embeddings_floats"
    assert_vectors(answer.embeddings)
    assert answer.meta.billed_units.input_tokens == TOKENS


def test_v1_embed_by_type(v1: cohere.Client) -> None:
    answer = v1.embed(texts=TEXTS, model="m", input_type="search_document", embedding_types=["float", "int8"])
    assert answer.response_type == "embeddings_by_type"
    assert_vectors(answer.embeddings.float_)
    _assert_int8(answer.embeddings.int8)


def test_v1_rerank_with_documents(v1: cohere.Client) -> None:
    answer = v1.rerank(model="m", query=QUERY, documents=DOCUMENTS, top_n=2, return_documents=True)
    assert_ranking([(result.index, result.relevance_score) for result in answer.results], 2)
    assert [result.document.text for result in answer.results] == [DOCUMENTS[result.index] for result in answer.results]


def test_v2_embed(v2: cohere.ClientV2) -> None:
    answer = v2.embed(texts=TEXTS, model="m", input_type="search_query", embedding_types=["float"])
    assert_vectors(answer.embeddings.float_)
    assert answer.texts == TEXTS
    assert answer.meta.billed_units.input_tokens == TOKENS


def test_v2_embed_without_types_answers_floats(v2: cohere.ClientV2) -> None:
    assert_vectors(v2.embed(texts=TEXTS, model="m", input_type="search_document").embeddings.float_)


def test_v2_embed_in_every_type(v2: cohere.ClientV2) -> None:
    types = ["float", "int8", "uint8", "binary", "ubinary"]
    embeddings = v2.embed(texts=TEXTS, model="m", input_type="search_document", embedding_types=types).embeddings
    assert_vectors(embeddings.float_)
    _assert_int8(embeddings.int8)
    _assert_int8([[value - 128 for value in row] for row in embeddings.uint8])
    assert_signs(embeddings.binary, signed=True)
    assert_signs(embeddings.ubinary, signed=False)


def test_v2_rerank(v2: cohere.ClientV2) -> None:
    answer = v2.rerank(model="m", query=QUERY, documents=DOCUMENTS)
    assert_ranking((result.index, result.relevance_score) for result in answer.results)
    assert answer.meta.billed_units.search_units == 1
    best = v2.rerank(model="m", query=QUERY, documents=DOCUMENTS, top_n=2)
    assert_ranking([(result.index, result.relevance_score) for result in best.results], 2)


def test_what_is_too_long_is_cut_or_refused(v2: cohere.ClientV2) -> None:
    cut = v2.embed(texts=[LONG_TEXT], model="m", input_type="search_document", truncate="END")
    assert_vectors(cut.embeddings.float_, [LONG_VECTOR])
    with pytest.raises(cohere.BadRequestError, match="maximum context length"):
        v2.embed(texts=[LONG_TEXT], model="m", input_type="search_document", truncate="NONE")


def test_a_key_and_a_strict_model() -> None:
    with cohere.ClientV2(api_key=KEY, base_url=LOCKED_URL) as client:
        assert_vectors(client.embed(texts=TEXTS, model=MODEL, input_type="search_query").embeddings.float_)
        with pytest.raises(cohere.NotFoundError) as missing:
            client.rerank(model="rerank-none", query=QUERY, documents=DOCUMENTS)
        assert "rerank-none" in missing.value.body["message"]
    with cohere.ClientV2(api_key="not-the-key", base_url=LOCKED_URL) as client:
        with pytest.raises(cohere.UnauthorizedError) as refused:
            client.embed(texts=TEXTS, model=MODEL, input_type="search_query")
        assert refused.value.body["message"]


def _assert_int8(rows: list[list[int]]) -> None:
    for row, vector in zip(rows, VECTORS, strict=True):
        assert all(-128 <= value <= 127 for value in row)
        assert cosine(row, vector) > 0.99
        assert all(value * right >= 0 for value, right in zip(row, vector, strict=True))
