"""litellm, one call with each provider that can be pointed at a server of one's own."""

from __future__ import annotations

from typing import Any

import litellm
import pytest
from given import (
    DOCUMENTS,
    KEY,
    LOCKED_URL,
    LONG_TEXT,
    MODEL,
    QUERY,
    TEXTS,
    TOKENS,
    URL,
    assert_ranking,
    assert_vectors,
)


@pytest.mark.parametrize(
    ("provider", "path"),
    [
        ("openai", "/v1"),
        ("hosted_vllm", "/v1"),
        ("cohere", "/v2/embed"),
        ("jina_ai", "/v1"),
        ("infinity", ""),
        ("voyage", "/v1"),
        ("ollama", ""),
    ],
)
def test_embedding(provider: str, path: str) -> None:
    answer = litellm.embedding(model=f"{provider}/m", input=TEXTS, api_base=URL + path, api_key="none")
    assert_vectors(entry["embedding"] for entry in answer.data)
    assert answer.usage.prompt_tokens == TOKENS


@pytest.mark.parametrize(
    ("provider", "path", "options"),
    [
        ("hosted_vllm", "/v1", {}),
        ("cohere", "", {}),
        ("jina_ai", "/v1", {}),
        # It wants a document as a string where all others on the same path want an object.
        ("infinity", "", {"return_documents": False}),
        ("huggingface", "", {}),
        ("voyage", "/v1", {}),
    ],
)
def test_rerank(provider: str, path: str, options: dict[str, Any]) -> None:
    answer = litellm.rerank(
        model=f"{provider}/m", query=QUERY, documents=DOCUMENTS, top_n=2, api_base=URL + path, api_key="none", **options
    )
    assert_ranking([(result["index"], result["relevance_score"]) for result in answer.results], 2)


def test_errors_are_litellms_own() -> None:
    locked: dict[str, Any] = {"api_base": f"{LOCKED_URL}/v1", "num_retries": 0}
    with pytest.raises(litellm.AuthenticationError):
        litellm.embedding(model=f"openai/{MODEL}", input=TEXTS, api_key="not-the-key", **locked)
    with pytest.raises(litellm.NotFoundError, match="nope"):
        litellm.embedding(model="openai/nope", input=TEXTS, api_key=KEY, **locked)
    with pytest.raises(litellm.BadRequestError, match="maximum context length"):
        litellm.embedding(
            model="openai/m", input=[LONG_TEXT], api_base=f"{URL}/v1", api_key="none", extra_body={"truncate": "NONE"}
        )
