"""ollama, voyageai, infinity-client and tei-client by themselves."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import ollama
import pytest
import tei_client
import voyageai
from given import (
    DOCUMENTS,
    KEY,
    LOCKED_URL,
    LONG_TEXT,
    LONG_VECTOR,
    MODEL,
    QUERY,
    RERANK_TOKENS,
    TEXTS,
    TOKENS,
    URL,
    VECTORS,
    assert_ranking,
    assert_vectors,
)
from infinity_client.api.default import embeddings as infinity_embeddings
from infinity_client.api.default import models as infinity_models
from infinity_client.api.default import rerank as infinity_rerank
from infinity_client.client import Client as InfinityClient
from infinity_client.models import OpenAIEmbeddingInputText, RerankInput
from voyageai.error import AuthenticationError, InvalidRequestError


def test_ollama_embed() -> None:
    client = ollama.Client(host=URL)
    answer = client.embed(model="m", input=TEXTS)
    assert_vectors(answer.embeddings)
    assert answer.prompt_eval_count == TOKENS
    assert_vectors(client.embed(model="m", input=TEXTS[0], keep_alive="5m").embeddings, VECTORS[:1])


def test_ollama_embeddings_of_one_prompt() -> None:
    """Ollama's older call does not normalise, and clients that want unit vectors divide by the length."""
    answer = ollama.Client(host=URL).embeddings(model="m", prompt=TEXTS[1])
    assert_vectors([answer.embedding], [VECTORS[1]], normalized=False)


def test_ollama_cuts_or_refuses_what_is_too_long() -> None:
    client = ollama.Client(host=URL)
    assert_vectors(client.embed(model="m", input=LONG_TEXT, truncate=True).embeddings, [LONG_VECTOR])
    with pytest.raises(ollama.ResponseError, match="maximum context length") as refused:
        client.embed(model="m", input=LONG_TEXT, truncate=False)
    assert refused.value.status_code == 400


def test_ollama_lists_and_shows_the_model() -> None:
    client = ollama.Client(host=URL)
    [listed] = client.list().models
    assert MODEL in listed.model
    assert "embedding" in client.show(listed.model).capabilities


def test_ollama_with_a_key_and_a_strict_model() -> None:
    client = ollama.Client(host=LOCKED_URL, headers={"Authorization": f"Bearer {KEY}"})
    assert_vectors(client.embed(model=MODEL, input=TEXTS).embeddings)
    with pytest.raises(ollama.ResponseError, match="nope") as missing:
        client.embed(model="nope", input=TEXTS)
    assert missing.value.status_code == 404
    with pytest.raises(ollama.ResponseError) as refused:
        ollama.Client(host=LOCKED_URL).embed(model=MODEL, input=TEXTS)
    assert refused.value.status_code == 401


@pytest.fixture
def voyage() -> voyageai.Client:
    return voyageai.Client(api_key="none", base_url=f"{URL}/v1")


@pytest.mark.parametrize("input_type", [None, "query", "document"])
def test_voyage_embed(voyage: voyageai.Client, input_type: str | None) -> None:
    answer = voyage.embed(TEXTS, model="m", input_type=input_type)
    assert_vectors(answer.embeddings)
    assert answer.total_tokens == TOKENS


def test_voyage_embed_with_options(voyage: voyageai.Client) -> None:
    assert_vectors(voyage.embed(TEXTS, model="m", truncation=False, output_dimension=len(VECTORS[0])).embeddings)
    assert_vectors(voyage.embed([LONG_TEXT], model="m").embeddings, [LONG_VECTOR])
    with pytest.raises(InvalidRequestError, match="maximum context length"):
        voyage.embed([LONG_TEXT], model="m", truncation=False)


def test_voyage_rerank(voyage: voyageai.Client) -> None:
    answer = voyage.rerank(QUERY, DOCUMENTS, model="m", top_k=2)
    assert_ranking([(result.index, result.relevance_score) for result in answer.results], 2)
    assert answer.results[0].document == DOCUMENTS[answer.results[0].index]
    assert answer.total_tokens == RERANK_TOKENS


def test_voyage_rerank_of_all(voyage: voyageai.Client) -> None:
    answer = voyage.rerank(QUERY, DOCUMENTS, model="m")
    assert_ranking((result.index, result.relevance_score) for result in answer.results)


def test_voyage_with_a_wrong_key() -> None:
    with pytest.raises(AuthenticationError):
        voyageai.Client(api_key="not-the-key", base_url=f"{LOCKED_URL}/v1").embed(TEXTS, model=MODEL)


@pytest.fixture
def infinity() -> Iterator[InfinityClient]:
    with InfinityClient(base_url=URL) as client:
        yield client


def test_infinity_embeddings(infinity: InfinityClient) -> None:
    answer = infinity_embeddings.sync(client=infinity, body=OpenAIEmbeddingInputText(input_=TEXTS, model="m"))
    assert_vectors(entry.embedding for entry in answer.data)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == TOKENS


def test_infinity_rerank(infinity: InfinityClient) -> None:
    answer = infinity_rerank.sync(
        client=infinity, body=RerankInput(query=QUERY, documents=DOCUMENTS, top_n=2, return_documents=False)
    )
    assert_ranking([(result.index, result.relevance_score) for result in answer.results], 2)
    assert answer.usage.total_tokens == RERANK_TOKENS


def test_infinity_models(infinity: InfinityClient) -> None:
    [model] = infinity_models.sync(client=infinity).data
    assert model.id == MODEL


@pytest.fixture
def tei() -> tei_client.HttpClient:
    return tei_client.HttpClient(URL)


def test_tei_embed(tei: tei_client.HttpClient) -> None:
    assert tei.info().max_input_length == 256
    assert_vectors(tei.embed(TEXTS))
    assert_vectors(tei.embed(TEXTS[0]), VECTORS[:1])
    assert_vectors(asyncio.run(tei.async_embed(TEXTS)))
    assert_vectors(tei.embed(LONG_TEXT, truncate=True), [LONG_VECTOR])
