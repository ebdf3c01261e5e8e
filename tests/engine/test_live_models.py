"""Models taken out of the engine and back in while it runs others: exact, with their memory, and nobody waits long."""

from __future__ import annotations

import asyncio
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.models.loaded import GOLDEN
from tests.servers import free_port, running, vecmill_command
from tests.tiny_checkpoints import VOCAB, edit_json, tiny_bert
from vecmill.config import load_settings
from vecmill.core.errors import EngineFailed, ModelNotFound, StartupError
from vecmill.core.types import Lane, Row, Task, Vector
from vecmill.engine.engine import Engine
from vecmill.engine.loader import Loaded
from vecmill.models.packing import PackedBatch

ROWS = [Row(np.array(ids, dtype=np.int32)) for ids in ([101, 2003, 102], [101, 102], [101, 7592, 2088, 102])]
FEW_IDS = [Row(np.array(ids, dtype=np.int32)) for ids in ([1, 2, 3], [4], [5, 6])]
MINILM = "sentence-transformers/all-MiniLM-L6-v2"
ONE, OTHER = "embed:one", "embed:other"


def silent(percent: float, message: str) -> None:
    pass


def started(*folders: Path, **flags: Any) -> Engine:
    names = ",".join(map(str, folders))
    settings = load_settings(
        {"embed_model": names, "device": "cpu", "dtype": "float32", "max_batch_tokens": 128, **flags}
    )
    engine = Engine(settings.model, settings.engine, silent)
    engine.start()
    engine.loaded.result(300)
    return engine


@pytest.fixture
def folders(tmp_path: Path, minilm_folder: Path) -> list[Path]:
    return [tiny_bert(tmp_path / name, minilm_folder, seed=seed) for seed, name in enumerate(("one", "other"))]


@pytest.fixture
def engine(folders: list[Path]) -> Iterator[Engine]:
    engine = started(*folders)
    yield engine
    engine.close()


def loaded(engine: Engine) -> Loaded:
    return engine.loaded.result()


async def vectors(engine: Engine, key: str, rows: Sequence[Row] = ROWS) -> list[Vector | Exception]:
    return (await engine.run(key, rows)).rows


def same(found: list[Vector | Exception], wanted: list[Vector | Exception]) -> bool:
    return all(
        isinstance(one, np.ndarray) and isinstance(other, np.ndarray) and np.array_equal(one, other)
        for one, other in zip(found, wanted, strict=True)
    )


async def test_a_model_that_is_loaded_again_is_the_same_to_the_bit(engine: Engine) -> None:
    wanted, card, warmed = await vectors(engine, ONE), loaded(engine).models[ONE].card, loaded(engine).warmed[ONE]
    seen: list[float] = []
    for _ in range(2):
        engine.unload(ONE).result(60)
        assert ONE not in loaded(engine).models
        model = engine.load(ONE, lambda percent, message: seen.append(percent)).result(60)
        assert model.card == card  # the fingerprint, and with it the keys of the cache
        assert (loaded(engine).warmed[ONE].calibration, loaded(engine).models[ONE]) == (warmed.calibration, model)
        assert same(await vectors(engine, ONE), wanted)
    assert len(seen) > 4
    assert max(seen) <= 100


async def test_what_is_released_holds_no_weights_even_where_it_is_still_held(engine: Engine) -> None:
    model, other = loaded(engine).models[ONE], await vectors(engine, OTHER)
    engine.unload(ONE).result(60)
    assert sum(tensor.numel() for module in model.model.modules for tensor in module.parameters()) == 0
    assert same(await vectors(engine, OTHER), other)
    with pytest.raises(KeyError):  # nothing asks for it; if something did, it would be told
        await vectors(engine, ONE)
    assert same(await vectors(engine, OTHER), other)


async def test_weights_that_another_model_uses_stay(tmp_path: Path) -> None:
    folder = shutil.copytree(GOLDEN / "qwen3" / "reranker", tmp_path / "both")
    for name in ("modules.json", "chat_template.jinja"):
        (folder / name).unlink()
    edit_json(folder / "config.json", is_original_qwen3_reranker=True)
    engine = started(folder, rerank_model=str(folder))
    embed, rerank = await vectors(engine, "embed:both", FEW_IDS), await vectors(engine, "rerank:both", FEW_IDS)
    for first, second in (("embed:both", "rerank:both"), ("rerank:both", "embed:both")):
        engine.unload(first).result(60)
        assert same(await vectors(engine, second, FEW_IDS), rerank if second == "rerank:both" else embed)
        engine.load(first, silent).result(60)
        embedder, reranker = (loaded(engine).models[key] for key in ("embed:both", "rerank:both"))
        assert embedder.model.modules[0] is reranker.model.modules[0]
    engine.unload("embed:both").result(60)
    engine.unload("rerank:both").result(60)
    assert not loaded(engine).common.shared
    for key in ("rerank:both", "embed:both"):
        engine.load(key, silent).result(60)
    assert same(await vectors(engine, "embed:both", FEW_IDS), embed)
    assert same(await vectors(engine, "rerank:both", FEW_IDS), rerank)
    engine.close()


