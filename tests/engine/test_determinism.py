"""DETERMINISTIC=true: the same bits for each text and each pair, whatever else is in its batch."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import httpx
import numpy as np
import pytest
import torch

from tests.conftest import serving
from tests.models.families import TinyModel, tiny_models
from tests.models.loaded import CPU, GOLDEN, load_model
from tests.tiny_checkpoints import tiny_cross_encoder
from vecmill.cache.embedding_cache import model_fingerprint
from vecmill.config import ModelSettings, load_settings
from vecmill.core.errors import StartupError
from vecmill.core.types import Lane, Matrix, ModelCard, Prefix, Row, Task
from vecmill.engine import determinism
from vecmill.engine.engine import Engine
from vecmill.engine.forward import CpuThreads, Device, LoadedModel, collect, launch
from vecmill.engine.loader import expected_card
from vecmill.inference.vectors import similarities
from vecmill.models.checkpoint import Source, read
from vecmill.models.packing import Attention
from vecmill.models.prepacked_linears import prepack

ROWS, COMPOSITIONS, LONGEST = 10, 6, 90
# Of each kind of network one; the others run at night.
QUICK = {
    *("embed-bert-heads", "rerank-deberta-v2", "embed-gemma3_text", "embed-jina_embeddings_v3", "embed-nvembed"),
    *("rerank-qwen3", "embed-qwen3", "rerank-modernbert", "embed-static_embedding", "embed-nomic_bert-mixture"),
}
DTYPES = (torch.float32, torch.bfloat16)


def families() -> list[Any]:
    night = pytest.mark.nightly
    return [pytest.param(tiny, id=str(tiny), marks=() if str(tiny) in QUICK else night) for tiny in tiny_models()]


def rows_of(tiny: TinyModel, vocab_size: int, random: np.random.Generator) -> list[Row]:
    rows = [tiny.row(int(length), vocab_size, random) for length in random.integers(1, LONGEST, ROWS)]
    if not tiny.prefixes:
        return rows
    prefix = Prefix(random.integers(0, vocab_size, 13).astype(np.int32))
    return [replace(row, prefix=prefix) if index % 3 else row for index, row in enumerate(rows)]


def bits(model: LoadedModel, rows: Sequence[Row]) -> list[bytes]:
    answers = collect(launch(model, rows, Device(CPU, None)))
    return [answer.tobytes() for answer in answers if isinstance(answer, np.ndarray)]


def compositions(random: np.random.Generator) -> Iterator[list[int]]:
    for _ in range(COMPOSITIONS):
        yield random.permutation(ROWS)[: random.integers(1, ROWS + 1)].tolist()


@pytest.mark.parametrize("tiny", families())
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.nightly)])
def test_the_bits_of_a_row_do_not_depend_on_its_batch(tmp_path: Path, tiny: TinyModel, seed: int) -> None:
    random = np.random.default_rng(seed)
    folder = tiny.write(tmp_path / "tiny")
    for dtype in DTYPES:
        checkpoint, network = load_model(folder, tiny.task, dtype)
        prepack(network)
        model = LoadedModel(cast(ModelCard, None), checkpoint, network, cast(Any, None), alone=True)
        rows = rows_of(tiny, network.vocab_size, random)
        wanted = [bits(model, [row])[0] for row in rows]
        assert len(set(wanted)) > 1
        for chosen in compositions(random):
            assert bits(model, [rows[index] for index in chosen]) == [wanted[index] for index in chosen], dtype


@pytest.mark.parametrize("threads", [1, pytest.param(3, marks=pytest.mark.nightly)])
def test_with_any_number_of_threads(threads: int) -> None:
    """Parts that threads take are then not all multiples of a vector register."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        checkpoint, network = load_model(GOLDEN / "qwen3" / "embedding")
        fixed = CpuThreads(threads, fixed=True)
        model = LoadedModel(cast(ModelCard, None), checkpoint, network, cast(Any, None), threads=fixed, alone=True)
        fixed.single_up_to = 1000  # what an earlier start has found to be the fastest
        random = np.random.default_rng(0)
        rows = [Row(random.integers(0, 200, length).astype(np.int32)) for length in random.integers(1, 200, ROWS)]
        wanted = [bits(model, [row])[0] for row in rows]
        assert torch.get_num_threads() == threads
        for chosen in compositions(random):
            assert bits(model, [rows[index] for index in chosen]) == [wanted[index] for index in chosen]
    finally:
        torch.set_num_threads(before)


