"""POST /v1/embeddings and POST /embed: the shapes in, the vectors out, and that they are the right ones."""

from __future__ import annotations

import base64
from pathlib import Path

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from tokenizers import Tokenizer

from tests.oracle import st_encode

TEXTS = [
    "def add(a, b):\n    return a + b",
    "",
    "Berlin has 3.5 million inhabitants.",
    "word " * 600,
    "naïve café 你好 😀 \x00 tail",
    "x",
]


def vectors(response: httpx.Response) -> NDArray[np.float32]:
    assert response.status_code == 200, response.text
    return np.array([entry["embedding"] for entry in response.json()["data"]], dtype=np.float32)


async def test_vectors_equal_sentence_transformers(client: httpx.AsyncClient, minilm_folder: Path) -> None:
    actual = vectors(await client.post("/v1/embeddings", json={"input": TEXTS}))
    np.testing.assert_allclose(actual, st_encode(minilm_folder, TEXTS), atol=1e-5)


async def test_embed_gives_a_bare_list_of_the_same_vectors(client: httpx.AsyncClient) -> None:
    openai = vectors(await client.post("/v1/embeddings", json={"input": TEXTS}))
    tei = (await client.post("/embed", json={"inputs": TEXTS, "is_query": False})).json()
    np.testing.assert_allclose(np.array(tei), openai, atol=1e-6)


@pytest.mark.parametrize("inputs", ["one text", ["one text"]])
async def test_a_string_is_a_list_of_one(client: httpx.AsyncClient, inputs: object) -> None:
    assert len((await client.post("/embed", json={"inputs": inputs})).json()) == 1
    assert len((await client.post("/v1/embeddings", json={"input": inputs})).json()["data"]) == 1


async def test_token_ids_with_or_without_special_tokens_are_the_text(
    client: httpx.AsyncClient, minilm_folder: Path
) -> None:
    tokenizer = Tokenizer.from_file(str(minilm_folder / "tokenizer.json"))
    tokenizer.no_padding()
    text = "parse an ISO 8601 date"
    whole = tokenizer.encode(text).ids
    bare = tokenizer.encode(text, add_special_tokens=False).ids
    wanted = vectors(await client.post("/v1/embeddings", json={"input": text}))[0]
    for response in (
        await client.post("/v1/embeddings", json={"input": whole}),
        await client.post("/v1/embeddings", json={"input": [bare, whole]}),
    ):
        for vector in vectors(response):
            np.testing.assert_allclose(vector, wanted, atol=1e-6)
        assert response.json()["usage"]["prompt_tokens"] == len(whole) * len(response.json()["data"])


async def test_the_answer_has_openais_fields_and_true_token_counts(client: httpx.AsyncClient) -> None:
    answer = (
        await client.post("/v1/embeddings", json={"input": ["hello world", ""], "model": "any", "user": "me"})
    ).json()
    assert answer["object"] == "list"
    assert answer["model"] == "sentence-transformers/all-MiniLM-L6-v2"
    assert [entry["index"] for entry in answer["data"]] == [0, 1]
    assert {entry["object"] for entry in answer["data"]} == {"embedding"}
    assert answer["usage"] == {"prompt_tokens": 4 + 2, "total_tokens": 4 + 2}


async def test_base64_is_little_endian_float32(client: httpx.AsyncClient) -> None:
    floats = vectors(await client.post("/v1/embeddings", json={"input": TEXTS, "encoding_format": "float"}))
    answer = await client.post("/v1/embeddings", json={"input": TEXTS, "encoding_format": "base64"})
    decoded = [np.frombuffer(base64.b64decode(entry["embedding"]), "<f4") for entry in answer.json()["data"]]
    np.testing.assert_allclose(np.stack(decoded), floats, atol=1e-6)


