"""How far numbers may be from the reference's: what docs/models.md states under "Tolerances", held on hard cases."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from tests.conftest import serving
from tests.models import families
from tests.models.loaded import GOLDEN, bfloat16_cosines, in_every_way, load_model, run
from tests.oracle import cross_encoder_scores, nomic_encode, st_encode
from tests.tiny_checkpoints import edit_json, tiny_bert, tiny_cross_encoder, tiny_nomic, tiny_xlm_roberta
from vecmill.core.types import Task

Vectors = NDArray[np.float32]

# As docs/models.md has them.
OF_A_VALUE, OF_A_VALUE_CUT = 1e-5, 3e-5
COSINE_IN_BFLOAT16, COSINE_OF_MINILM, COSINE_OF_LLAMA = 0.999, 0.9995, 0.997
OF_A_LOGIT, OF_A_RELEVANCE = 1e-4, 1e-5
RELEVANCE_IN_BFLOAT16 = 0.03

TEXTS = ["one", "def add(a, b):\n    return a + b", "", "a longer text " * 40, "naïve 你好", "Plants create oxygen."]
QUERY = "What do plants create?"


async def embed(client: httpx.AsyncClient, model: Path, texts: Sequence[str] = TEXTS, **fields: object) -> Vectors:
    answer = await client.post("/v1/embeddings", json={"model": model.name, "input": list(texts), **fields})
    assert answer.is_success, answer.text
    return np.array([entry["embedding"] for entry in answer.json()["data"]], dtype=np.float32)


async def relevance(client: httpx.AsyncClient, model: Path, **fields: object) -> Vectors:
    body: dict[str, Any] = {"model": model.name, "query": QUERY, "texts": TEXTS, **fields}
    answer = await client.post("/rerank", json=body)
    assert answer.is_success, answer.text
    return np.array(
        [result["score"] for result in sorted(answer.json(), key=lambda result: int(result["index"]))], np.float32
    )


def with_outlier(folder: Path, factor: float) -> Path:
    """One dimension of the last layer's output is much larger than the others."""
    weights = load_file(folder / "model.safetensors")
    for name in ("weight", "bias"):
        weights[f"encoder.layer.1.output.LayerNorm.{name}"][5] *= factor
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("factor", [1.0, 20.0])
async def test_float32_from_the_cache_too(tmp_path: Path, minilm_folder: Path, factor: float) -> None:
    folder = with_outlier(tiny_bert(tmp_path / "tiny", minilm_folder), factor)
    expected = st_encode(folder, TEXTS)
    async with serving(embed_model=str(folder), cache_max_bytes=1_000_000, api_key="a:0123456789abcdef") as client:
        client.headers["Authorization"] = "Bearer 0123456789abcdef"
        for cached in ("0", "6"):
            answer = await client.post("/v1/embeddings", json={"model": "tiny", "input": TEXTS})
            assert answer.headers.get("x-cached-inputs", "0") == cached
            vectors = np.array([entry["embedding"] for entry in answer.json()["data"]])
            np.testing.assert_allclose(vectors, expected, atol=OF_A_VALUE, rtol=0)
        raw = np.array((await client.post("/embed", json={"inputs": TEXTS, "normalize": False})).json())
    lengths = np.linalg.norm(raw, axis=1, keepdims=True)
    assert lengths.min() > 2
    np.testing.assert_allclose(raw / lengths, expected, atol=OF_A_VALUE, rtol=0)


async def test_fewer_dimensions_from_the_cache(tmp_path: Path, minilm_folder: Path) -> None:
    folder = tiny_nomic(tmp_path / "nomic", minilm_folder)
    edit_json(folder / "config.json", matryoshka_dimensions=[8, 16])
    async with serving(embed_model=str(folder), cache_max_bytes=1_000_000) as client:
        for _ in range(2):
            for dimensions in (8, 16):
                vectors = await embed(client, folder, dimensions=dimensions)
                wanted = nomic_encode(folder, TEXTS, dimensions=dimensions, layer_norm=True)
                np.testing.assert_allclose(vectors, wanted, atol=OF_A_VALUE_CUT, rtol=0)


async def test_cosines_in_bfloat16(tmp_path: Path, minilm_folder: Path) -> None:
    folders = [
        *(tiny_nomic(tmp_path / f"nomic-{seed}", minilm_folder, seed=seed) for seed in range(3)),
        *(tiny_bert(tmp_path / f"bert-{seed}", minilm_folder, seed=seed) for seed in range(2)),
        *(tiny_xlm_roberta(tmp_path / f"xlm-{seed}", seed=seed) for seed in range(2)),
        GOLDEN / "qwen3" / "embedding",
    ]
    named = {"embed_model": ",".join(map(str, folders))}
    async with serving(**named) as client:
        expected = [await embed(client, folder) for folder in folders]
    np.testing.assert_allclose(expected[3], st_encode(folders[3], TEXTS), atol=OF_A_VALUE, rtol=0)
    async with serving(**named, dtype="bfloat16") as client:
        for folder, wanted in zip(folders, expected, strict=True):
            assert (await embed(client, folder) * wanted).sum(axis=1).min() >= COSINE_IN_BFLOAT16, folder


