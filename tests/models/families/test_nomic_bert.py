"""nomic-embed-text equals transformers' own class on a tiny checkpoint in the hub's layout.

nomic-embed-text-v2-moe, for which there is no such class, equals its mathematics written out for each text alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.conftest import serving
from tests.models.encoders import assert_near_in_bfloat16, refusal
from tests.models.families import TinyModel
from tests.models.loaded import ids, load_model, run, unit
from tests.oracle import nomic_encode
from tests.tiny_checkpoints import edit_json, plain_tokenizer, tiny_nomic, tiny_nomic_mixture, write
from vecmill.core.errors import StartupError
from vecmill.core.types import Row, Task
from vecmill.models.nomic_layers import ALL_EXPERTS_TOKENS, through_all_experts, through_own_experts
from vecmill.models.source import find

MIXTURE = TinyModel(Task.EMBED, "nomic_bert", tiny_nomic_mixture, layer_kinds=2, layout="mixture")
TINY = (TinyModel(Task.EMBED, "nomic_bert", lambda folder: tiny_nomic(folder, find("auto").folder)), MIXTURE)
TEXTS = ["one", "def add(a, b):\n    return a + b", "", "a longer text " * 40, "one", "naïve 你好"]


@pytest.mark.parametrize("prompt", ["", "search_query: ", "search_document: ", "clustering: "])
async def test_nomic_equals_transformers(tmp_path: Path, minilm_folder: Path, prompt: str) -> None:
    folder = tiny_nomic(tmp_path / "nomic-embed-text-v1.5", minilm_folder)
    task = {"search_query: ": "search_query", "search_document: ": "search_document", "clustering: ": "clustering"}
    fields = {"input_type": task[prompt]} if prompt else {}
    async with serving(embed_model=str(folder)) as client:
        vectors = (await client.post("/embed", json={"inputs": TEXTS, **fields})).json()
    np.testing.assert_allclose(np.array(vectors), nomic_encode(folder, TEXTS, prompt=prompt), atol=1e-5)


async def test_nomics_fewer_dimensions_are_layer_normed_first(tmp_path: Path, minilm_folder: Path) -> None:
    folder = tiny_nomic(tmp_path / "nomic-embed-text-v1.5", minilm_folder)
    edit_json(folder / "config.json", matryoshka_dimensions=[8, 16])
    async with serving(embed_model=str(folder)) as client:
        [card] = (await client.get("/v1/models")).json()["data"]
        assert card["supported_dimensions"] == [8, 16, 32]
        for dimensions in (8, 16, 32, None):
            answer = await client.post("/embed", json={"inputs": TEXTS, "dimensions": dimensions})
            fewer = dimensions if dimensions != 32 else None
            wanted = nomic_encode(folder, TEXTS, dimensions=fewer, layer_norm=fewer is not None)
            np.testing.assert_allclose(np.array(answer.json()), wanted, atol=1e-5)
        refused = await client.post("/v1/embeddings", json={"input": "x", "dimensions": 9})
        assert refused.status_code == 400
        assert "8, 16, 32" in refused.json()["error"]["message"]


class WrittenOut:
    """nomic-embed-text-v2-moe of one text, from config.json and the weights alone."""

    def __init__(self, folder: Path) -> None:
        self.config = json.loads((folder / "config.json").read_text("utf-8"))
        self.weights = load_file(folder / "model.safetensors")

    def linear(self, name: str, value: Tensor) -> Tensor:
        return value @ self.weights[f"{name}.weight"].T + self.weights.get(f"{name}.bias", torch.zeros(()))

    def norm(self, name: str, value: Tensor) -> Tensor:
        centred = value - value.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + self.config["layer_norm_epsilon"]).sqrt()
        normed: Tensor = scaled * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]
        return normed

    def rotated(self, value: Tensor) -> Tensor:
        """(heads, T, head_dim)"""
        half = value.shape[-1] // 2
        rates = self.config["rotary_emb_base"] ** -(torch.arange(half) / half)
        angles = torch.arange(value.shape[1])[:, None] * rates
        first, second = value.chunk(2, dim=-1)
        return torch.cat(
            [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], dim=-1
        )

    def attention(self, name: str, value: Tensor) -> Tensor:
        projected = self.linear(f"{name}.Wqkv", value).view(len(value), 3, self.config["n_head"], -1)
        query, key, held = projected.permute(1, 2, 0, 3)
        query, key = self.rotated(query), self.rotated(key)
        shares = torch.softmax(query @ key.transpose(1, 2) / query.shape[-1] ** 0.5, dim=-1)
        return self.linear(f"{name}.out_proj", (shares @ held).transpose(0, 1).flatten(1))

    def mixture(self, name: str, value: Tensor) -> Tensor:
        up, down = (
            self.weights[f"{name}.experts.mlp.{each}"].chunk(self.config["num_experts"]) for each in ("w1", "w2")
        )
        sums = []
        for token, share in zip(value, torch.softmax(self.linear(f"{name}.router.layer", value), dim=-1), strict=True):
            best = sorted(range(len(up)), key=lambda expert: -float(share[expert]))[: self.config["moe_top_k"]]
            whole = float(share[best].sum()) if self.config["moe_normalize_expert_weights"] else 1.0
            sums.append(sum(share[each] / whole * (gelu(up[each] @ token) @ down[each]) for each in best))
        return torch.stack(sums) + self.weights[f"{name}.experts.bias"]

    def feed_forward(self, number: int, name: str, value: Tensor) -> Tensor:
        every = self.config.get("moe_every_n_layers", 0)
        gates: dict[str, Callable[[Tensor], Tensor]] = {"geglu": gelu, "glu": torch.sigmoid}
        if every and number % every == 1:
            return self.mixture(name, value)
        if self.config["activation_function"] == "gelu":
            return self.linear(f"{name}.fc2", gelu(self.linear(f"{name}.fc1", value)))
        gate = gates[self.config["activation_function"]](self.linear(f"{name}.fc12", value))
        return self.linear(f"{name}.fc2", self.linear(f"{name}.fc11", value) * gate)

    @torch.inference_mode()
    def hidden_states(self, token_ids: list[int]) -> Tensor:
        """(T, width)"""
        embedded = self.weights["embeddings.word_embeddings.weight"][token_ids]
        hidden = self.norm("emb_ln", embedded + self.weights["embeddings.token_type_embeddings.weight"][0])
        for number in range(self.config["n_layer"]):
            layer = f"encoder.layers.{number}"
            hidden = self.norm(f"{layer}.norm1", hidden + self.attention(f"{layer}.attn", hidden))
            out = self.feed_forward(number, f"{layer}.mlp", hidden)
            hidden = self.norm(f"{layer}.norm2", hidden + out)
        return hidden


def gelu(value: Tensor) -> Tensor:
    return value * (1 + torch.erf(value / 2**0.5)) / 2


def mixture_vectors(folder: Path, texts: list[str], dimensions: int | None = None) -> NDArray[np.float32]:
    tokenizer = plain_tokenizer(folder)
    encoded = [tokenizer.encode(text).ids for text in texts]
    cut = [each[:127] + each[-1:] if len(each) > 128 else each for each in encoded]
    model = WrittenOut(folder)
    return unit(np.stack([model.hidden_states(each).mean(0).numpy()[:dimensions] for each in cut]))


@pytest.mark.parametrize("keys", [{}, {"moe_normalize_expert_weights": True, "moe_top_k": 3}], ids=str)
async def test_a_mixture_of_experts_equals_its_mathematics(tmp_path: Path, keys: dict[str, Any]) -> None:
    folder = tiny_nomic_mixture(tmp_path / "nomic-embed-text-v2-moe", **keys)
    edit_json(folder / "config.json", matryoshka_dimensions=[8, 32])
    async with serving(embed_model=str(folder)) as client:
        requests: list[tuple[dict[str, Any], str]] = [({}, ""), ({"input_type": "query"}, "search_query: ")]
        for fields, prompt in (*requests, ({"dimensions": 8}, "")):
            answer = await client.post("/v1/embeddings", json={"model": folder.name, "input": TEXTS, **fields})
            assert answer.is_success, answer.text
            vectors = [entry["embedding"] for entry in answer.json()["data"]]
            wanted = mixture_vectors(folder, [prompt + text for text in TEXTS], fields.get("dimensions"))
            np.testing.assert_allclose(np.array(vectors), wanted, atol=1e-5, rtol=0)


def test_a_mixtures_bfloat16_is_near(tmp_path: Path) -> None:
    assert_near_in_bfloat16(MIXTURE, tiny_nomic_mixture(tmp_path / "tiny"))


@pytest.mark.parametrize("tokens", [1, 7, ALL_EXPERTS_TOKENS + 5])
def test_all_experts_give_what_the_chosen_ones_give(tokens: int) -> None:
    """What CUDA computes and what a CPU does, with an expert that no token is for."""
    random = torch.Generator().manual_seed(0)
    up, down, given = (torch.randn(size, 6, generator=random) for size in (40, 40, tokens))
    chosen = torch.stack([torch.randperm(4, generator=random)[:2] for _ in range(tokens)])
    weights = torch.rand(tokens, 2, generator=random)
    own, every = (way(given, up, down, weights, chosen, 5) for way in (through_own_experts, through_all_experts))
    torch.testing.assert_close(own, every, atol=1e-4, rtol=1e-5)


def without_biases(folder: Path) -> Path:
    edit_json(folder / "config.json", qkv_proj_bias=False, mlp_fc1_bias=False)
    weights = load_file(folder / "model.safetensors")
    left = {
        name: each for name, each in weights.items() if not name.endswith((".Wqkv.bias", "out_proj.bias", "fc1.bias"))
    }
    save_file(left, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def with_prefix(folder: Path) -> Path:
    weights = load_file(folder / "model.safetensors")
    weights = {f"nomic_bert.{name}": each for name, each in weights.items()} | {"cls.x": torch.ones(1)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("change", [without_biases, with_prefix])
def test_a_mixtures_layouts(tmp_path: Path, change: Callable[[Path], Path]) -> None:
    folder = change(tiny_nomic_mixture(tmp_path / "tiny"))
    model = load_model(folder)[1]
    token_ids = [5, 6, 7, 200, 9]
    written = {name.removeprefix("nomic_bert."): each for name, each in load_file(folder / "model.safetensors").items()}
    save_file(written, folder / "model.safetensors", metadata={"format": "pt"})
    wanted = WrittenOut(folder).hidden_states(token_ids).mean(0).numpy()
    np.testing.assert_allclose(run(model, [Row(ids(*token_ids))])[0], wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("function", ["geglu", "glu"])
def test_other_gates_and_biases(tmp_path: Path, minilm_folder: Path, function: str) -> None:
    """Of v1.5's layout; a key of biases that is left out says that they are there."""
    folder = tiny_nomic(tmp_path / "tiny", minilm_folder)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    del config["mlp_fc2_bias"]
    write(
        folder / "config.json", {**config, "activation_function": function, "mlp_fc1_bias": True, "qkv_proj_bias": True}
    )
    weights, random = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(0)
    for name in [each for each in weights if ".mlp." in each or ".attn." in each]:
        weights[name.replace(".weight", ".bias")] = torch.randn(len(weights[name]), generator=random)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    token_ids = [5, 6, 7, 200, 9]
    wanted = WrittenOut(folder).hidden_states(token_ids).mean(0).numpy()
    vector = run(load_model(folder)[1], [Row(ids(*token_ids))])[0]
    np.testing.assert_allclose(vector, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"moe_top_k": 5}, "`moe_top_k`: 5; supported: a whole number from 1 to 4 (`num_experts`)"),
        ({"moe_top_k": None}, "`moe_top_k`: null"),
        ({"num_experts": 0}, "`num_experts`: 0; supported: from 1 on beside `moe_every_n_layers`"),
        ({"activation_function": "swiglu"}, '`activation_function`: "swiglu"'),
        ({"activation_function": "gelu_new"}, '`activation_function`: "gelu_new"'),
        ({"expert_choice_router": True}, "`expert_choice_router`: true; supported: false, null. Experts that choose"),
        ({"num_shared_experts": 1}, "`num_shared_experts`: 1"),
        ({"ffn_div": 2}, "`ffn_div`: 2"),
        ({"moe_normalize_expert_weights": 2}, "`moe_normalize_expert_weights`: 2"),
        ({"moe_jitter": 0.1}, "the key `moe_jitter`"),
    ],
    ids=str,
)
def test_mixtures_that_are_not_implemented_are_refused(tmp_path: Path, keys: dict[str, Any], expected: str) -> None:
    assert expected in refusal(lambda: tiny_nomic_mixture(tmp_path / "tiny"), Task.EMBED, **keys)


def test_weights_of_other_layers_than_config_json_says(tmp_path: Path) -> None:
    folder = tiny_nomic_mixture(tmp_path / "tiny")
    edit_json(folder / "config.json", moe_every_n_layers=0, num_experts=0)
    with pytest.raises(StartupError, match=r"do not fit NomicBert: .*missing .*layers\.1\.mlp\.down_proj"):
        load_model(folder)
    edit_json(folder / "config.json", moe_every_n_layers=2, num_experts=8)
    with pytest.raises(StartupError, match=r"layers\.1\.mlp\.up has the shape \(256, 32\) instead of \(512, 32\)"):
        load_model(folder)