def test_models_that_are_not_loaded_yet_name_the_device_as_those_that_are(folders: list[Path]) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    names = ",".join(map(str, folders))
    settings = load_settings({"embed_model": names, "device": "cpu", "dtype": "float32"})
    engine = Engine(settings.model, settings.engine, silent, at_once=True)
    engine.start()
    found = engine.loaded.result(300)
    assert found.to_load
    assert {known.card.device for known in found.known.values()} == {"cpu (2 threads)"}
    engine.close()
    torch.set_num_threads(threads)


async def test_batches_of_others_go_before_each_pass_of_a_warm_up(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model's passes are held up: the other's are answered all the same, by the one thread that there is."""
    engine.unload(ONE).result(60)
    order: list[str] = []
    wanted = await vectors(engine, OTHER)
    other = loaded(engine).models[OTHER].model
    forward, submitted = type(other).forward, 0

    def noted(model: Any, packed: PackedBatch) -> Tensor:
        order.append("t" if model is other else "n")
        assert threading.current_thread().name == "pass"
        result: Tensor = forward(model, packed)
        until = time.monotonic() + 1
        while model is not other and submitted <= order.count("t") and time.monotonic() < until:
            time.sleep(0.001)  # until a search waits that has not been run
        return result

    monkeypatch.setattr(type(other), "forward", noted)
    loading = engine.load(ONE, silent)
    while not loading.done():
        search = asyncio.create_task(engine.run(OTHER, ROWS, Lane.INTERACTIVE))
        await asyncio.sleep(0)  # it is in the engine's inbox now
        submitted += 1
        assert same((await search).rows, wanted)
    loading.result()
    passes = "".join(order)
    assert passes.count("n") > 3
    assert passes.count("nt") > passes.count("n") / 2


async def test_a_model_that_cannot_be_loaded_leaves_the_engine_as_it_was(engine: Engine, folders: list[Path]) -> None:
    wanted = await vectors(engine, OTHER)
    engine.unload(ONE).result(60)
    (folders[0] / "config.json").rename(folders[0] / "away")
    with pytest.raises(StartupError, match=r"config\.json"):
        engine.load(ONE, silent).result(60)
    (folders[0] / "away").rename(folders[0] / "config.json")
    with pytest.raises(ModelNotFound):
        engine.load("embed:nobody", silent).result(60)
    assert same(await vectors(engine, OTHER), wanted)
    engine.load(ONE, silent).result(60)
    assert len(await vectors(engine, ONE)) == 3


async def test_a_warm_up_that_fails_leaves_the_engine_as_it_was(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = await vectors(engine, OTHER)
    engine.unload(ONE).result(60)
    other = loaded(engine).models[OTHER].model
    forward = type(other).forward

    def failing(model: Any, packed: PackedBatch) -> Tensor:
        if model is not other:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(model, packed)

    monkeypatch.setattr(type(other), "forward", failing)
    with pytest.raises(StartupError, match="not one token fits"):
        engine.load(ONE, silent).result(60)
    monkeypatch.undo()
    assert ONE not in loaded(engine).models
    assert same(await vectors(engine, OTHER), wanted)
    engine.load(ONE, silent).result(60)


async def test_a_stop_ends_a_load(engine: Engine) -> None:
    engine.unload(ONE).result(60)
    reached, go_on = threading.Event(), threading.Event()

    def report(percent: float, message: str) -> None:
        reached.set()
        go_on.wait(30)

    loading = engine.load(ONE, report)
    assert reached.wait(30)
    engine.close()
    go_on.set()
    with pytest.raises(EngineFailed):
        loading.result(30)
    with pytest.raises(EngineFailed):
        engine.unload(OTHER).result(30)


@pytest.mark.nightly
async def test_layers_that_were_compiled_are_compiled_again(folders: list[Path]) -> None:
    engine = started(*folders, torch_compile="true")
    wanted = await vectors(engine, ONE)
    assert loaded(engine).warmed[ONE].compiled
    engine.unload(ONE).result(60)
    engine.load(ONE, silent).result(300)
    assert loaded(engine).warmed[ONE].compiled
    assert same(await vectors(engine, ONE), wanted)
    engine.close()


async def test_a_model_of_the_hubs_cache_is_known_by_its_files(
    engine: Engine, tmp_path: Path, minilm_folder: Path
) -> None:
    folder = tiny_bert(tmp_path / "third", minilm_folder, seed=3)
    (folder / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n# license: none\n")
    known = engine.add_cached(folder, "owner/third", None)
    assert known.card.license == "apache-2.0"
    assert (known.card.id, known.card.task, known.card.dimensions) == ("owner/third", Task.EMBED, 32)
    model = engine.load(known.card.key, silent).result(60)
    assert model.card.weight_bytes == pytest.approx(known.card.weight_bytes, rel=0.01)
    assert len(await vectors(engine, "embed:owner/third")) == 3
    for name, task in (("embedding", Task.EMBED), ("reranker", Task.RERANK)):
        assert engine.add_cached(GOLDEN / "qwen3" / name, f"owner/{name}", None).card.task is task
    chat = shutil.copytree(GOLDEN / "qwen3" / "embedding", tmp_path / "chat")
    (chat / "modules.json").unlink()
    with pytest.raises(StartupError, match="`task`"):
        engine.add_cached(chat, "owner/chat", None)
    assert engine.add_cached(chat, "owner/chat", Task.EMBED).card.key == "embed:owner/chat"
    with pytest.raises(StartupError):
        engine.add_cached(tmp_path, "owner/none", None)


BIG = 300_000_000  # bytes


def big_checkpoint(folder: Path, minilm_folder: Path) -> Path:
    """The tiny BERT with wider layers."""
    tiny_bert(folder, minilm_folder)
    width, layers = 1024, 6
    edit_json(
        folder / "config.json",
        hidden_size=width,
        num_hidden_layers=layers,
        intermediate_size=4 * width,
        num_attention_heads=16,
    )
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (VOCAB, width),
        "embeddings.position_embeddings.weight": (128, width),
        "embeddings.token_type_embeddings.weight": (2, width),
        "embeddings.LayerNorm.weight": (width,),
        "embeddings.LayerNorm.bias": (width,),
    }
    for layer in (f"encoder.layer.{number}" for number in range(layers)):
        for name in ("query", "key", "value"):
            shapes[f"{layer}.attention.self.{name}.weight"] = (width, width)
            shapes[f"{layer}.attention.self.{name}.bias"] = (width,)
        for name, shape in (
            ("attention.output.dense", (width, width)),
            ("intermediate.dense", (4 * width, width)),
            ("output.dense", (width, 4 * width)),
        ):
            shapes[f"{layer}.{name}.weight"], shapes[f"{layer}.{name}.bias"] = shape, shape[:1]
        for norm in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes[f"{layer}.{norm}.weight"] = shapes[f"{layer}.{norm}.bias"] = (width,)
    weights = {name: torch.empty(shape).uniform_(-0.05, 0.05, generator=generator) for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.nightly
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the allocator of Linux")
async def test_memory_comes_back_and_searches_go_on(tmp_path: Path, minilm_folder: Path) -> None:
    folder = big_checkpoint(tmp_path / "big", minilm_folder)
    assert (folder / "model.safetensors").stat().st_size > BIG
    port = free_port()
    command = vecmill_command(port, "--embed-model", f"auto,{folder}", "--dtype", "float32")
    with running(command, port, "/ready") as server:
        process = psutil.Process(server.pid)
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:

            async def embed(model: str, text: str) -> list[float]:
                answer = await client.post("/v1/embeddings", json={"model": model, "input": text})
                assert answer.status_code == 200, answer.text
                vector: list[float] = answer.json()["data"][0]["embedding"]
                return vector

            async def unloaded() -> int:
                assert (await client.post("/models/unload", json={"model": "big"})).status_code == 202
                async with asyncio.timeout(30):
                    while (item := (await client.get("/dashboard/models")).json()["models"][1])["message"]:
                        await asyncio.sleep(0.02)
                assert item["state"] == "unloaded"
                return int(process.memory_info().rss)

            wanted = await embed("big", "a text")
            before = await unloaded()
            for _ in range(2):
                loading = asyncio.create_task(embed("big", "a text"))
                while not loading.done():
                    await embed(MINILM, "a search")
                assert await loading == wanted
                assert process.memory_info().rss - before > BIG * 0.8
                assert await unloaded() - before < 50_000_000
