"""DTYPE=fp8 through the engine and over HTTP. The CPU has the arithmetic and not the speed: it stands for a card."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.conftest import serving
from tests.models.loaded import GOLDEN
from vecmill.cache.embedding_cache import model_fingerprint
from vecmill.config import load_settings
from vecmill.core.errors import StartupError
from vecmill.core.types import Row
from vecmill.engine import device as device_module
from vecmill.engine.engine import Engine
from vecmill.models import attention_products

FOLDER = GOLDEN / "qwen3" / "embedding"
KEY = "embed:embedding"
ROWS = [Row(np.arange(3, 3 + length, dtype=np.int32)) for length in (1, 5, 17, 40)]


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked before float8 is used: whether the device has it."""
    monkeypatch.setattr(device_module, "no_float8", lambda device, capability: None)
    # Tiny random models are near the least cosine: they are compared in the same way on every machine.
    monkeypatch.setattr(attention_products, "are_faster", lambda: False)


@contextmanager
def engine(folder: Path = FOLDER, measurements: Path | None = None, **flags: object) -> Iterator[Engine]:
    settings = load_settings({"embed_model": str(folder), "rerank_model": "none", "max_batch_tokens": 64, **flags})
    engine = Engine(settings.model, settings.engine, lambda percent, message: None, measurements)
    engine.start()
    try:
        engine.loaded.result(300)
        yield engine
    finally:
        engine.close()


async def vectors(engine: Engine) -> NDArray[np.float32]:
    return np.array((await engine.run(KEY, ROWS)).rows, dtype=np.float32)


@pytest.mark.usefixtures("card")
async def test_a_model_in_fp8_says_so_and_takes_half(tmp_path: Path) -> None:
    kept = tmp_path / "measurements.json"
    with engine(dtype="bfloat16", device="cpu", measurements=kept) as exact:
        in_bfloat16, wanted = exact.loaded.result().models[KEY].card, await vectors(exact)
    with engine(dtype="fp8", measurements=kept) as small:
        loaded = small.loaded.result()
        card, found = loaded.models[KEY].card, await vectors(small)
        assert (card.dtype, in_bfloat16.dtype) == ("fp8", "bfloat16")
        assert "cosine to bfloat16 is 0.9" in card.dtype_reason
        assert 0.4 < card.weight_bytes / in_bfloat16.weight_bytes < 0.9  # less the embedding, which stays
        assert card.fingerprint == in_bfloat16.fingerprint  # of the same files
        assert model_fingerprint(card) != model_fingerprint(in_bfloat16)  # and not the same vectors
        assert not np.array_equal(found, wanted)
        cosines = np.sum(found * wanted, axis=1) / np.linalg.norm(found, axis=1) / np.linalg.norm(wanted, axis=1)
        assert cosines.min() > 0.95
        small.unload(KEY).result(60)
        assert small.load(KEY, lambda percent, message: None).result(60).card == card
        assert np.array_equal(await vectors(small), found)
    assert kept.read_text().count('"calibration"') == 2  # each type has its own


@pytest.mark.usefixtures("card")
async def test_clients_are_told_the_type(tmp_path: Path) -> None:
    """MiniLM takes 45 MB in bfloat16 and 35 in fp8: it fits into 40."""
    settings = {"embed_model": "auto", "rerank_model": "none", "dtype": "fp8", "device": "auto", "max_loaded_gb": 0.04}
    async with serving(**settings, state_dir=tmp_path) as client:
        [shown] = (await client.get("/dashboard/models")).json()["models"]
        assert (shown["state"], shown["dtype"]) == ("loaded", "fp8")
        assert 0.034e9 < shown["memory_bytes"] < 0.036e9
        assert float(shown["dtype_reason"].split(" is ")[1].split(" or ")[0]) > 0.98
        assert (await client.get("/v1/models")).json()["data"][0]["dtype"] == "fp8"
        assert (await client.get("/info")).json()["model_dtype"] == "fp8"
        assert list((await client.get("/capabilities")).json()["dtypes"].values()) == ["fp8"]
        assert 'dtype="fp8"' in (await client.get("/metrics")).text
        answer = await client.post("/v1/embeddings", json={"input": ["a text", "", "x" * 2000]})
        assert answer.status_code == 200
    with pytest.raises(StartupError, match=r"0\.05 GB"), engine(Path("auto"), device="cpu", max_loaded_gb=0.04):
        pass


async def test_elsewhere_the_start_says_why_not(tmp_path: Path) -> None:
    """Before a model is looked for."""
    with pytest.raises(StartupError) as refused, engine(tmp_path / "nowhere", dtype="fp8", device="auto"):
        pass
    assert refused.value.message.startswith("DTYPE=fp8 needs an NVIDIA card of compute capability 8.9 or newer")
    assert refused.value.message.endswith("is no such card: set DTYPE to auto, bfloat16 or float32.")
