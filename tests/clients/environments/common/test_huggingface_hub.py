"""huggingface_hub's InferenceClient, which posts to whatever address it is given: TEI's `/` and `/embed`."""

from __future__ import annotations

import asyncio

import pytest
from given import KEY, LOCKED_URL, LONG_TEXT, LONG_VECTOR, TEXTS, URL, VECTORS, assert_vectors, cosine
from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import HfHubHTTPError


@pytest.mark.parametrize("path", ["", "/embed"])
def test_feature_extraction(path: str) -> None:
    client = InferenceClient(model=URL + path, token="none")
    assert_vectors(client.feature_extraction(TEXTS))
    assert_vectors(client.feature_extraction(TEXTS[2]), [VECTORS[2]])


def test_feature_extraction_with_options() -> None:
    client = InferenceClient(model=f"{URL}/embed", token="none")
    assert_vectors(client.feature_extraction(LONG_TEXT, normalize=True, truncate=True), [LONG_VECTOR])
    assert_vectors(client.feature_extraction(TEXTS, normalize=False), normalized=False)


def test_asynchronously() -> None:
    client = AsyncInferenceClient(model=URL, token="none")
    assert_vectors(asyncio.run(client.feature_extraction(TEXTS)))


def test_sentence_similarity() -> None:
    scores = InferenceClient(model=URL, token="none").sentence_similarity(TEXTS[0], other_sentences=TEXTS[1:])
    assert scores == pytest.approx([cosine(VECTORS[0], vector) for vector in VECTORS[1:]], abs=1e-4)


def test_what_is_too_long_is_refused() -> None:
    with pytest.raises(HfHubHTTPError, match="maximum context length"):
        InferenceClient(model=f"{URL}/embed", token="none").feature_extraction(LONG_TEXT, truncate=False)


def test_a_key() -> None:
    assert_vectors(InferenceClient(model=LOCKED_URL, token=KEY).feature_extraction(TEXTS))
    with pytest.raises(HfHubHTTPError) as refused:
        InferenceClient(model=LOCKED_URL, token="not-the-key").feature_extraction(TEXTS)
    assert refused.value.response.status_code == 401
