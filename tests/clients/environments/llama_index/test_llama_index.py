"""LlamaIndex's embeddings and rerankers: OpenAI-like, TEI, Cohere, Jina, Ollama."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
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
    URL,
    assert_ranking,
    assert_vectors,
)
from llama_index.core.embeddings import BaseEmbedding
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.embeddings.cohere import CohereEmbedding
from llama_index.embeddings.jinaai import JinaEmbedding
from llama_index.embeddings.ollama import OllamaEmbedding
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.embeddings.text_embeddings_inference import TextEmbeddingsInference
from llama_index.postprocessor.cohere_rerank import CohereRerank
from llama_index.postprocessor.jinaai_rerank import JinaRerank
from llama_index.postprocessor.tei_rerank import TextEmbeddingInference


def _openai_like(**options: Any) -> BaseEmbedding:
    return OpenAILikeEmbedding(**{"model_name": "m", "api_base": f"{URL}/v1", "api_key": "none", **options})


def _jina() -> BaseEmbedding:
    """It does not pass its base URL on."""
    embedding = JinaEmbedding(api_key="none", model="m")
    embedding._api.api_url = f"{URL}/v1/embeddings"
    return embedding


@pytest.mark.parametrize(
    "embedding",
    [
        pytest.param(_openai_like, id="openai_like"),
        pytest.param(lambda: TextEmbeddingsInference(model_name="m", base_url=URL), id="tei"),
        pytest.param(
            lambda: CohereEmbedding(api_key="none", base_url=URL, model_name="embed-english-v3.0"), id="cohere"
        ),
        pytest.param(_jina, id="jina"),
        pytest.param(lambda: OllamaEmbedding(model_name="m", base_url=URL), id="ollama"),
    ],
)
def test_texts_and_queries(embedding: Any) -> None:
    assert_vectors(embedding().get_text_embedding_batch(TEXTS))
    assert_vectors([embedding().get_query_embedding(text) for text in TEXTS])
    assert_vectors(asyncio.run(embedding().aget_text_embedding_batch(TEXTS)))


def test_tei_cuts_what_is_too_long() -> None:
    embedding = TextEmbeddingsInference(model_name="m", base_url=URL)
    assert_vectors([embedding.get_text_embedding(LONG_TEXT)], [LONG_VECTOR])


def test_keys() -> None:
    assert_vectors(
        _openai_like(api_base=f"{LOCKED_URL}/v1", api_key=KEY, model_name=MODEL).get_text_embedding_batch(TEXTS)
    )
    tei = TextEmbeddingsInference(model_name="m", base_url=LOCKED_URL, auth_token=KEY)
    assert_vectors(tei.get_text_embedding_batch(TEXTS))
    with pytest.raises(openai.AuthenticationError):
        _openai_like(api_base=f"{LOCKED_URL}/v1", api_key="not-the-key", model_name=MODEL).get_text_embedding(TEXTS[0])


@pytest.mark.parametrize(
    "reranker",
    [
        pytest.param(lambda: TextEmbeddingInference(base_url=URL, top_n=2), id="tei"),
        pytest.param(lambda: CohereRerank(api_key="none", base_url=URL, model="m", top_n=2), id="cohere"),
        pytest.param(lambda: JinaRerank(api_key="none", base_url=f"{URL}/v1", model="m", top_n=2), id="jina"),
    ],
)
def test_rerankers(reranker: Any) -> None:
    nodes = [NodeWithScore(node=TextNode(text=text, id_=str(index))) for index, text in enumerate(DOCUMENTS)]
    ranked = reranker().postprocess_nodes(nodes, query_str=QUERY)
    assert_ranking([(int(result.node.node_id), result.score) for result in ranked], 2)
