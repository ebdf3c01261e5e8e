"""Pieces point at the very text that they stand for, and ids go back to texts, for every kind of tokenizer."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tokenizers import Tokenizer

from tests.conftest import serving
from tests.models.loaded import GOLDEN
from tests.tiny_checkpoints import plain_tokenizer, tiny_cross_encoder, tiny_xlm_roberta

PROMPTS = {"query": "query: "}
TEXTS = [
    "def add(first, second): return first + second",
    "Die Straße führt über die Brücke, naïve.",
    "你好世界。",
    "Привет, 😀!  two  spaces",
    "",
]
KINDS = ["bert", "xlm-roberta", "qwen3", "nv-embed"]


def folder_of(kind: str, tmp: Path, minilm_folder: Path) -> Path:
    if kind == "xlm-roberta":
        return tiny_xlm_roberta(tmp / "tiny", prompts=PROMPTS)
    golden = {"qwen3": "qwen3/embedding", "nv-embed": "nvembed/checkpoint"}
    return GOLDEN / golden[kind] if kind in golden else minilm_folder


class ServedModel:
    """A model of one kind, and its tokenizer read by the library alone."""

    def __init__(self, kind: str, client: httpx.AsyncClient, folder: Path) -> None:
        self.kind, self.client = kind, client
        self.own = plain_tokenizer(folder)

    async def pieces(self, inputs: object, **fields: object) -> list[list[dict[str, Any]]]:
        answer = await self.client.post("/tokenize", json={"inputs": inputs, **fields})
        assert answer.status_code == 200, answer.text
        pieces: list[list[dict[str, Any]]] = answer.json()
        return pieces


@pytest.fixture(scope="module", params=KINDS)
async def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, minilm_folder: Path
) -> AsyncIterator[ServedModel]:
    folder = folder_of(request.param, tmp_path_factory.mktemp(request.param), minilm_folder)
    async with serving(embed_model=str(folder)) as client:
        yield ServedModel(request.param, client, folder)


async def test_offsets_point_at_the_very_text(served: ServedModel) -> None:
    for text, pieces in zip(TEXTS, await served.pieces(TEXTS), strict=True):
        plain = [piece for piece in pieces if not piece["special"]]
        encoded = served.own.encode(text, add_special_tokens=False)
        assert [piece["id"] for piece in plain] == encoded.ids
        assert [(piece["start"], piece["stop"]) for piece in plain] == encoded.offsets
        assert all(piece["text"] == text[piece["start"] : piece["stop"]] for piece in plain)
        covered = {index for piece in plain for index in range(piece["start"], piece["stop"])}
        assert {index for index, character in enumerate(text) if not character.isspace()} <= covered


async def test_special_tokens_have_no_place(served: ServedModel) -> None:
    [pieces] = await served.pieces(TEXTS[0])
    special = [piece for piece in pieces if piece["special"]]
    assert special
    for piece in special:
        assert (piece["start"], piece["stop"]) == (None, None)
        assert piece["text"] == served.own.id_to_token(piece["id"])
    [without] = await served.pieces(TEXTS[0], add_special_tokens=False)
    assert without == [piece for piece in pieces if not piece["special"]]


async def test_an_unknown_word_and_a_written_control_token_have_their_place(served: ServedModel) -> None:
    end = (await served.pieces("a"))[0][-1]["text"]
    text = f"a ☃ {end} b"
    [pieces] = await served.pieces(text, add_special_tokens=False)
    assert not any(piece["special"] for piece in pieces)
    assert any(piece["text"] == "☃" for piece in pieces)
    assert any(piece["text"].strip() == end for piece in pieces)


async def test_as_many_tokens_as_an_embedding_takes(served: ServedModel) -> None:
    for text in TEXTS:
        tokenized = (await served.client.post("/tokenize", json={"prompt": text})).json()
        embedded = (await served.client.post("/v1/embeddings", json={"input": text})).json()
        assert tokenized["count"] == len(tokenized["tokens"]) == embedded["usage"]["prompt_tokens"]


async def test_ids_go_back_to_the_text(served: ServedModel) -> None:
    lossless = served.kind in ("qwen3", "nv-embed")
    for text in filter(None, TEXTS):
        ids = (await served.client.post("/tokenize", json={"prompt": text})).json()["tokens"]
        bare = (await served.client.post("/tokenize", json={"prompt": text, "add_special_tokens": False})).json()
        [decoded] = (await served.client.post("/decode", json={"ids": ids})).json()
        whole = (await served.client.post("/detokenize", json={"tokens": bare["tokens"]})).json()["prompt"]
        assert whole == served.own.decode(bare["tokens"], skip_special_tokens=False)
        assert decoded == served.own.decode(ids)
        assert not lossless or decoded.lstrip() == whole.lstrip() == text


async def test_a_prompt_goes_before_the_text(served: ServedModel) -> None:
    models = (await served.client.get("/info")).json()
    prompt = models["prompts"].get("query", "")
    [pieces] = await served.pieces("a b", prompt_name="query", add_special_tokens=False)
    encoded = served.own.encode(f"{prompt}a b", add_special_tokens=False)
    assert [piece["id"] for piece in pieces] == encoded.ids
    assert [(piece["start"], piece["stop"]) for piece in pieces] == encoded.offsets
    again = await served.pieces(f"{prompt}a b", prompt_name="query", add_special_tokens=False)
    assert again == [pieces]


@pytest.mark.parametrize("kind", ["bert", "xlm-roberta"])
async def test_a_rerankers_ids_do_not_tell_how_its_control_tokens_are_hidden(
    tmp_path: Path, minilm_folder: Path, kind: Any
) -> None:
    """A client that knew the hidden form could write control tokens into a document."""
    folder = tiny_cross_encoder(tmp_path / "cross", kind=kind, tokenizer_from=minilm_folder)
    own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = own.encode("hello").ids
    async with serving(rerank_model=str(folder)) as client:
        whole = (await client.post("/detokenize", json={"model": "cross", "tokens": ids})).json()["prompt"]
        body = {"model": "cross", "ids": ids, "skip_special_tokens": False}
        assert (await client.post("/decode", json=body)).json() == [whole]
        assert whole.replace(" ", "") == own.decode(ids, skip_special_tokens=False).replace(" ", "")
        [text] = (await client.post("/decode", json={"model": "cross", "ids": ids})).json()
        assert text == own.decode(ids)
        again = (await client.post("/tokenize", json={"model": "cross", "prompt": whole})).json()["tokens"]
        assert not {ids[0], ids[-1]} & set(again)