async def test_dimensions_are_those_that_the_model_is_trained_for(client: httpx.AsyncClient) -> None:
    whole = vectors(await client.post("/v1/embeddings", json={"input": "a text"}))
    native = vectors(await client.post("/v1/embeddings", json={"input": "a text", "dimensions": 384}))
    np.testing.assert_array_equal(native, whole)
    fewer = await client.post("/v1/embeddings", json={"input": "a text", "dimensions": 64})
    assert fewer.status_code == 400
    assert "gives only 384" in fewer.json()["error"]["message"]


async def test_normalize_false_keeps_the_pooled_vector(client: httpx.AsyncClient) -> None:
    unit = np.array((await client.post("/embed", json={"inputs": "a text"})).json()[0])
    pooled = np.array((await client.post("/embed", json={"inputs": "a text", "normalize": False})).json()[0])
    assert np.linalg.norm(unit) == pytest.approx(1, abs=1e-6)
    assert np.linalg.norm(pooled) > 1.5
    np.testing.assert_allclose(pooled / np.linalg.norm(pooled), unit, atol=1e-6)


async def test_more_texts_than_a_forward_holds_are_split_and_stay_in_order(client: httpx.AsyncClient) -> None:
    texts = [f"text number {index} " + "x " * (index % 45) for index in range(150)]
    together = np.array((await client.post("/embed", json={"inputs": texts})).json())
    for index in (0, 63, 64, 149):
        alone = np.array((await client.post("/embed", json={"inputs": texts[index]})).json()[0])
        np.testing.assert_allclose(together[index], alone, atol=1e-5)


async def test_a_long_text_is_truncated_with_a_note(client: httpx.AsyncClient) -> None:
    texts = ["short", "word " * 20_000]
    answer = await client.post("/v1/embeddings", json={"input": texts})
    assert answer.headers["x-truncated-inputs"] == "1"
    assert answer.json()["usage"] == {"prompt_tokens": 3 + 256, "total_tokens": 3 + 256, "truncated": [1]}
    cut = vectors(await client.post("/v1/embeddings", json={"input": "word " * 254}))[0]
    np.testing.assert_allclose(vectors(answer)[1], cut, atol=1e-6)
    assert (await client.post("/embed", json={"inputs": texts})).headers["x-truncated-inputs"] == "1"
    assert "x-truncated-inputs" not in (await client.post("/embed", json={"inputs": "short"})).headers


async def test_a_long_text_is_refused_where_the_request_says_so(client: httpx.AsyncClient) -> None:
    answer = await client.post("/embed", json={"inputs": ["short", "word " * 20_000], "truncate": False})
    assert answer.status_code == 400
    assert "maximum context length is 256 tokens" in answer.json()["error"]
    assert "inputs[1]" in answer.json()["error"]


@pytest.mark.parametrize(
    ("accepted", "compressed"),
    [("gzip", True), ("br, gzip;q=0.5", True), ("*", True), ("identity", False), ("gzip;q=0", False), ("br", False)],
)
async def test_gzip_where_the_client_accepts_it(client: httpx.AsyncClient, accepted: str, compressed: bool) -> None:
    answer = await client.post("/embed", json={"inputs": ["a", "b"]}, headers={"accept-encoding": accepted})
    assert ("content-encoding" in answer.headers) is compressed
    assert np.array(answer.json()).shape == (2, 384)
    assert answer.headers.get("vary") == ("Accept-Encoding" if compressed else None)


async def test_unknown_keys_nulls_and_string_booleans_are_taken(client: httpx.AsyncClient) -> None:
    body = {"inputs": ["a"], "truncate": None, "normalize": "true", "prompt_name": None, "drop_params": True}
    assert (await client.post("/embed", json=body)).status_code == 200


async def test_equal_texts_get_equal_vectors_whatever_else_is_in_the_batch(client: httpx.AsyncClient) -> None:
    mixed = ["needle", *(f"hay {'and straw ' * index}" for index in range(40)), "needle"]
    answer = np.array((await client.post("/embed", json={"inputs": mixed})).json())
    alone = np.array((await client.post("/embed", json={"inputs": "needle"})).json()[0])
    np.testing.assert_allclose(answer[[0, -1]], [alone, alone], atol=1e-5)
