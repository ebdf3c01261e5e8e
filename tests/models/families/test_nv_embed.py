"""NV-Embed-v2 equals its reference code (transformers 4.44.2) on a tiny checkpoint in the hub's layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import serving
from tests.models.families import TinyModel
from tests.models.loaded import GOLDEN, LoadedModel, ids, load_model, run, text_tokenizer, unit
from tests.tiny_checkpoints import edit_json
from vecmill.core.errors import StartupError
from vecmill.core.types import Row, Task

FOLDER = GOLDEN / "nvembed" / "checkpoint"
TINY = (TinyModel(Task.EMBED, "nvembed", lambda folder: FOLDER, unpooled=True),)
CASES: dict[str, dict[str, Any]] = {
    case["name"]: case for case in json.loads((GOLDEN / "nvembed" / "cases.json").read_text())["cases"]
}
EXPECTED = load_file(GOLDEN / "nvembed" / "cases.safetensors")
TEXT_CASES = [name for name, case in CASES.items() if "texts" in case and not case.get("reference_is_nan")]


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model(FOLDER)


@pytest.mark.parametrize("name", TEXT_CASES)
async def test_texts_equal_the_reference(loaded: LoadedModel, name: str) -> None:
    case = CASES[name]
    with text_tokenizer(loaded, case["max_length"]) as tokenizer:
        rows = [tokenized.row for tokenized in await tokenizer.encode(case["texts"], case["instruction"])]
    assert [row.token_ids.tolist() for row in rows] == case["ids_without_padding"]
    for row, pooled in zip(rows, EXPECTED[f"{name}.pool_mask"], strict=True):
        assert row.unpooled == int((pooled[: len(row)] == 0).sum())
    np.testing.assert_allclose(unit(run(loaded[1], rows)), EXPECTED[f"{name}.embeddings"], atol=1e-5)


def test_random_ids_equal_the_reference(loaded: LoadedModel) -> None:
    parts = (EXPECTED[f"raw_ids.{part}"] for part in ("input_ids", "attention_mask", "pool_mask"))
    rows = []
    for token_ids, attended, pooled in zip(*parts, strict=True):
        length = int(attended.sum())
        unpooled = int((pooled[:length] == 0).sum())
        rows.append(Row(ids(*token_ids[:length].tolist()), unpooled=unpooled))
    np.testing.assert_allclose(unit(run(loaded[1], rows)), EXPECTED["raw_ids.embeddings"], atol=1e-5)


async def test_weights_rounded_to_float16_equal_the_reference(tmp_path: Path) -> None:
    folder = shutil.copytree(FOLDER, tmp_path / "nv")
    for path in folder.glob("*.safetensors"):
        save_file({name: tensor.half() for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    case = CASES[CASES["fp16_rounded_weights"]["same_inputs_as"]]
    rounded = load_model(folder)
    with text_tokenizer(rounded, case["max_length"]) as tokenizer:
        rows = [tokenized.row for tokenized in await tokenizer.encode(case["texts"], case["instruction"])]
    actual = unit(run(rounded[1], rows))
    np.testing.assert_allclose(actual, EXPECTED["fp16_rounded_weights.embeddings"], atol=1e-5)


async def test_over_http_a_query_is_the_reference_with_the_cards_instruction() -> None:
    case = CASES["ragged_instruction"]
    wanted = EXPECTED["ragged_instruction.embeddings"]
    task = "Given a question, retrieve passages that answer the question"
    async with serving(embed_model=str(FOLDER)) as client:
        for fields in ({"is_query": True}, {"instruction": task}, {"instruction": case["instruction"]}):
            answer = await client.post("/embed", json={"inputs": case["texts"], **fields})
            np.testing.assert_allclose(np.array(answer.json()), wanted, atol=1e-5)
        prefixed = [case["instruction"] + text for text in case["texts"]]
        answer = await client.post("/embed", json={"inputs": prefixed, "is_query": True})
        np.testing.assert_allclose(np.array(answer.json()), wanted, atol=1e-5)


async def test_an_instruction_that_leaves_nothing_of_the_text_is_a_400() -> None:
    case = CASES["all_masked_nan"]
    async with serving(embed_model=str(FOLDER), max_model_len=case["max_length"]) as client:
        body = {"input": case["texts"], "instruction": case["instruction"]}
        answer = await client.post("/v1/embeddings", json=body)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "input[0]"
        assert "instruction alone fills" in answer.json()["error"]["message"]
        assert (await client.post("/v1/embeddings", json={"input": case["texts"]})).status_code == 200


def without(folder: Path, name: str) -> None:
    for path in folder.glob("*.safetensors"):
        weights = load_file(path)
        weights.pop(name, None)
        save_file(weights, path, metadata={"format": "pt"})


def test_latent_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    missing = shutil.copytree(FOLDER, tmp_path / "missing")
    without(missing, "latent_attention_model.latents")
    with pytest.raises(StartupError, match=r"missing: latent_attention_model\.latents"):
        load_model(missing)
    unknown = shutil.copytree(FOLDER, tmp_path / "unknown")
    path = min(unknown.glob("*.safetensors"))
    save_file({**load_file(path), "latent_attention_model.more": torch.zeros(2)}, path, metadata={"format": "pt"})
    with pytest.raises(StartupError, match="unknown weights"):
        load_model(unknown)


def test_the_hubs_config_without_latent_sizes_is_enough(tmp_path: Path) -> None:
    folder = shutil.copytree(FOLDER, tmp_path / "nv")
    edit_json(folder / "config.json", latent_attention_config={"model_type": "latent_attention"})
    row = Row(ids(1, 300, 301, 2))
    np.testing.assert_array_equal(run(load_model(folder)[1], [row]), run(load_model(FOLDER)[1], [row]))
