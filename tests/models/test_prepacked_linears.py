"""Linear layers whose weights are laid out once: the same answers, with or without the operations for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from tests.models.families import TinyModel, tiny_model, tiny_models
from tests.models.loaded import CPU, GOLDEN, load_model, run
from tests.tiny_checkpoints import edit_json
from vecmill.core.types import Row, Task
from vecmill.engine.device import cpu_rates
from vecmill.models import prepacked_linears
from vecmill.models.fused_norms import FusedGemmaRMSNorm, FusedLayerNorm, FusedRMSNorm
from vecmill.models.merged_projections import MergedAttention
from vecmill.models.networks import Model, tensors_of
from vecmill.models.networks import load_model as load_network
from vecmill.models.prepacked_linears import FusedGatedMLP, FusedIntermediate, FusedOutput, PrepackedLinear, prepack
from vecmill.models.weights import Target

ROUND_LESS = (FusedGatedMLP, FusedGemmaRMSNorm, FusedIntermediate, FusedLayerNorm, FusedOutput, FusedRMSNorm)

QUICK = {"embed-qwen3", "rerank-modernbert", "embed-nomic_bert-mixture", "embed-jina_embeddings_v3", "embed-t5"}


@pytest.fixture(autouse=True)
def tried_anew() -> Iterator[None]:
    prepacked_linears._is_right.cache_clear()
    yield
    prepacked_linears._is_right.cache_clear()


def linears(model: Model, kind: type[nn.Module]) -> int:
    return sum(type(part) is kind for module in model.modules for part in module.modules())


@pytest.mark.parametrize(
    "tiny",
    [
        pytest.param(tiny, id=str(tiny), marks=() if str(tiny) in QUICK else pytest.mark.nightly)
        for tiny in tiny_models()
    ],
)
def test_a_prepacked_model_answers_as_before(tmp_path: Path, tiny: TinyModel) -> None:
    random = np.random.default_rng(0)
    folder = tiny.write(tmp_path / "tiny")
    _, model = load_model(folder, tiny.task, torch.bfloat16)
    rows = [tiny.row(length, model.vocab_size, random) for length in (1, 3, 17, 64, 90)]
    before, size = run(model, rows), sum(tensor.nbytes for tensor in tensors_of(model).values())
    plain = linears(model, nn.Linear)
    exchanged = prepack(model)
    assert linears(model, PrepackedLinear) >= exchanged  # one may be in several places
    assert linears(model, nn.Linear) <= plain - exchanged
    assert sum(tensor.nbytes for tensor in tensors_of(model).values()) == size
    if any(linears(model, kind) for kind in ROUND_LESS):
        assert_as_exact(folder, tiny, model)
    else:
        np.testing.assert_allclose(run(model, rows), before, rtol=0, atol=2e-3 * max(1.0, float(np.abs(before).max())))


def assert_as_exact(folder: Path, tiny: TinyModel, model: Model) -> None:
    """Fused layers round less, so their bits differ: they must be as near to float32 with the same weights."""
    _, plain = load_model(folder, tiny.task, torch.bfloat16)
    _, exact = load_model(folder, tiny.task, torch.float32)
    for module, rounded in zip(exact.modules, plain.modules, strict=True):
        module.load_state_dict(rounded.state_dict())
    random = np.random.default_rng(0)
    rows = [tiny.row(length, model.vocab_size, random) for length in range(1, 100)]
    wanted = run(exact, rows)
    assert np.linalg.norm(run(model, rows) - wanted) <= 1.2 * np.linalg.norm(run(plain, rows) - wanted)


@pytest.mark.parametrize(
    ("hidden_act", "fused"), [("gelu", 2), ("relu", 2), ("gelu_new", 2), ("silu", 2), ("quick_gelu", 0), ("tanh", 0)]
)
@pytest.mark.parametrize("model_type", ["bert", "roberta"])  # of this package, and of transformers
def test_what_follows_a_layer_is_computed_with_it_where_it_can_be(
    tmp_path: Path, model_type: str, hidden_act: str, fused: int
) -> None:
    tiny = tiny_model(Task.EMBED, model_type)
    folder = tiny.write(tmp_path / "tiny")
    edit_json(folder / "config.json", hidden_act=hidden_act)
    _, model = load_model(folder, tiny.task, torch.bfloat16)
    prepack(model)
    assert linears(model, FusedIntermediate) == fused
    assert linears(model, FusedOutput) == 4
    assert_as_exact(folder, tiny, model)


@pytest.mark.parametrize(
    ("model_type", "kind", "count"),
    [
        ("albert", FusedIntermediate, 1),  # its layers are one
        ("albert", FusedLayerNorm, 2),  # that of the embeddings is narrower than a step
        ("gemma3_text", FusedGemmaRMSNorm, 13),  # four in each layer, one at the end; those of heads are narrower
        ("modernbert", MergedAttention, 5),
        ("modernbert", FusedGatedMLP, 5),
        ("distilbert", FusedIntermediate, 2),
        ("gte", FusedGatedMLP, 2),
        ("jina_bert", FusedGatedMLP, 2),
        ("nomic_bert", FusedGatedMLP, 2),
        ("qwen3", FusedGatedMLP, 2),
        ("qwen3", FusedRMSNorm, 9),  # four in each layer, one at the end
        ("gemma3_text", FusedGatedMLP, 3),
        ("gemma3_text", FusedRMSNorm, 0),
    ],
)
def test_layers_of_every_kind_are_computed_with_what_follows(
    tmp_path: Path, model_type: str, kind: type[nn.Module], count: int
) -> None:
    tiny = tiny_model(Task.EMBED, model_type)
    _, model = load_model(tiny.write(tmp_path / "tiny"), tiny.task, torch.bfloat16)
    prepack(model)
    assert linears(model, kind) == count
    within = {id(part) for module in model.modules for part in module.modules()}
    assert all(id(layer) in within for layer in model.layers)  # whoever acts on them acts on what runs


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_a_norm_is_rounded_as_transformers_rounds_it(size: float) -> None:
    norm = Qwen3RMSNorm(96, 1e-6).bfloat16()
    norm.weight.data = torch.randn(96).bfloat16()
    hidden = (size * torch.randn(1, 32, 96)).bfloat16()
    fused = FusedRMSNorm(norm.weight, 1e-6)
    assert (fused(hidden) == norm(hidden)).float().mean() > 0.99
    torch.testing.assert_close(fused(hidden), norm(hidden), rtol=2**-7, atol=0)
    hidden[0, 3, 5] = torch.inf
    assert fused(hidden).isfinite().all(dim=2)[0].tolist() == [row != 3 for row in range(32)]


class ShiftedRMSNorm(nn.Module):
    """Named as an RMS norm, with the same attributes, and another function in some channels."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(weight), 1e-6

    def forward(self, hidden_states: Tensor) -> Tensor:
        shifted: Tensor = FusedRMSNorm(self.weight + 1, 1e-6)(hidden_states)
        return shifted


