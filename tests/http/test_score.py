"""POST /score: pairs of one with many and of many with many, in all of vLLM's words, as /v1/rerank scores them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.conftest import Sharing
from tests.models.loaded import GOLDEN
from tests.oracle import cross_encoder_scores, st_encode
from tests.tiny_checkpoints import tiny_cross_encoder

QUERIES = ["a dog", "a dog", "What is the capital of China?", "a fox"]
DOCUMENTS = [
    "The capital of China is Beijing.",
    "the dog and the fox",
    "Plants create oxygen through photosynthesis.",
    "The capital of China is Beijing.",
]


@pytest.fixture(scope="module")
def cross_encoder(tmp_path_factory: pytest.TempPathFactory, minilm_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("score") / "cross"
    return tiny_cross_encoder(folder, kind="bert", tokenizer_from=minilm_folder)


@pytest.fixture(scope="module", params=["cosine", "cross-encoder", "qwen3"])
async def scorer(request: pytest.FixtureRequest, cross_encoder: Path, shared: Sharing) -> httpx.AsyncClient:
    """A server without a reranker, and with one of each kind."""
    rerankers = {"cosine": "none", "cross-encoder": str(cross_encoder), "qwen3": str(GOLDEN / "qwen3" / "reranker")}
    return await shared(rerank_model=rerankers[request.param])


async def rerank(client: httpx.AsyncClient, query: str, documents: Sequence[str], **fields: object) -> list[float]:
    answer = await client.post("/v1/rerank", json={"query": query, "documents": list(documents), **fields})
    assert answer.status_code == 200, answer.text
    by_index = {result["index"]: result["relevance_score"] for result in answer.json()["results"]}
    return [by_index[index] for index in range(len(documents))]


async def score(client: httpx.AsyncClient, *, path: str = "/score", **body: Any) -> list[float]:
    answer = await client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    data = answer.json()["data"]
    assert [entry["index"] for entry in data] == list(range(len(data)))
    assert {entry["object"] for entry in data} == {"score"}
    return [entry["score"] for entry in data]


@pytest.mark.parametrize("path", ["/score", "/v1/score"])
async def test_one_with_many_is_a_rerank(scorer: httpx.AsyncClient, path: str) -> None:
    for raw in (False, True):
        scores = await score(scorer, path=path, text_1=QUERIES[0], text_2=DOCUMENTS, raw_scores=raw)
        assert scores == pytest.approx(await rerank(scorer, QUERIES[0], DOCUMENTS, raw_scores=raw), abs=1e-6)


async def test_many_with_many_are_as_many_reranks(scorer: httpx.AsyncClient) -> None:
    scores = await score(scorer, text_1=QUERIES, text_2=DOCUMENTS)
    alone = [(await rerank(scorer, *pair))[0] for pair in ((q, [d]) for q, d in zip(QUERIES, DOCUMENTS, strict=True))]
    assert scores == pytest.approx(alone, abs=1e-6)
    assert len({round(value, 6) for value in scores}) > 2


async def test_the_tokens_of_all_pairs_are_counted(scorer: httpx.AsyncClient) -> None:
    pairs = list(zip(QUERIES, DOCUMENTS, strict=True))
    answer = (await scorer.post("/score", json={"text_1": QUERIES, "text_2": DOCUMENTS})).json()
    alone = [(await scorer.post("/v1/rerank", json={"query": q, "documents": [d]})).json() for q, d in pairs]
    assert answer["usage"]["total_tokens"] == sum(reply["usage"]["total_tokens"] for reply in alone)
    assert answer["model"] == alone[0]["model"]
    assert (answer["object"], answer["id"].partition("-")[0]) == ("list", "score")


@pytest.mark.parametrize(
    "names",
    [("text_1", "text_2"), ("data_1", "data_2"), ("queries", "documents"), ("queries", "items"), ("text_1", "items")],
)
async def test_every_name_of_the_two_texts(client: httpx.AsyncClient, names: tuple[str, str]) -> None:
    first, second = names
    expected = await rerank(client, QUERIES[0], DOCUMENTS)
    forms: list[dict[str, Any]] = [
        {first: QUERIES[0], second: DOCUMENTS},
        {first: [QUERIES[0]], second: DOCUMENTS},
        {first: QUERIES[0], second: DOCUMENTS[0]},
    ]
    for body, wanted in zip(forms, (expected, expected, expected[:1]), strict=True):
        assert await score(client, **body) == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("raw", [{"use_activation": False}, {"activation": False}, {"raw_scores": True}])
async def test_without_activation_scores_are_raw(
    client: httpx.AsyncClient, cross_encoder: Path, minilm_folder: Path, raw: dict[str, Any], shared: Sharing
) -> None:
    logits = cross_encoder_scores(cross_encoder, QUERIES[0], DOCUMENTS)
    ranked = await shared(rerank_model=str(cross_encoder))
    np.testing.assert_allclose(await score(ranked, text_1=QUERIES[0], text_2=DOCUMENTS, **raw), logits, atol=1e-4)
    mapped = await score(ranked, text_1=QUERIES[0], text_2=DOCUMENTS, use_activation=True)
    np.testing.assert_allclose(mapped, 1 / (1 + np.exp(-logits.astype(float))), atol=1e-5)
    encoded = st_encode(minilm_folder, [QUERIES[0], *DOCUMENTS])
    scores = await score(client, text_1=QUERIES[0], text_2=DOCUMENTS, **raw)
    np.testing.assert_allclose(scores, encoded[1:] @ encoded[0], atol=1e-5)


@pytest.mark.parametrize(("first", "second"), [(2, 3), (3, 2), (4, 1), (2, 0)])
async def test_lists_of_different_lengths_are_refused(client: httpx.AsyncClient, first: int, second: int) -> None:
    answer = await client.post("/score", json={"text_1": QUERIES[:first], "text_2": DOCUMENTS[:second]})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "text_1")
    assert f"{first} texts" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"text_1": [], "text_2": ["a"]}, "text_1"),
        ({"text_1": [], "text_2": []}, "text_1"),
        ({"text_1": "a", "text_2": []}, "text_2"),
        ({"text_1": "a"}, "text_2"),
        ({"text_2": "a"}, "text_1"),
        ({"text_1": "a", "text_2": ["a", 3]}, "text_2[1]"),
        ({"text_1": "a", "text_2": ["a"] * 2049}, "text_2"),
    ],
)
async def test_what_is_missing_or_wrong_is_named(client: httpx.AsyncClient, body: dict[str, Any], param: str) -> None:
    answer = await client.post("/score", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


LONG = "word " * 5000


async def test_what_was_cut_is_named(scorer: httpx.AsyncClient) -> None:
    body = {"text_1": QUERIES, "text_2": ["dog", LONG, "fox", LONG]}
    answer = await scorer.post("/score", json=body)
    assert answer.json()["usage"]["truncated"] == [1, 3]
    assert answer.headers["X-Truncated-Inputs"] == "1,3"
    refused = await scorer.post("/score", json={**body, "truncate": False})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "text_2[1]")
    assert "maximum context length" in refused.json()["error"]["message"]


async def test_limits_for_each_text(scorer: httpx.AsyncClient) -> None:
    limits: dict[str, Any] = {"max_tokens_per_query": 3, "max_tokens_per_doc": 4}
    scores = await score(scorer, text_1=QUERIES, text_2=DOCUMENTS, **limits)
    alone = [
        (await rerank(scorer, query, [document], **limits))[0]
        for query, document in zip(QUERIES, DOCUMENTS, strict=True)
    ]
    assert scores == pytest.approx(alone, abs=1e-6)
    loose: dict[str, Any] = {"max_tokens_per_query": 5000, "max_tokens_per_doc": 5000, "truncate_prompt_tokens": -1}
    plain = await score(scorer, text_1=QUERIES, text_2=DOCUMENTS)
    assert await score(scorer, text_1=QUERIES, text_2=DOCUMENTS, **loose) == pytest.approx(plain, abs=1e-6)
    assert scores != pytest.approx(plain, abs=1e-6)


async def test_a_long_first_text_is_named_where_it_stands_alone(client: httpx.AsyncClient) -> None:
    refused = await client.post("/score", json={"text_1": ["a", LONG], "text_2": ["b", "c"], "truncate": False})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "text_1[1]")
    refused = await client.post("/score", json={"text_1": LONG, "text_2": ["b", "c"], "truncate": False})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "text_1")
