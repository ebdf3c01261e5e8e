"""Models that sleep in the machine's memory. The CPU stands for a card with memory of its own: copies are copies."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import serving
from tests.engine.test_live_models import FEW_IDS, ONE, OTHER, loaded, same, silent, started, vectors
from tests.models.loaded import GOLDEN
from tests.tiny_checkpoints import edit_json, tiny_bert
from vecmill.core.errors import StartupObstacle
from vecmill.engine import sleepers
from vecmill.engine.engine import Engine
from vecmill.engine.sleepers import has_own_memory
from vecmill.hardware.memory import HostMemory


@pytest.fixture
def folders(tmp_path: Path, minilm_folder: Path) -> list[Path]:
    return [tiny_bert(tmp_path / name, minilm_folder, seed=seed) for seed, name in enumerate(("one", "other"))]


@pytest.fixture(autouse=True)
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sleepers, "has_own_memory", lambda device: True)


@pytest.fixture
def engine(folders: list[Path]) -> Iterator[Engine]:
    engine = started(*folders, sleep_gb=1)
    yield engine
    engine.close()


def sleep(engine: Engine, key: str) -> None:
    engine.unload(key, sleep=True).result(60)


async def test_a_model_that_wakes_is_the_same_to_the_bit_and_reads_no_file(
    engine: Engine, folders: list[Path], tmp_path: Path
) -> None:
    wanted, other, card = await vectors(engine, ONE), await vectors(engine, OTHER), loaded(engine).models[ONE].card
    folders[0].rename(tmp_path / "away")
    for _ in range(2):
        sleep(engine, ONE)
        assert ONE not in loaded(engine).models
        assert engine.asleep[ONE] >= card.weight_bytes
        assert same(await vectors(engine, OTHER), other)
        assert engine.load(ONE, silent).result(60).card == card
        assert not engine.asleep
        assert same(await vectors(engine, ONE), wanted)


async def test_a_model_that_is_unloaded_for_good_sleeps_no_more(engine: Engine) -> None:
    wanted, model = await vectors(engine, ONE), loaded(engine).models[ONE].model
    sleep(engine, ONE)
    engine.unload(ONE).result(60)
    assert not engine.asleep
    assert sum(tensor.numel() for module in model.modules for tensor in module.parameters()) == 0
    engine.load(ONE, silent).result(60)
    assert same(await vectors(engine, ONE), wanted)


async def test_who_sleeps_longest_makes_room(folders: list[Path]) -> None:
    size = (folders[0] / "model.safetensors").stat().st_size
    engine = started(*folders, sleep_gb=1.5 * size / 1e9)
    wanted = [await vectors(engine, key) for key in (ONE, OTHER)]
    sleep(engine, ONE)
    assert list(engine.asleep) == [ONE]
    sleep(engine, OTHER)
    assert list(engine.asleep) == [OTHER]
    for key in (ONE, OTHER):
        engine.load(key, silent).result(60)
    for key, each in zip((ONE, OTHER), wanted, strict=True):
        assert same(await vectors(engine, key), each)
    engine.close()


async def test_a_model_that_is_larger_than_the_bound_does_not_sleep(folders: list[Path]) -> None:
    engine = started(folders[0], sleep_gb=0.5 * (folders[0] / "model.safetensors").stat().st_size / 1e9)
    sleep(engine, ONE)
    assert not engine.asleep
    engine.close()


async def test_a_machine_without_memory_left_unloads(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sleepers, "host_memory", lambda: HostMemory(10_000, 401, 0, 0, None))  # 4 % stay free
    sleep(engine, ONE)
    assert not engine.asleep
    engine.load(ONE, silent).result(60)


async def test_a_card_without_room_leaves_the_model_asleep(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = await vectors(engine, ONE)
    sleep(engine, ONE)

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(sleepers, "move_tensors", full)
    with pytest.raises(StartupObstacle, match="do not fit into the memory of cpu"):
        engine.load(ONE, silent).result(60)
    monkeypatch.undo()
    assert list(engine.asleep) == [ONE]
    engine.load(ONE, silent).result(60)
    assert same(await vectors(engine, ONE), wanted)


@pytest.mark.parametrize("first", ["embed:both", pytest.param("rerank:both", marks=pytest.mark.nightly)])
async def test_a_network_that_two_models_share_sleeps_once(tmp_path: Path, first: str) -> None:
    second = {"embed:both": "rerank:both", "rerank:both": "embed:both"}[first]
    folder = shutil.copytree(GOLDEN / "qwen3" / "reranker", tmp_path / "both")
    for name in ("modules.json", "chat_template.jinja"):
        (folder / name).unlink()
    edit_json(folder / "config.json", is_original_qwen3_reranker=True)
    engine = started(folder, rerank_model=str(folder), sleep_gb=1)
    wanted = {key: await vectors(engine, key, FEW_IDS) for key in (first, second)}
    whole = sum(model.card.weight_bytes for model in loaded(engine).models.values())

    async def check(key: str) -> None:
        assert same(await vectors(engine, key, FEW_IDS), wanted[key])

    sleep(engine, first)
    await check(second)  # the network stays with it
    sleep(engine, second)
    assert whole <= sum(engine.asleep.values()) < 1.1 * whole  # and sleeps once
    for order in ((first, second), (second, first)):
        for key in order:
            engine.load(key, silent).result(60)
            await check(key)
        one, other = (loaded(engine).models[key].model.modules[0] for key in order)
        assert one is other
        for key in order:
            sleep(engine, key)
    engine.unload(first).result(60)  # for good: the other sleeps on
    engine.load(second, silent).result(60)
    await check(second)
    engine.load(first, silent).result(60)
    await check(first)
    sleep(engine, first)
    engine.unload(second).result(60)  # for good, and with it the network that the first would have woken with
    assert not engine.asleep
    for key in (first, second):
        engine.load(key, silent).result(60)
        await check(key)
    engine.close()


def test_where_a_copy_would_take_what_it_frees_nothing_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for integrated in (0, 1):
        asked = SimpleNamespace(is_integrated=integrated)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, asked=asked: asked)
        assert has_own_memory(torch.device("cuda")) is (not integrated)
    assert not has_own_memory(torch.device("cpu"))
    assert not has_own_memory(torch.device("mps"))


async def test_clients_see_who_sleeps_and_do_not_notice(folders: list[Path]) -> None:
    names = ",".join(map(str, folders))
    async with serving(embed_model=names, sleep_gb=1, unload_after="one=0.05", rerank_model="none") as client:

        async def embed() -> list[float]:
            answer = await client.post("/v1/embeddings", json={"model": "one", "input": "a text"})
            assert answer.status_code == 200, answer.text
            vector: list[float] = answer.json()["data"][0]["embedding"]
            return vector

        async def state() -> dict[str, Any]:
            model: dict[str, Any] = (await client.get("/dashboard/models")).json()["models"][0]
            return model

        async def until(wanted: str) -> dict[str, Any]:
            async with asyncio.timeout(20):
                while (model := await state())["state"] != wanted or model["message"]:
                    await asyncio.sleep(0.01)
            return model

        wanted = await embed()
        await client.delete("/cache")
        asleep = await until("sleeping")
        assert asleep["memory_bytes"] is None
        assert asleep["sleeping_bytes"] > 0
        process = (await client.get("/api/ps")).json()["models"][0]
        assert (process["name"], process["state"], process["size_vram"]) == ("one", "sleeping", 0)
        assert process["size"] == asleep["sleeping_bytes"]
        assert await embed() == wanted
        await until("sleeping")
        assert (await client.post("/models/unload", json={"model": "one"})).status_code == 202
        assert (await until("unloaded"))["sleeping_bytes"] is None
        await client.delete("/cache")
        assert await embed() == wanted


def test_the_copies_are_what_the_model_held(engine: Engine) -> None:
    model = loaded(engine).models[ONE].model
    before: list[Tensor] = [tensor.detach().clone() for module in model.modules for tensor in module.parameters()]
    sleep(engine, ONE)
    after = [tensor for module in model.modules for tensor in module.parameters()]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
