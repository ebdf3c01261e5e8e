"""jina-embeddings-v3 in the hub's layout: each task's vectors equal those of transformers' network with that task's
adapter added to its weights.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.conftest import serving
from tests.models.encoders import TEXTS, assert_near_in_bfloat16, refusal
from tests.models.families import TinyModel
from tests.models.loaded import load_model, run, unit
from tests.oracle import st_encode
from tests.tiny_checkpoints import (
    _as_sentence_transformer,
    _write_xlm_roberta_tokenizer,
    edit_json,
    plain_tokenizer,
    write,
)
from vecmill.core.errors import StartupError
from vecmill.core.types import Row, Task
from vecmill.engine.compilation import compile_layers
from vecmill.models.cards import choose_prompts

WIDTH, HEADS, INNER, LAYERS, RANK, LENGTH = 32, 4, 64, 2, 4, 100
INSTRUCTIONS = {
    "retrieval.query": "Represent the query for retrieving evidence documents: ",
    "retrieval.passage": "Represent the document for retrieval: ",
    "separation": "",
    "classification": "",
    "text-matching": "",
}
TASKS = list(INSTRUCTIONS)
OWN_CODE = "jinaai/xlm-roberta-flash-implementation--"


def tiny_jina_v3(folder: Path, *, seed: int = 0, **keys: Any) -> Path:
    """A two-layer jina-embeddings-v3 of 32 dimensions: files and names as the hub's, its code left out."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_xlm_roberta_tokenizer(folder, max_length=LENGTH)
    vocab_size = plain_tokenizer(folder).get_vocab_size()
    config = {
        **{"vocab_size": vocab_size, "hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": LAYERS},
        **{"num_attention_heads": HEADS, "max_position_embeddings": 130, "type_vocab_size": 1},
        **{"_name_or_path": "jinaai/jina-embeddings-v3", "architectures": ["XLMRobertaModel"]},
        "auto_map": {
            "AutoConfig": f"{OWN_CODE}configuration_xlm_roberta.XLMRobertaFlashConfig",
            "AutoModel": f"{OWN_CODE}modeling_lora.XLMRobertaLoRA",
            "AutoModelForMaskedLM": f"{OWN_CODE}modeling_xlm_roberta.XLMRobertaForMaskedLM",
        },
        **{"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1, "classifier_dropout": None, "emb_pooler": "mean"},
        **{"attention_probs_dropout_prob": 0.1, "hidden_act": "gelu", "hidden_dropout_prob": 0.1},
        **{"initializer_range": 0.02, "layer_norm_eps": 1e-5, "load_trained_adapters": True, "lora_alpha": 1},
        **{"lora_adaptations": TASKS, "lora_dropout_p": 0.0, "lora_main_params_trainable": False, "lora_rank": RANK},
        **{"matryoshka_dimensions": [8, 16, 32], "model_type": "xlm-roberta", "output_past": True},
        **{"position_embedding_type": "rotary", "rotary_emb_base": 20000.0, "task_instructions": INSTRUCTIONS},
        **{"torch_dtype": "bfloat16", "transformers_version": "4.30.2", "truncate_dim": None, "use_cache": True},
        **{"use_flash_attn": True, "use_reentrant": False},
    }
    write(folder / "config.json", {**config, **keys})
    save_file(_weights(vocab_size, seed), folder / "model.safetensors", metadata={"format": "pt"})
    _as_sentence_transformer(folder, ["Transformer", "Pooling", "Normalize"], "mean_tokens", {**INSTRUCTIONS}, LENGTH)
    modules = json.loads((folder / "modules.json").read_text("utf-8"))
    modules[0] |= {"type": "custom_st.Transformer", "kwargs": ["task"]}
    write(folder / "modules.json", modules)
    return folder


def _weights(vocab_size: int, seed: int) -> dict[str, Tensor]:
    random = partial(torch.randn, generator=torch.Generator().manual_seed(seed))
    tasks, weights = len(TASKS), {}

    def put(name: str, outputs: int, inputs: int, *, table: bool = False) -> None:
        weight, parts = f"roberta.{name}.parametrizations.weight", {}
        parts["original"] = 0.3 * random(outputs, inputs)
        if table:
            parts |= {"0.lora_A": random(tasks, outputs, RANK), "0.lora_B": random(tasks, RANK, inputs)}
        else:
            parts |= {"0.lora_A": random(tasks, RANK, inputs), "0.lora_B": random(tasks, outputs, RANK)}
            weights[f"roberta.{name}.bias"] = 0.1 * random(outputs)
        weights.update({f"{weight}.{part}": (0.5 if "lora" in part else 1.0) * value for part, value in parts.items()})

    put("embeddings.word_embeddings", vocab_size, WIDTH, table=True)
    put("embeddings.token_type_embeddings", 1, WIDTH, table=True)
    put("pooler.dense", WIDTH, WIDTH)
    norms = ["emb_ln"]
    for layer in (f"encoder.layers.{number}" for number in range(LAYERS)):
        put(f"{layer}.mixer.Wqkv", 3 * WIDTH, WIDTH)
        put(f"{layer}.mixer.out_proj", WIDTH, WIDTH)
        put(f"{layer}.mlp.fc1", INNER, WIDTH)
        put(f"{layer}.mlp.fc2", WIDTH, INNER)
        norms += [f"{layer}.norm1", f"{layer}.norm2"]
    for norm in norms:
        weights[f"roberta.{norm}.weight"] = 1 + 0.1 * random(WIDTH)
        weights[f"roberta.{norm}.bias"] = 0.1 * random(WIDTH)
    return weights


def merged(folder: Path, into: Path, task: str | None) -> Path:
    """A folder in transformers' own layout whose weights are those of the hub's, with one task's adapter added.

    transformers reads the hub's names of weights, but no adapters. As the hub's code has it, an adapter is B A of a
    layer, and A B of a table, by alpha / rank.
    """
    shutil.copytree(folder, into)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    stored = load_file(folder / "model.safetensors")
    ending = ".parametrizations.weight.original"
    weights = {name: weight for name, weight in stored.items() if ".parametrizations." not in name}
    for name in (name.removesuffix(ending) for name in stored if name.endswith(ending)):
        weight = stored[f"{name}{ending}"]
        if task is not None:
            number = config["lora_adaptations"].index(task)
            a, b = (stored[f"{name}.parametrizations.weight.0.lora_{letter}"][number] for letter in "AB")
            product = a @ b if "embeddings" in name else b @ a
            weight = weight + config["lora_alpha"] / config["lora_rank"] * product
        weights[f"{name}.weight"] = weight
    weights = {name.removeprefix("roberta."): weight for name, weight in weights.items()}
    save_file(weights, into / "model.safetensors", metadata={"format": "pt"})
    for key in ("auto_map", *(key for key in config if key.startswith("lora_"))):
        del config[key]
    rope = {"rope_type": "default", "rope_theta": config["rotary_emb_base"]}
    own = {"model_type": "jina_embeddings_v3", "architectures": ["JinaEmbeddingsV3Model"], "rope_parameters": rope}
    write(into / "config.json", {**config, **own, "torch_dtype": "float32"})
    modules = json.loads((folder / "modules.json").read_text("utf-8"))
    modules[0] = {**modules[0], "type": "sentence_transformers.models.Transformer", "kwargs": []}
    write(into / "modules.json", modules)
    return into


TINY = (TinyModel(Task.EMBED, "jina_embeddings_v3", tiny_jina_v3, adapters=len(TASKS)),)
Wanted = dict[str | None, NDArray[np.float32]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_jina_v3(tmp_path_factory.mktemp("jina") / "tiny", seed=1)


@pytest.fixture(scope="module")
def wanted(folder: Path) -> Wanted:
    """The reference's vectors of TEXTS for each task, with its instruction, and without any."""
    tasks: list[str | None] = [*TASKS, None]
    folders = {task: merged(folder, folder.with_name(f"merged-{task}"), task) for task in tasks}
    return {task: st_encode(folders[task], TEXTS, INSTRUCTIONS.get(task or "", "")) for task in tasks}


@pytest.fixture(scope="module")
async def client(folder: Path) -> AsyncIterator[httpx.AsyncClient]:
    async with serving(embed_model=str(folder), token_ids="model") as client:
        yield client


async def embed(client: httpx.AsyncClient, texts: Any = TEXTS, **fields: Any) -> NDArray[np.float32]:
    answer = await client.post("/v1/embeddings", json={"input": texts, **fields})
    assert answer.is_success, answer.text
    return np.array([entry["embedding"] for entry in answer.json()["data"]], dtype=np.float32)


def test_tasks_differ(wanted: Wanted) -> None:
    """So that the tests below would notice the wrong adapter."""
    vectors = [wanted[task][0] for task in (*TASKS, None)]
    cosines = np.stack(vectors) @ np.stack(vectors).T
    assert cosines[~np.eye(len(vectors), dtype=bool)].max() < 0.95


@pytest.mark.parametrize("task", [*TASKS, None])
async def test_each_task_equals_the_network_with_its_adapter(
    client: httpx.AsyncClient, wanted: Wanted, task: str | None
) -> None:
    vectors = await embed(client, **({"task": task} if task else {}))
    np.testing.assert_allclose(vectors, wanted[task], atol=1e-5)
    again = await embed(client, **({"task": task} if task else {}))  # from the cache: of this task
    np.testing.assert_allclose(again, wanted[task], atol=1e-3)


@pytest.mark.parametrize(
    ("path", "fields", "task"),
    [
        ("/v1/embeddings", {"input_type": "query"}, "retrieval.query"),
        ("/v1/embeddings", {"input_type": "passage"}, "retrieval.passage"),
        ("/v1/embeddings", {"input_type": "clustering"}, "separation"),
        ("/v1/embeddings", {"prompt_name": "text-matching"}, "text-matching"),
        ("/v1/embeddings", {"prompt_name": "query"}, "retrieval.query"),
        ("/embed", {"is_query": True}, "retrieval.query"),
        ("/embed", {"is_query": False}, "retrieval.passage"),
        ("/embed", {"prompt_name": "retrieval.passage"}, "retrieval.passage"),
    ],
)
async def test_other_words_for_the_tasks(
    client: httpx.AsyncClient, wanted: Wanted, path: str, fields: dict[str, Any], task: str
) -> None:
    named = "inputs" if path == "/embed" else "input"
    body = (await client.post(path, json={named: TEXTS, **fields})).json()
    vectors = np.array(body if path == "/embed" else [entry["embedding"] for entry in body["data"]])
    np.testing.assert_allclose(vectors, wanted[task], atol=1e-3)  # some of them from the cache


async def test_equal_texts_in_flight_are_told_apart_by_their_task(client: httpx.AsyncClient, wanted: Wanted) -> None:
    """Three of the tasks and none put nothing before a text, so that all of them run the same token ids."""
    tasks = [task for task, instruction in INSTRUCTIONS.items() if not instruction]
    headers = {"Cache-Control": "no-store"}
    bodies = [{"input": TEXTS, "task": task} for task in tasks] + [{"input": TEXTS}]
    answers = await asyncio.gather(*(client.post("/v1/embeddings", json=body, headers=headers) for body in bodies))
    for task, answer in zip([*tasks, None], answers, strict=True):
        vectors = np.array([entry["embedding"] for entry in answer.json()["data"]])
        np.testing.assert_allclose(vectors, wanted[task], atol=1e-5, err_msg=str(task))


async def test_token_ids_and_instructions_have_the_tasks_adapter(
    client: httpx.AsyncClient, folder: Path, wanted: Wanted
) -> None:
    tokenizer = plain_tokenizer(folder)
    ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in TEXTS[:2]]
    vectors = await embed(client, ids, task="text-matching")
    np.testing.assert_allclose(vectors, wanted["text-matching"][:2], atol=1e-3)
    own = await embed(client, TEXTS[:2], task="retrieval.query", instruction=INSTRUCTIONS["retrieval.query"])
    np.testing.assert_allclose(own, wanted["retrieval.query"][:2], atol=1e-3)


async def test_ranking_by_vectors_has_both_adapters(client: httpx.AsyncClient, wanted: Wanted) -> None:
    body = {"query": TEXTS[0], "texts": TEXTS[1:], "raw_scores": True}
    scores = {result["index"]: result["score"] for result in (await client.post("/rerank", json=body)).json()}
    cosines = wanted["retrieval.passage"][1:] @ wanted["retrieval.query"][0]
    np.testing.assert_allclose([scores[index] for index in range(len(cosines))], cosines, atol=1e-3)


async def test_a_task_that_the_model_has_not_is_refused_by_name(client: httpx.AsyncClient) -> None:
    for task, choices in (("code.query", TASKS), ("poetry", ["retrieval.query", "text-matching"])):
        refused = await client.post("/v1/embeddings", json={"input": "one", "task": task})
        assert refused.status_code == 400, refused.text
        error = refused.json()["error"]
        assert "task" in error["message"]
        assert all(choice in error["message"] for choice in choices)


async def test_the_card(client: httpx.AsyncClient) -> None:
    [card] = (await client.get("/v1/models")).json()["data"]
    assert card["adapters"] == TASKS
    assert card["prompts"]["query"] == INSTRUCTIONS["retrieval.query"]
    assert card["supported_dimensions"] == [8, 16, 32]
    eight = await embed(client, TEXTS[:1], dimensions=8, task="separation")
    assert eight.shape == (1, 8)


def test_an_instruction_of_the_settings_is_the_query_tasks_too(folder: Path) -> None:
    prompts = choose_prompts(load_model(folder)[0], "Find it: ").by_name
    assert prompts["query"] == prompts["retrieval.query"] == "Find it: "
    assert prompts["document"] == prompts["retrieval.passage"] == INSTRUCTIONS["retrieval.passage"]
    assert prompts["separation"] == ""


@torch.inference_mode()
def test_a_batch_may_mix_tasks(folder: Path, wanted: Wanted) -> None:
    """One pass over rows of every task and of none, compiled too."""
    torch.compiler.reset()
    model, tokenizer = load_model(folder)[1], plain_tokenizer(folder)
    tokenizer.enable_truncation(LENGTH)
    tasks: list[str | None] = [*TASKS, None]
    rows, expected = [], []
    for number, text in enumerate(TEXTS):
        for place, task in enumerate(tasks):
            ids = tokenizer.encode(f"{INSTRUCTIONS.get(task or '', '')}{text}").ids
            rows.append(Row(np.array(ids, dtype=np.int32), adapter=place if task else None))
            expected.append(wanted[task][number])
    together = run(model, rows)
    np.testing.assert_allclose(unit(together), np.stack(expected), atol=1e-5)
    np.testing.assert_allclose(unit(np.concatenate([run(model, [row]) for row in rows])), unit(together), atol=1e-6)

    def run_tokens(tokens: int) -> float:
        run(model, [Row(np.arange(3, 3 + tokens % 100, dtype=np.int32), adapter=1)])
        return 0.0

    compile_layers(model.layers, run_tokens, backend="eager")
    np.testing.assert_allclose(run(model, rows), together, atol=1e-5)
    torch.compiler.reset()


def test_bfloat16_is_near(tmp_path: Path) -> None:
    assert_near_in_bfloat16(TINY[0], tiny_jina_v3(tmp_path / "tiny"))


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"lora_adaptations": ["separation", "separation"]}, "`lora_adaptations`"),
        ({"lora_adaptations": TASKS[1:]}, "`task_instructions`"),
        ({"task_instructions": None}, "`task_instructions`: null"),
        ({"load_trained_adapters": False}, "`load_trained_adapters`: false"),
        ({"position_embedding_type": "alibi"}, '`position_embedding_type`: "alibi"'),
        ({"truncate_dim": 16}, "`truncate_dim`: 16"),
        ({"auto_map": {"AutoModel": "modeling_lora.Own"}}, "`auto_map`"),
        ({"lora_rank": 0}, "`lora_rank`: 0"),
        ({"lora_rank": 10**9}, "`lora_rank`: 1000000000"),
        ({"lora_adaptations": [str(task) for task in range(1001)]}, "up to 1000 different names"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "the key `rope_scaling`"),
        ({"model_type": "jina_embeddings_v3", "lora_adaptations": None}, "`lora_adaptations`: null"),
    ],
    ids=str,
)
def test_what_is_not_implemented_is_refused(tmp_path: Path, keys: dict[str, Any], expected: str) -> None:
    assert expected in refusal(lambda: tiny_jina_v3(tmp_path / "tiny"), Task.EMBED, **keys)


def test_adapters_in_other_folders_are_refused(folder: Path, tmp_path: Path) -> None:
    """Not served without them: a task would change nothing."""
    native = merged(folder, tmp_path / "native", None)
    config = json.loads((native / "config.json").read_text("utf-8"))
    native_keys = ("emb_pooler", "load_trained_adapters", "rotary_emb_base", "task_instructions", "truncate_dim")
    write(native / "config.json", {key: value for key, value in config.items() if key not in native_keys})
    with pytest.raises(StartupError, match="their adapters in folders of PEFT"):
        load_model(native)


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    folder = tiny_jina_v3(tmp_path / "tiny")
    edit_json(folder / "config.json", lora_rank=2)
    with pytest.raises(StartupError, match=r"lora_A has the shape \(5, \d+, 4\) instead of \(5, \d+, 2\)"):
        load_model(folder)