@pytest.mark.nightly
async def test_cosines_of_real_weights_in_bfloat16(minilm_folder: Path) -> None:
    texts = [f"def function_{index}(x):\n    return x + {'x * ' * (index % 60)}{index}" for index in range(60)]
    async with serving(dtype="bfloat16") as client:
        vectors = np.array((await client.post("/embed", json={"inputs": texts})).json())
    assert (vectors * st_encode(minilm_folder, texts)).sum(axis=1).min() >= COSINE_OF_MINILM


# Of decoders and of rerankers, those that no file of a family holds against these bounds by itself.
EMBEDDERS = {"qwen2": COSINE_IN_BFLOAT16, "mistral": COSINE_IN_BFLOAT16, "llama": COSINE_OF_LLAMA}
RERANKERS = ("gemma", "mistral3", "modernbert", "qwen2", "qwen3")


@pytest.mark.parametrize("model_type", EMBEDDERS)
def test_cosines_of_decoders_in_bfloat16(tmp_path: Path, model_type: str) -> None:
    folder = families.tiny_model(Task.EMBED, model_type).write(tmp_path / "tiny")
    assert bfloat16_cosines(folder).min() >= EMBEDDERS[model_type]


@pytest.mark.parametrize("model_type", RERANKERS)
def test_relevance_in_bfloat16(tmp_path: Path, model_type: str) -> None:
    """By every layout of the family."""
    of_family = [tiny for tiny in families.tiny_models() if (tiny.task, tiny.model_type) == (Task.RERANK, model_type)]
    for number, tiny in enumerate(of_family):
        folder = tiny.write(tmp_path / str(number))
        exact, rounded = (load_model(folder, Task.RERANK, dtype)[1] for dtype in (torch.float32, torch.bfloat16))
        random = np.random.default_rng(0)
        rows = [tiny.row(length, exact.vocab_size, random) for length in range(2, 101, 9)]
        wanted = 1 / (1 + np.exp(-run(exact, rows)))
        for given in in_every_way(rounded, rows):
            scores = 1 / (1 + np.exp(-given))
            np.testing.assert_allclose(scores, wanted, atol=RELEVANCE_IN_BFLOAT16, rtol=0, err_msg=str(tiny))


@pytest.mark.nightly
async def test_scores_of_rerankers(tmp_path: Path, minilm_folder: Path) -> None:
    folders = [
        *(
            tiny_cross_encoder(tmp_path / f"bert-{seed}", kind="bert", tokenizer_from=minilm_folder, seed=seed)
            for seed in range(3)
        ),
        *(tiny_cross_encoder(tmp_path / f"xlm-{seed}", kind="xlm-roberta", seed=seed) for seed in range(3)),
        GOLDEN / "qwen3" / "reranker",
    ]
    named = {"rerank_model": ",".join(map(str, folders))}
    async with serving(**named) as client:
        expected = [await relevance(client, folder) for folder in folders]
        for folder, scores in zip(folders[:-1], expected, strict=False):
            logits = cross_encoder_scores(folder, QUERY, TEXTS, max_length=128)
            raw_scores = await relevance(client, folder, raw_scores=True)
            np.testing.assert_allclose(raw_scores, logits, atol=OF_A_LOGIT, rtol=0)
            np.testing.assert_allclose(scores, 1 / (1 + np.exp(-logits)), atol=OF_A_RELEVANCE, rtol=0)
    async with serving(**named, dtype="bfloat16") as client:
        for folder, wanted in zip(folders, expected, strict=True):
            scores = await relevance(client, folder)
            np.testing.assert_allclose(scores, wanted, atol=RELEVANCE_IN_BFLOAT16, rtol=0, err_msg=str(folder))


def test_the_document_states_what_is_tested() -> None:
    text = (GOLDEN.parents[1] / "docs" / "models.md").read_text("utf-8")
    stated = text.split("## Tolerances")[1].split("\n## ")[0]
    in_bfloat16 = (COSINE_IN_BFLOAT16, COSINE_OF_MINILM, COSINE_OF_LLAMA, RELEVANCE_IN_BFLOAT16)
    for number in (OF_A_VALUE, OF_A_VALUE_CUT, OF_A_LOGIT, *in_bfloat16):
        shown = f"{number:.0e}".replace("e-0", "e-") if number < 1e-3 else str(number)
        assert shown in stated, shown