@pytest.mark.parametrize("largest", [1.0, 150.0, 10_000.0])
def test_a_norm_of_another_kind_stays(largest: float) -> None:
    weight = torch.rand(96).bfloat16()
    weight[5] = largest
    assert prepacked_linears._fused(ShiftedRMSNorm(weight)) is None


def test_only_layers_in_bfloat16_are_exchanged() -> None:
    _, exact = load_model(GOLDEN / "qwen3" / "embedding", dtype=torch.float32)
    _, rounded = load_model(GOLDEN / "qwen3" / "embedding", dtype=torch.bfloat16)
    assert prepack(exact) == 0
    assert prepack(rounded) > 0
    assert prepack(rounded) == 0  # they are already


def test_who_shares_a_network_has_its_layers_exchanged_too() -> None:
    checkpoint, _ = load_model(GOLDEN / "qwen3" / "embedding")
    target = Target(torch.bfloat16, CPU)
    first, second = load_network(checkpoint, target), load_network(checkpoint, target)
    rows = [Row(np.arange(1, 30, dtype=np.int32))]
    assert prepack(first) > 0
    assert linears(second, nn.Linear) == linears(first, nn.Linear)
    np.testing.assert_array_equal(run(second, rows), run(first, rows))
    assert_as_exact(GOLDEN / "qwen3" / "embedding", tiny_model(Task.EMBED, "qwen3"), second)


def refuse(*_: Any) -> Tensor:
    raise RuntimeError("no such operation")


@pytest.mark.parametrize(
    "wrong", [refuse, lambda hidden, weight, *_: hidden.new_zeros(*hidden.shape[:-1], weight.shape[0])]
)
def test_layers_stay_where_the_operation_is_missing_or_wrong(
    monkeypatch: pytest.MonkeyPatch, wrong: Any, caplog: pytest.LogCaptureFixture
) -> None:
    _, model = load_model(GOLDEN / "qwen3" / "embedding", dtype=torch.bfloat16)
    rows = [Row(np.arange(1, 30, dtype=np.int32))]
    before = run(model, rows)
    with caplog.at_level("INFO"):
        monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", wrong)
        assert prepack(model) == 0
    assert "the product of linear layers stays as torch has it" in caplog.text
    np.testing.assert_array_equal(run(model, rows), before)


