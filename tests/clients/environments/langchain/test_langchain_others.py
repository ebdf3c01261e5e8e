"""LangChain's packages for Cohere, Hugging Face, NVIDIA, Ollama and Voyage."""

from __future__ import annotations

from typing import Any

import pytest
from given import (
    COSINES,
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
from huggingface_hub import InferenceClient
from langchain_cohere import CohereEmbeddings, CohereRerank
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_huggingface import HuggingFaceEndpointEmbeddings
from langchain_nvidia_ai_endpoints import NVIDIAEmbeddings, NVIDIARerank
from langchain_ollama import OllamaEmbeddings

CANDIDATES = [Document(page_content=text) for text in DOCUMENTS]


def _huggingface() -> Embeddings:
    """Its `model` must be a repository, so the server's address goes to the client beneath."""
    embeddings = HuggingFaceEndpointEmbeddings(model="owner/name", huggingfacehub_api_token="none")
    embeddings.client = InferenceClient(model=URL, token="none")
    return embeddings


@pytest.mark.parametrize(
    "embeddings",
    [
        pytest.param(lambda: CohereEmbeddings(cohere_api_key="none", base_url=URL, model="m"), id="cohere"),
        pytest.param(_huggingface, id="huggingface"),
        pytest.param(lambda: NVIDIAEmbeddings(base_url=f"{URL}/v1", model=MODEL), id="nvidia"),
        pytest.param(lambda: OllamaEmbeddings(base_url=URL, model="m"), id="ollama"),
    ],
)
def test_documents_and_queries(embeddings: Any) -> None:
    assert_vectors(embeddings().embed_documents(TEXTS))
    assert_vectors([embeddings().embed_query(text) for text in TEXTS])


def test_cohere_rerank() -> None:
    results = CohereRerank(cohere_api_key="none", base_url=URL, model="m", top_n=2).rerank(DOCUMENTS, QUERY)
    assert_ranking([(result["index"], result["relevance_score"]) for result in results], 2)


def test_nvidia_finds_the_model_by_itself() -> None:
    with pytest.warns(UserWarning, match="Default model"):
        embeddings = NVIDIAEmbeddings(base_url=f"{URL}/v1")
    assert embeddings.model == MODEL
    assert MODEL in {model.id for model in embeddings.available_models}


def test_nvidia_refuses_what_is_too_long_unless_it_may_be_cut() -> None:
    with pytest.raises(Exception, match="maximum context length"):
        NVIDIAEmbeddings(base_url=f"{URL}/v1", model=MODEL).embed_query(LONG_TEXT)
    cut = NVIDIAEmbeddings(base_url=f"{URL}/v1", model=MODEL, truncate="END")
    assert_vectors([cut.embed_query(LONG_TEXT)], [LONG_VECTOR])


def test_nvidia_rerank() -> None:
    """Its scores are logits, for which an embedding model has cosines."""
    reranker = NVIDIARerank(base_url=f"{URL}/v1", model=MODEL, top_n=2)
    documents = reranker.compress_documents(CANDIDATES, QUERY)
    pairs = [(DOCUMENTS.index(document.page_content), document.metadata["relevance_score"]) for document in documents]
    assert_ranking(pairs, 2, right=COSINES)


def test_nvidia_with_a_key() -> None:
    assert_vectors(NVIDIAEmbeddings(base_url=f"{LOCKED_URL}/v1", model=MODEL, api_key=KEY).embed_documents(TEXTS))
    with pytest.raises(Exception, match="401"):
        NVIDIAEmbeddings(base_url=f"{LOCKED_URL}/v1", model=MODEL, api_key="not-the-key").embed_documents(TEXTS)
