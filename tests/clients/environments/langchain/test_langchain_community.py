"""langchain-community's clients of Infinity and Jina; the latter have their addresses as constants."""

from __future__ import annotations

import pytest
from given import DOCUMENTS, KEY, LOCKED_URL, MODEL, QUERY, TEXTS, URL, assert_ranking, assert_vectors
from infinity_client.client import Client
from langchain_community.document_compressors import infinity_rerank, jina_rerank
from langchain_community.embeddings import InfinityEmbeddings, jina
from langchain_core.documents import Document

CANDIDATES = [Document(page_content=text) for text in DOCUMENTS]


def _pairs(documents: list[Document]) -> list[tuple[int, float]]:
    return [(DOCUMENTS.index(document.page_content), document.metadata["relevance_score"]) for document in documents]


def test_infinity_embeddings() -> None:
    embeddings = InfinityEmbeddings(model="m", infinity_api_url=URL)
    assert_vectors(embeddings.embed_documents(TEXTS))
    assert_vectors([embeddings.embed_query(text) for text in TEXTS])


def test_infinity_rerank() -> None:
    compressor = infinity_rerank.InfinityRerank(client=Client(base_url=URL), model="m", top_n=2)
    assert_ranking(_pairs(compressor.compress_documents(CANDIDATES, QUERY)), 2)


def test_jina_embeddings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jina, "JINA_API_URL", f"{URL}/v1/embeddings")
    embeddings = jina.JinaEmbeddings(jina_api_key="none", model_name="m")
    assert_vectors(embeddings.embed_documents(TEXTS))
    assert_vectors([embeddings.embed_query(text) for text in TEXTS])


def test_jina_rerank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jina_rerank, "JINA_API_URL", f"{URL}/v1/rerank")
    compressor = jina_rerank.JinaRerank(jina_api_key="none", model="m", top_n=2)
    assert_ranking(_pairs(compressor.compress_documents(CANDIDATES, QUERY)), 2)


def test_jina_says_what_was_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """It raises the `detail` of an answer that is no result."""
    monkeypatch.setattr(jina, "JINA_API_URL", f"{LOCKED_URL}/v1/embeddings")
    monkeypatch.setattr(jina_rerank, "JINA_API_URL", f"{LOCKED_URL}/v1/rerank")
    with pytest.raises(RuntimeError, match="key"):
        jina.JinaEmbeddings(jina_api_key="not-the-key", model_name=MODEL).embed_documents(TEXTS)
    with pytest.raises(RuntimeError, match="nope"):
        jina_rerank.JinaRerank(jina_api_key=KEY, model="nope").compress_documents(CANDIDATES, QUERY)
