"""Haystack's embedders and rankers: OpenAI, Hugging Face (TEI), Cohere, Jina."""

from __future__ import annotations

import asyncio

from given import DOCUMENTS, QUERY, TEXTS, TOKENS, URL, VECTORS, assert_ranking, assert_vectors
from haystack import Document
from haystack.components.embedders import OpenAIDocumentEmbedder, OpenAITextEmbedder
from haystack.utils import Secret
from haystack_integrations.components.embedders.cohere import CohereDocumentEmbedder, CohereTextEmbedder
from haystack_integrations.components.embedders.huggingface_api import (
    HuggingFaceAPIDocumentEmbedder,
    HuggingFaceAPITextEmbedder,
)
from haystack_integrations.components.rankers.cohere import CohereRanker
from haystack_integrations.components.rankers.huggingface_api import HuggingFaceTEIRanker
from haystack_integrations.components.rankers.jina import JinaRanker

NO_KEY = Secret.from_token("none")
CANDIDATES = [Document(content=text) for text in DOCUMENTS]


def _documents() -> list[Document]:
    return [Document(content=text) for text in TEXTS]


def _pairs(documents: list[Document]) -> list[tuple[int, float]]:
    return [(DOCUMENTS.index(document.content), document.score) for document in documents]


def test_openai_documents() -> None:
    embedder = OpenAIDocumentEmbedder(api_base_url=f"{URL}/v1", api_key=NO_KEY, model="m", progress_bar=False)
    answer = embedder.run(_documents())
    assert_vectors(document.embedding for document in answer["documents"])
    assert answer["meta"]["usage"] == {"prompt_tokens": TOKENS, "total_tokens": TOKENS}
    later = asyncio.run(embedder.run_async(_documents()))
    assert_vectors(document.embedding for document in later["documents"])


def test_openai_text() -> None:
    embedder = OpenAITextEmbedder(api_base_url=f"{URL}/v1", api_key=NO_KEY, model="m")
    assert_vectors([embedder.run(TEXTS[1])["embedding"]], [VECTORS[1]])


def test_huggingface_documents() -> None:
    """It asks for `normalize: false`."""
    embedder = HuggingFaceAPIDocumentEmbedder(
        api_type="text_embeddings_inference", api_params={"url": URL}, token=NO_KEY, progress_bar=False
    )
    assert_vectors((document.embedding for document in embedder.run(_documents())["documents"]), normalized=False)


def test_huggingface_text() -> None:
    embedder = HuggingFaceAPITextEmbedder(
        api_type="text_embeddings_inference", api_params={"url": URL}, token=NO_KEY, normalize=True
    )
    assert_vectors([embedder.run(TEXTS[2])["embedding"]], [VECTORS[2]])


def test_tei_ranker() -> None:
    ranker = HuggingFaceTEIRanker(url=URL, top_k=2, token=NO_KEY)
    assert_ranking(_pairs(ranker.run(QUERY, CANDIDATES)["documents"]), 2)


def test_cohere() -> None:
    options = {"api_base_url": URL, "api_key": NO_KEY, "model": "m"}
    documents = CohereDocumentEmbedder(**options, progress_bar=False).run(_documents())["documents"]
    assert_vectors(document.embedding for document in documents)
    assert_vectors([CohereTextEmbedder(**options).run(TEXTS[0])["embedding"]], VECTORS[:1])
    assert_ranking(_pairs(CohereRanker(**options, top_k=2).run(QUERY, CANDIDATES)["documents"]), 2)


def test_jina_ranker() -> None:
    """Its base_url is the whole address."""
    ranker = JinaRanker(base_url=f"{URL}/v1/rerank", api_key=NO_KEY, model="m", top_k=2)
    assert_ranking(_pairs(ranker.run(QUERY, CANDIDATES)["documents"]), 2)