TEXTS = [
    *("one", "def add(a, b): return a + b", "naïve 你好", "Plants create oxygen. " * 3),
    *map(str, range(1, 40, 3)),
]


async def encoded(client: httpx.AsyncClient, texts: Sequence[str], **headers: str) -> list[str]:
    body = {"input": list(texts), "encoding_format": "base64"}
    answer = await client.post("/v1/embeddings", json=body, headers=headers)
    assert answer.is_success, answer.text
    return [entry["embedding"] for entry in answer.json()["data"]]


@pytest.mark.parametrize("dtype", ["auto", pytest.param("bfloat16", marks=pytest.mark.nightly)])
async def test_through_every_dialect_in_any_batch_and_from_the_cache(dtype: str) -> None:
    async with serving(deterministic=True, dtype=dtype, cache_max_bytes=10_000_000) as client:
        wanted = [(await encoded(client, [text], **{"Cache-Control": "no-store"}))[0] for text in TEXTS]
        assert await encoded(client, TEXTS, **{"Cache-Control": "no-store"}) == wanted
        together = await asyncio.gather(*(encoded(client, TEXTS[start:]) for start in range(0, len(TEXTS), 4)))
        assert together == [wanted[start:] for start in range(0, len(TEXTS), 4)]
        assert await encoded(client, TEXTS) == wanted  # from the cache, whole and not rounded
        await asyncio.sleep(0.5)  # written by now
        assert await encoded(client, TEXTS[::-1]) == wanted[::-1]
        numbers = [np.frombuffer(base64.b64decode(each), "<f4") for each in wanted]
        for path, body, vectors in (
            ("/embed", {"inputs": TEXTS}, lambda answer: answer),
            ("/api/embed", {"model": "all-MiniLM-L6-v2", "input": TEXTS}, lambda answer: answer["embeddings"]),
            (
                "/v2/embed",
                {
                    "model": "all-MiniLM-L6-v2",
                    "texts": TEXTS,
                    "input_type": "search_document",
                    "embedding_types": ["float"],
                },
                lambda answer: answer["embeddings"]["float"],
            ),
        ):
            answer = await client.post(path, json=body)
            assert answer.is_success, answer.text
            np.testing.assert_array_equal(np.array(vectors(answer.json()), np.float32), numbers, err_msg=path)  # type: ignore[no-untyped-call]
        body = {"query": "What do plants create?", "texts": TEXTS[:4]}  # by the similarity of vectors
        whole = {each["index"]: each["score"] for each in (await client.post("/rerank", json=body)).json()}
        for index, text in enumerate(TEXTS[:4]):
            [alone] = (await client.post("/rerank", json={**body, "texts": [text]})).json()
            assert alone["score"] == whole[index]
        assert (await client.get("/capabilities")).json()["deterministic"] is True
        assert (await client.get("/info")).json()["model_dtype"] == ("float32" if dtype == "auto" else dtype)


async def test_scores_of_pairs(tmp_path: Path, minilm_folder: Path) -> None:
    reranker = tiny_cross_encoder(tmp_path / "bert", kind="bert", tokenizer_from=minilm_folder, seed=0)
    qwen3 = GOLDEN / "qwen3" / "reranker"
    async with serving(deterministic=True, rerank_model=f"{reranker},{qwen3}") as client:
        for model in (reranker.name, qwen3.name):

            async def scores(texts: Sequence[str], name: str = model) -> list[float]:
                body = {"model": name, "query": "What do plants create?", "texts": list(texts)}
                answer = await client.post("/rerank", json=body)
                assert answer.is_success, answer.text
                return [each["score"] for each in sorted(answer.json(), key=lambda each: int(each["index"]))]

            wanted = [(await scores([text]))[0] for text in TEXTS]
            assert len(set(wanted)) > 1
            assert await scores(TEXTS) == wanted, model
            assert await scores(TEXTS[::-2]) == wanted[::-2], model


