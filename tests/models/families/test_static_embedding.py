"""Tables of token vectors equal sentence-transformers' StaticEmbedding on the same folder, model2vec's layouts too."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints.variants import Served, Variant, served
from tests.models.families import TinyModel
from tests.models.loaded import load_model
from tests.tiny_checkpoints import VOCAB, edit_json, tiny_static, write
from vecmill.core.types import Task
from vecmill.models.source import find

BUNDLED = find("auto").folder
TEXTS = (
    "one",
    "naïve 你好 ÉCOLE [MASK]",
    "def add(first, second):\n    return first + second",
    "a longer text " * 2000,
)


def static(**options: Any) -> Callable[[Path], Path]:
    return lambda folder: tiny_static(folder, BUNDLED, **options)


TINY = (TinyModel(Task.EMBED, "static_embedding", static(), layer_kinds=0),)


def tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        file = folder / "model.safetensors"
        save_file(change(load_file(file)), file)

    return changed


def potion(**others: torch.Tensor) -> Callable[[Path], None]:
    """As model2vec saves it, with a config.json that sentence-transformers does not read."""

    def change(folder: Path) -> None:
        table = load_file(folder / "model.safetensors")["embedding.weight"]
        rows = int(others["mapping"].max()) + 1 if "mapping" in others else len(table)
        save_file({"embeddings": table[:rows].contiguous(), **others}, folder / "model.safetensors")
        write(folder / "config.json", {
            "model_type": "model2vec", "architectures": ["StaticModel"], "tokenizer_name": "baai/bge-base-en-v1.5",
            "apply_pca": 256, "apply_zipf": True, "hidden_dim": 256, "seq_length": 1000000, "normalize": True,
        })  # fmt: skip
        modules = json.loads((folder / "modules.json").read_text("utf-8"))
        write(folder / "modules.json", [{**modules[0], "path": "."}, *modules[1:]])

    return change


def tokenizer(**keys: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "tokenizer.json", **keys)


def without_modules(folder: Path) -> None:
    potion()(folder)
    (folder / "modules.json").unlink()


MAPPING = torch.arange(VOCAB) % 1000
WEIGHTS = torch.rand(VOCAB, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.1
CUT = {"direction": "Right", "max_length": 50, "strategy": "LongestFirst", "stride": 0}


def row(name: str, base: Callable[[Path], Path], change: Callable[[Path], Any] | None = None, refused: str = "") -> Any:
    return Variant(name, base, change or (lambda folder: None), refused or None, texts=TEXTS)


VARIANTS = [
    row("own", static()),
    row("normalized", static(normalize=True)),
    row("in-a-folder", static(within="0_StaticEmbedding")),
    row("potion", static(normalize=True), potion()),
    row("potion-weights", static(), potion(weights=WEIGHTS)),
    row("potion-mapping", static(), potion(mapping=MAPPING, weights=WEIGHTS.float())),
    row("potion-mapping-alone", static(), potion(mapping=MAPPING.int())),
    row("cut", static(), tokenizer(truncation=CUT)),
    row("cut-left", static(), tokenizer(truncation=CUT | {"direction": "Left"})),
    # Refused.
    row("no-modules", static(), without_modules, "has no modules.json with a StaticEmbedding"),
    row("unknown-tensor", static(), tensors(lambda have: have | {"bias": torch.ones(16)}), "unknown weights ['bias']"),
    row("no-table", static(), tensors(lambda have: {"weights": WEIGHTS}), "missing: embedding.weight"),
    row("wrong-rows", static(), potion(mapping=MAPPING - 1), "mapping names rows that embeddings does not have"),
    row("an-empty-table", static(), tensors(lambda have: {"embeddings": torch.ones(0, 16)}), "which is no table"),
    row("fractions", static(), potion(mapping=MAPPING.float()), "mapping is no list of whole numbers"),
    row("too-few-weights", static(), potion(weights=WEIGHTS[:9].clone()), "weights"),
    row("int8", static(), tensors(lambda have: {"embeddings": have["embedding.weight"].char()}), "stored as I8"),
    row("no-tokenizer", static(), lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    row("config-key", static(), lambda folder: write(folder / "config.json", {"scale": 2}), "the key `scale`"),
    Variant("as-reranker", static(), refused="this is an embedding model", rerank=True),
]
SERVED = [variant for variant in VARIANTS if variant.refused is None]
REFUSED = [variant for variant in VARIANTS if variant.refused is not None]


@pytest.fixture(scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    async with served(VARIANTS, tmp_path_factory.mktemp("static")) as server:
        yield server


@pytest.mark.parametrize("variant", SERVED, ids=str)
async def test_equals_sentence_transformers(server: Served, variant: Variant) -> None:
    await server.assert_equal(variant)


@pytest.mark.parametrize("variant", REFUSED, ids=str)
def test_refused(variant: Variant, tmp_path: Path) -> None:
    variant.assert_refused(tmp_path)


async def test_a_text_without_tokens_is_refused_by_name_and_others_are_not(server: Served) -> None:
    answer = await server.client.post("/v1/embeddings", json={"model": "own", "input": ["one", ""]})
    assert answer.status_code == 400
    assert "1" in answer.json()["error"]["param"]


async def test_the_card(server: Served) -> None:
    cards = {card["id"]: card for card in (await server.client.get("/v1/models")).json()["data"]}
    assert (cards["own"]["dimensions"], cards["own"]["max_model_len"]) == (16, 1_000_000)
    assert cards["cut"]["max_model_len"] == 50


def test_another_value_is_another_model_to_the_cache(tmp_path: Path) -> None:
    prints = set()
    for seed in (0, 1):
        folder = tiny_static(tmp_path / f"{seed}" / "model", BUNDLED, seed=seed)
        prints.add(load_model(folder)[0].fingerprint.hex)
    folder = tmp_path / "0" / "model"
    for shift in (1, 2):
        tiny_static(folder, BUNDLED)
        potion(mapping=(MAPPING + shift) % 1000)(folder)
        prints.add(load_model(folder)[0].fingerprint.hex)
    assert len(prints) == 4