def test_what_follows_stays_where_only_that_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    operation = torch.ops.mkldnn._linear_pointwise

    def plain(hidden: Tensor, weight: Tensor, bias: Tensor | None, activation: str, *rest: Any) -> Tensor:
        out: Tensor = operation(hidden, weight, bias, "none", *rest)
        return out

    tiny = tiny_model(Task.EMBED, "bert")
    _, model = load_model(tiny.write(tmp_path / "tiny"), tiny.task, torch.bfloat16)
    rows = [Row(np.arange(1, 30, dtype=np.int32))]
    before = run(model, rows)
    with caplog.at_level("INFO"):
        monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", plain)
        assert prepack(model) > 0
    assert (linears(model, FusedIntermediate), linears(model, FusedOutput)) == (0, 0)
    assert "what follows the product (gelu) stays as torch has it" in caplog.text
    assert "what follows the product (add) stays" in caplog.text
    np.testing.assert_allclose(run(model, rows), before, rtol=0, atol=2e-3)


def test_a_value_that_is_not_finite_stays_its_own_rows() -> None:
    linear = nn.Linear(64, 32).bfloat16()
    hidden = torch.ones(1, 3, 64, dtype=torch.bfloat16)
    hidden[0, 1, 5] = torch.nan
    out = PrepackedLinear(linear)(hidden)
    assert out.isfinite().all(dim=2)[0].tolist() == [True, False, True]


@pytest.mark.parametrize("shape", [(1, 0, 64), (7, 64), (64,), (2, 5, 64)])
def test_of_any_shape_as_the_layer_that_it_stands_for(shape: tuple[int, ...]) -> None:
    linear = nn.Linear(64, 33, bias=False).bfloat16()
    hidden = torch.randn(shape).bfloat16()
    torch.testing.assert_close(PrepackedLinear(linear)(hidden), linear(hidden), rtol=0.01, atol=0.01)


def test_from_a_view_that_is_not_contiguous() -> None:
    linear = nn.Linear(64, 33).bfloat16()
    hidden = torch.randn(64, 9).bfloat16().T
    torch.testing.assert_close(PrepackedLinear(linear)(hidden), linear(hidden), rtol=0.01, atol=0.01)


@pytest.mark.parametrize("layers", [-1, 3])  # -1: it ends in the trial
def test_where_memory_ends_on_the_way_whoever_loads_the_network_again_has_all_of_it(
    monkeypatch: pytest.MonkeyPatch, layers: int
) -> None:
    checkpoint, _ = load_model(GOLDEN / "qwen3" / "embedding")
    target = Target(torch.bfloat16, CPU)
    model = load_network(checkpoint, target)
    done = list[Tensor]()
    reorder = torch.ops.mkldnn._reorder_linear_weight

    def end(weight: Tensor, tokens: int) -> Tensor:
        if len(done) == 1 + layers:  # the first is the trial's
            raise MemoryError
        done.append(weight)
        out: Tensor = reorder(weight, tokens)
        return out

    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", end)
    with pytest.raises(MemoryError):
        prepack(model)
    monkeypatch.undo()
    again = load_network(checkpoint, target)
    folder, tiny = GOLDEN / "qwen3" / "embedding", tiny_model(Task.EMBED, "qwen3")
    assert_as_exact(folder, tiny, again)
    assert prepack(again) > 0
    assert linears(again, nn.Linear) == 0
    assert_as_exact(folder, tiny, again)


def test_a_type_is_rated_by_the_layers_that_models_get() -> None:
    # torch 2.11 warns where events of more than one cycle are not asked for.
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, acc_events=True) as profile:
        rates = cpu_rates(64)
    assert set(rates) == {torch.float32, torch.bfloat16}
    assert all(rate > 0 for rate in rates.values())
    assert any(event.key == "mkldnn::_linear_pointwise" for event in profile.key_averages())


def test_a_head_which_is_in_float32_stays(tmp_path: Path) -> None:
    tiny = next(tiny for tiny in tiny_models() if str(tiny) == "rerank-modernbert")
    _, model = load_model(tiny.write(tmp_path / "tiny"), tiny.task, torch.bfloat16)
    assert prepack(model) > 0
    assert linears(model, nn.Linear) > 0