@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean", "manhattan"])
def test_a_similarity_does_not_depend_on_the_other_documents(similarity: str) -> None:
    card = replace(a_card(), similarity=similarity)
    random = np.random.default_rng(0)
    for width in (3, 33, 384, 1000):
        documents: Matrix = random.standard_normal((150, width)).astype(np.float32)
        query = documents[:1] + 0.5
        wanted = [similarities(card, query, document[None])[0] for document in documents]
        assert similarities(card, query, documents).tolist() == wanted
        assert similarities(card, np.repeat(query, 150, 0), documents)[::-1].tolist() == wanted[::-1]


def a_card(**flags: Any) -> ModelCard:
    folder = GOLDEN / "qwen3" / "embedding"
    return expected_card(read(Source("tiny", folder, Task.EMBED)), (), ModelSettings(**flags), CPU)


def test_vectors_cached_without_it_are_not_answered_with_it() -> None:
    plain = a_card(dtype="float32")
    here = replace(plain, numerics=determinism.numerics(CPU, Attention.SDPA, 2))
    elsewhere = replace(plain, numerics=determinism.numerics(CPU, Attention.SDPA, 4))
    assert len({model_fingerprint(card) for card in (plain, here, elsewhere)}) == 3
    assert a_card(deterministic=True).dtype == "float32"  # and not the one that a measurement finds


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"dtype": "fp8"}, "DTYPE=fp8"),
        ({"device": "mps"}, "DEVICE=mps"),
        ({"torch_compile": "true"}, "TORCH_COMPILE=true"),
    ],
)
def test_what_cannot_be_had_with_it_is_refused(flags: dict[str, str], named: str) -> None:
    with pytest.raises(StartupError, match=f"DETERMINISTIC=true with {named}: .*"):
        load_settings({"deterministic": True, **flags})
    load_settings({**flags})


def test_a_device_of_which_nothing_is_known_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StartupError, match=r"an Apple GPU.*DEVICE=cpu"):
        determinism.check(torch.device("mps"))
    monkeypatch.setenv(determinism.WORKSPACE, ":0:0")
    with pytest.raises(StartupError, match=f"remove {determinism.WORKSPACE}"):
        determinism.check(torch.device("cuda"))
    determinism.check(CPU)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "task"), [("embedding", "embed"), ("reranker", "rerank")])
def test_on_a_card(dtype: str, name: str, task: str) -> None:
    folder = str(GOLDEN / "qwen3" / name)
    named = {"embed_model": folder} if task == "embed" else {"rerank_model": folder}
    settings = load_settings({"rerank_model": "none", **named, "device": "cuda", "dtype": dtype, "deterministic": True})
    engine = Engine(settings.model, settings.engine, lambda percent, message: None)
    engine.start()
    try:
        engine.loaded.result(300)
        random = np.random.default_rng(0)
        prefix = Prefix(random.integers(0, 200, 13).astype(np.int32))
        rows = [
            Row(random.integers(0, 200, length).astype(np.int32), prefix=prefix if length % 2 else None)
            for length in random.integers(1, 300, 40)
        ]

        async def run(*batches: list[int]) -> list[list[bytes]]:
            lanes = [Lane.INTERACTIVE if number % 2 else Lane.BULK for number in range(len(batches))]
            passes = [
                engine.run(f"{task}:{name}", [rows[index] for index in batch], lane)
                for batch, lane in zip(batches, lanes, strict=True)
            ]
            return [[cast(Matrix, row).tobytes() for row in each.rows] for each in await asyncio.gather(*passes)]

        wanted = [bits for [bits] in asyncio.run(run(*([index] for index in range(len(rows)))))]
        batches = [random.permutation(len(rows))[: random.integers(1, 41)].tolist() for _ in range(20)]
        assert asyncio.run(run(*batches)) == [[wanted[index] for index in batch] for batch in batches]
    finally:
        engine.close()
        torch.use_deterministic_algorithms(False)
