"""The official OpenAI client against a real server: values, not only statuses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import openai
import pytest

from tests.oracle import st_encode
from tests.servers import RunningServer

TEXTS = ["def add(a, b):\n    return a + b", "Berlin has 3.5 million inhabitants.", ""]


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_embeddings_as_the_client_asks_for_them_by_default(client: openai.OpenAI, minilm_folder: Path) -> None:
    """It asks for base64 and decodes by itself."""
    answer = client.embeddings.create(model="text-embedding-3-small", input=TEXTS)
    cosines = (np.array([entry.embedding for entry in answer.data]) * st_encode(minilm_folder, TEXTS)).sum(axis=1)
    assert cosines.min() > 0.9995
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > 10
    assert [entry.index for entry in answer.data] == [0, 1, 2]


def test_floats_where_floats_are_asked_for(client: openai.OpenAI) -> None:
    by_default = client.embeddings.create(model="m", input=TEXTS).data
    as_floats = client.embeddings.create(model="m", input=TEXTS, encoding_format="float").data
    for default, floats in zip(by_default, as_floats, strict=True):
        assert np.dot(default.embedding, floats.embedding) > 0.9999


def test_models(client: openai.OpenAI) -> None:
    [model] = client.models.list().data
    assert client.models.retrieve(model.id).id == model.id == "sentence-transformers/all-MiniLM-L6-v2"


def test_errors_arrive_as_the_clients_own_exceptions(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.embeddings.create(model="m", input=[])
    assert refused.value.param == "input"
    with pytest.raises(openai.NotFoundError) as missing:
        client.models.retrieve("nope")
    assert missing.value.code == "model_not_found"
