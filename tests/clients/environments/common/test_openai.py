"""openai, whose major versions differ between the environments."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import openai
import pytest
from given import (
    KEY,
    LOCKED_URL,
    LONG_TEXT,
    LONG_VECTOR,
    MODEL,
    TEXTS,
    TOKENS,
    URL,
    VECTORS,
    assert_vectors,
)


@pytest.fixture
def client() -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def locked() -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{LOCKED_URL}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def test_base64_as_the_client_asks_for_by_default(client: openai.OpenAI) -> None:
    answer = client.embeddings.create(model="text-embedding-3-small", input=TEXTS)
    assert_vectors(entry.embedding for entry in answer.data)
    assert [entry.index for entry in answer.data] == list(range(len(TEXTS)))
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == TOKENS
    assert answer.model == MODEL


def test_floats_and_the_fields_of_others(client: openai.OpenAI) -> None:
    answer = client.embeddings.create(
        model="m",
        input=TEXTS,
        encoding_format="float",
        dimensions=len(VECTORS[0]),
        user="someone",
        extra_body={"input_type": "query", "drop_params": True},
    )
    assert_vectors(entry.embedding for entry in answer.data)


def test_one_text(client: openai.OpenAI) -> None:
    assert_vectors([client.embeddings.create(model="m", input=TEXTS[1]).data[0].embedding], [VECTORS[1]])


def test_several_clients_at_once() -> None:
    async def embed_each() -> list[list[float]]:
        async with openai.AsyncOpenAI(base_url=f"{URL}/v1", api_key="none") as client:
            answers = await asyncio.gather(*(client.embeddings.create(model="m", input=text) for text in TEXTS))
            return [answer.data[0].embedding for answer in answers]

    assert_vectors(asyncio.run(embed_each()))


def test_what_is_too_long_is_cut_or_refused(client: openai.OpenAI) -> None:
    cut = client.embeddings.create(model="m", input=LONG_TEXT, extra_body={"truncate": True})
    assert_vectors([cut.data[0].embedding], [LONG_VECTOR])
    with pytest.raises(openai.BadRequestError, match="maximum context length") as refused:
        client.embeddings.create(model="m", input=LONG_TEXT, extra_body={"truncate": "NONE"})
    assert refused.value.code == "context_length_exceeded"


def test_dimensions_that_the_model_does_not_have(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="384") as refused:
        client.embeddings.create(model="m", input=TEXTS, dimensions=256)
    assert refused.value.param == "dimensions"


def test_models(client: openai.OpenAI) -> None:
    [model] = client.models.list().data
    assert client.models.retrieve(model.id).id == model.id == MODEL
    with pytest.raises(openai.NotFoundError) as missing:
        client.models.retrieve("nope")
    assert missing.value.code == "model_not_found"


def test_a_key_and_a_strict_model(locked: openai.OpenAI) -> None:
    answer = locked.embeddings.create(model=MODEL, input=TEXTS)
    assert_vectors(entry.embedding for entry in answer.data)
    with pytest.raises(openai.NotFoundError, match="gpt-none") as missing:
        locked.embeddings.create(model="gpt-none", input=TEXTS)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError) as refused:
        locked.with_options(api_key="not-the-key").embeddings.create(model=MODEL, input=TEXTS)
    assert "not-the-key" not in str(refused.value)
