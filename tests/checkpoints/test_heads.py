"""Dense, LayerNorm and Normalize around the pooling: as in sentence-transformers, or refused by name."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from tests.checkpoints import variants
from tests.checkpoints.variants import TOLERANCE, Served, Variant, refusal, served
from tests.models.loaded import load_model, unit
from tests.tiny_checkpoints import add_heads, edit_json, tiny_bert, tiny_head, tiny_xlm_roberta, write
from vecmill.core.types import Row
from vecmill.models import modules
from vecmill.models.heads import load_heads
from vecmill.models.modules import Head
from vecmill.models.packing import pack
from vecmill.models.source import find
from vecmill.models.weights import Target

TEXTS = tuple(text for text in variants.TEXTS if "<pad>" not in text)
IDENTITY = "torch.nn.modules.linear.Identity"
CPU = torch.device("cpu")

Base = Callable[[Path], Any]


def bert(*heads: dict[str, Any], pooling: str = "mean_tokens") -> Base:
    """A tiny BERT with the modules after its pooling, or before it where they say so."""

    def base(folder: Path) -> None:
        add_heads(tiny_bert(folder, find("auto").folder, pooling=pooling), *heads)

    return base


def dense(in_features: int, out_features: int, **config: Any) -> dict[str, Any]:
    return {"kind": "Dense", "in_features": in_features, "out_features": out_features, **config}


def pooling() -> dict[str, Any]:
    return {"kind": "Pooling"}


def normalize(**config: Any) -> dict[str, Any]:
    return {"kind": "Normalize", **config}


LAYER_NORM = {"kind": "LayerNorm", "dimension": 32}
TOKENS = {"module_input_name": "token_embeddings"}


def with_xlm_roberta(folder: Path) -> None:
    add_heads(tiny_xlm_roberta(folder), dense(32, 16, activation_function="torch.nn.modules.activation.Tanh"))


def change(config: dict[str, Any], module: str = "2_Dense") -> Callable[[Path], Any]:
    return lambda folder: edit_json(folder / module / "config.json", **config)


def without(key: str) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        content = {"in_features": 32, "out_features": 16}
        del content[key]
        write(folder / "2_Dense" / "config.json", content)

    return change


def weights(**tensors: torch.Tensor) -> Callable[[Path], Any]:
    named = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    return lambda folder: save_file(named, folder / "2_Dense" / "model.safetensors")


def pickled(folder: Path) -> None:
    (folder / "2_Dense" / "model.safetensors").rename(folder / "2_Dense" / "pytorch_model.bin")


def row(name: str, base: Base, change: Callable[[Path], Any] = variants.unchanged, refused: str = "") -> Variant:
    return Variant(name, base, change, refused or None, texts=TEXTS)


ONE = bert(dense(32, 16))
VARIANTS = [
    # The layouts of models on the hub.
    row("labse", bert(
        dense(32, 32, bias=True, activation_function="torch.nn.modules.activation.Tanh"), normalize(),
        pooling="cls_token",
    )),
    row("distiluse", with_xlm_roberta),
    row("stella", bert(dense(32, 48, bias=True, activation_function=IDENTITY))),
    row("embeddinggemma", bert(
        dense(32, 96, bias=False, activation_function=IDENTITY),
        dense(96, 32, bias=False, activation_function=IDENTITY), normalize(),
    )),
    # Others.
    row("defaults", ONE),
    row("layer-norm", bert(LAYER_NORM)),
    row("layer-norm-between", bert(LAYER_NORM, dense(32, 8), normalize())),
    row("normalize-first", bert(normalize(), dense(32, 16))),
    row("normalize-twice", bert(normalize(), dense(32, 16), normalize(), normalize())),
    row("normalize-alone-twice", bert(normalize(), normalize())),
    row("residual", bert(dense(32, 32, use_residual=True))),
    row("residual-projected", bert(dense(32, 24, use_residual=True))),
    row("of-tokens", bert(dense(32, 24, **TOKENS), normalize(**TOKENS), pooling())),
    row("of-tokens-and-vectors", bert(normalize(**TOKENS), pooling(), dense(32, 8), normalize())),
    row("normalize-of-what-is-not-there-yet", bert(normalize(), pooling())),
    row("normalize-of-what-is-pooled-already", bert(normalize(**TOKENS))),
    row("glu", bert(dense(32, 24, activation_function="torch.nn.modules.activation.GLU"), dense(12, 8))),
    # Refused.
    row("function", ONE, change({"activation_function": "torch.tanh"}), '`activation_function`: "torch.tanh"; supp'),
    row("own-class", ONE, change({"activation_function": "my.Swish"}), "takes Tanh"),
    row("no-activation", ONE, change({"activation_function": None}), "`activation_function`: null"),
    row("with-arguments", ONE, change({"activation_function": "torch.nn.Threshold"}), "`activation_function`"),
    row("dense-key", ONE, change({"temperature": 2}), "the key `temperature`"),
    row("from-another", ONE, change({"module_input_name": "logits"}), '`module_input_name`: "logits"'),
    row("into-another", ONE, change({"module_output_name": "token_embeddings"}), "`module_output_name`"),
    row("of-tokens-too-late", ONE, change(TOKENS), '`module_input_name`: "token_embeddings"; supported: "sentence_emb'),
    row("half-of-odd", ONE, change({"out_features": 15, "activation_function": "torch.nn.GLU"}), "halves an even"),
    row("no-width", ONE, without("in_features"), "leaves out `in_features`"),
    row("no-config", ONE, lambda folder: (folder / "2_Dense" / "config.json").unlink(), "leaves out `in_features`"),
    row("another-width", ONE, change({"in_features": 64}), "its Dense takes 64 values, and it gets 32"),
    row("norm-of-another-width", bert(LAYER_NORM), change({"dimension": 64}, "2_LayerNorm"), "its LayerNorm takes 64"),
    row("another-shape", ONE, change({"out_features": 8}), "2_Dense/linear.weight has the shape (16, 32)"),
    row("no-weights", ONE, lambda folder: (folder / "2_Dense" / "model.safetensors").unlink(), "2_Dense/model.safeten"),
    row("pickled", ONE, pickled, "2_Dense/ has only a pickle"),
    row("no-bias", ONE, weights(linear__weight=torch.ones(16, 32)), "1 weight is missing: 2_Dense/linear.bias"),
    row("unread-bias", bert(dense(32, 16, bias=True)), change({"bias": False}), "1 unknown weights ['2_Dense/linear"),
    row("infinite", ONE, weights(linear__weight=torch.full((16, 32), torch.inf), linear__bias=torch.ones(16)), "finit"),
    row("quantised", ONE, weights(linear__weight=torch.ones(16, 32).char(), linear__bias=torch.ones(16)), "as I8"),
]  # fmt: skip
SERVED = [variant for variant in VARIANTS if variant.refused is None]
REFUSED = [variant for variant in VARIANTS if variant.refused is not None]


@pytest.fixture(scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    async with served(VARIANTS, tmp_path_factory.mktemp("heads")) as server:
        yield server


@pytest.mark.parametrize("variant", SERVED, ids=str)
async def test_vectors_equal_the_references(server: Served, variant: Variant) -> None:
    raw = await asyncio.to_thread(_encode, server.folders[variant.name], variant.texts)
    np.testing.assert_allclose(await server.vectors(variant), unit(raw), atol=TOLERANCE, rtol=0)
    if np.abs(np.linalg.norm(raw, axis=1) - 1).min() > 1e-3:  # `normalize: false` leaves out a Normalize at the end
        measured = await server.vectors(variant, normalize=False)
        np.testing.assert_allclose(measured, raw, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("variant", REFUSED, ids=str)
def test_refused(variant: Variant, tmp_path: Path) -> None:
    variant.assert_refused(tmp_path)


@pytest.mark.parametrize("normalized", [False, True], ids=["raw", "unit"])
async def test_dimensions_cut_what_the_last_module_gives(tmp_path: Path, normalized: bool) -> None:
    """As sentence-transformers cuts them; which sizes there are is said in config.json."""
    base = bert(dense(32, 48), *([normalize()] if normalized else []))
    cut = Variant("cut", base, lambda folder: edit_json(folder / "config.json", matryoshka_dimensions=[8, 40]))
    async with served([cut, Variant("whole", base)], tmp_path) as server:
        cards = {card["id"]: card for card in (await server.client.get("/v1/models")).json()["data"]}
        assert cards["cut"]["supported_dimensions"] == [8, 40, 48]
        assert cards["whole"]["supported_dimensions"] == [48]
        for size in (8, 40, 48):
            expected = await asyncio.to_thread(_encode, server.folders["cut"], cut.texts, size)
            measured = await server.vectors(cut, dimensions=size)
            np.testing.assert_allclose(measured, unit(expected), atol=TOLERANCE, rtol=0)
            if not normalized:
                measured = await server.vectors(cut, dimensions=size, normalize=False)
                np.testing.assert_allclose(measured, expected, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("path", sorted(modules.ACTIVATION_PATHS))
def test_every_activation_equals_the_references(tmp_path: Path, path: str) -> None:
    from sentence_transformers.base.modules import Dense  # slow to import

    folder = tiny_bert(tmp_path / "model", find("auto").folder)
    add_heads(folder, dense(32, 16, activation_function=path))
    reference = Dense.load(str(folder), subfolder="2_Dense").eval()
    checkpoint, _ = load_model(folder)
    heads = load_heads(checkpoint, checkpoint.heads, Target(torch.float32, CPU))
    vectors = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)) * 3
    with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
        # Where a class has no dimension torch guesses it, and warns.
        patch.setattr("warnings.warn", lambda *_, **__: None)
        wanted = reference({"sentence_embedding": vectors})["sentence_embedding"]
        torch.testing.assert_close(heads(vectors), wanted, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(heads(vectors[2:3]), wanted[2:3], atol=1e-6, rtol=1e-6)


def test_no_other_class_of_torch_works_in_the_reference() -> None:
    """Those that are left out take arguments, or more than a vector, or are no activations."""
    known = {*modules.ACTIVATIONS, "Threshold", "MultiheadAttention", "Softmax2d"}
    assert known >= set(torch.nn.modules.activation.__all__)


@torch.inference_mode()
def test_heads_are_float32_behind_a_bfloat16_transformer(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    bert(dense(32, 48), LAYER_NORM | {"dimension": 48})(folder)
    _, model = load_model(folder, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.modules[0].parameters()} == {torch.bfloat16}
    assert {parameter.dtype for part in model.modules[1:] for parameter in part.parameters()} == {torch.float32}
    rows = [Row(np.arange(1000, 1000 + length, dtype=np.int32)) for length in (3, 20, 60)]
    rounded = unit(model.forward(pack(rows, CPU)).numpy())
    exact = unit(load_model(folder)[1].forward(pack(rows, CPU)).numpy())
    assert (rounded * exact).sum(axis=1).min() > 0.999


def test_another_value_in_a_head_is_another_model_to_the_cache(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    ONE(folder)
    prints = set()
    for seed in (2, 3):
        tiny_head(folder / "2_Dense", **dense(32, 16), seed=seed)
        prints.add(load_model(folder)[0].fingerprint.hex)
    assert len(prints) == 2


def test_the_module_of_a_reranker_is_refused(tmp_path: Path) -> None:
    ONE(tmp_path / "model")
    assert "this is an embedding model" in refusal(tmp_path / "model", rerank=True)


def test_a_head_says_what_it_makes() -> None:
    assert Head("LayerNorm", "", {"dimension": 32}).width(32) == 32
    assert Head("Dense", "", {"in_features": 32, "out_features": 8}).width(32) == 8


def _encode(folder: Path, texts: Sequence[str], dimensions: int | None = None) -> NDArray[np.float32]:
    from sentence_transformers import SentenceTransformer  # slow to import

    model = SentenceTransformer(str(folder), device="cpu", truncate_dim=dimensions)
    encoded: NDArray[np.float32] = model.encode(list(texts), show_progress_bar=False)
    return encoded
