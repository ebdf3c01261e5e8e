"""Linear layers in float8 against float32: how far off, on rows of every kind, and in whole models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.models.families import TinyModel, every_family, tiny_model
from tests.models.loaded import CPU, load_model, run, unit
from tests.tiny_checkpoints import tiny_bert
from vecmill.core.errors import StartupError
from vecmill.core.types import Row, Task
from vecmill.engine import float8_models
from vecmill.engine.float8_models import LEAST_COSINE, can_be_rounded, load_in_float8, loads_on
from vecmill.hardware.memory import GIGABYTE, GpuRoom, HostMemory
from vecmill.models.checkpoint import Source, read
from vecmill.models.float8 import (
    LARGEST,
    PRODUCTS,
    Float8Linear,
    Product,
    in_float8,
    linears,
    product_on,
    round_weight,
    rounded,
    to_float8,
)
from vecmill.models.networks import Model
from vecmill.models.packing import Attention
from vecmill.models.samples import TEXTS, sample_rows
from vecmill.models.tokenizer_loading import load_tokenizer
from vecmill.models.weight_files import linear_parameters
from vecmill.models.weights import Target

GENERATOR = torch.Generator().manual_seed(0)
WIDTH, OUT = 256, 64
NOT_FINITE = [float("nan"), float("inf"), float("-inf")]


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR)


WEIGHT, BIAS = random(OUT, WIDTH) * torch.logspace(-3, 3, OUT)[:, None], random(OUT)


def layer(product: Product, weight: Tensor = WEIGHT, bias: Tensor | None = BIAS) -> Float8Linear:
    return Float8Linear(*round_weight(weight.bfloat16()), None if bias is None else bias.bfloat16(), product)


def errors(hidden: Tensor, product: Product) -> Tensor:
    """Of each row: how far off it is, as a share of what its rounding can do at most."""
    out = layer(product, bias=None)(hidden.bfloat16()).double()
    exact = hidden.bfloat16().double() @ WEIGHT.bfloat16().double().t()
    # Half a unit in the last of three bits (2^-4) on both sides, and the smallest number (2^-9, half of it) for each
    # value near zero; bfloat16 rounds the result by 2^-9 twice.
    size, scale = hidden.bfloat16().double().abs(), hidden.bfloat16().double().abs().amax(1, keepdim=True) / LARGEST
    rough = WEIGHT.bfloat16().double().abs()
    bound = (size * 2**-4 + scale * 2**-10) @ rough.t() * 1.1
    bound += (size * 1.1) @ (rough * 2**-4 + rough.amax(1, keepdim=True) / LARGEST * 2**-10).t() + 2**-7 * exact.abs()
    worst: Tensor = ((out - exact).abs() / bound.clamp_min(1e-300)).amax(1)
    return worst


def runs(product: Product) -> bool:
    """Whether this torch's CPU has its kernel: that of 2.11 has none."""
    try:
        layer(product)(random(1, WIDTH).bfloat16())
    except NotImplementedError:
        return False
    return True


HERE = [product for product in PRODUCTS if runs(product)]
products = pytest.mark.parametrize("product", HERE, ids=lambda product: product.__name__)


@products
def test_a_product_is_off_by_the_rounding_of_its_factors_at_most(product: Product) -> None:
    hidden = random(64, WIDTH) * torch.logspace(-6, 6, 64)[:, None]
    hidden[7] = 0
    hidden[8, 3] = 1e6 * hidden[8].abs().max()  # an outlier: all else of its row is small beside it
    hidden[9] = 1e30
    hidden[10] = 1e-30
    assert errors(hidden, product).max() < 1
    assert not layer(product, bias=None)(torch.zeros(1, WIDTH, dtype=torch.bfloat16)).any()


@products
def test_the_usual_product_is_closer_than_that(product: Product) -> None:
    hidden, weight = random(64, WIDTH).bfloat16(), random(OUT, WIDTH).bfloat16()
    exact = hidden.float() @ weight.float().t()
    off = layer(product, weight, None)(hidden).float() - exact
    assert 0.01 < off.norm() / exact.norm() < 0.05  # of 4 %: three bits are not more


@products
@pytest.mark.parametrize("value", NOT_FINITE)
def test_a_value_that_is_not_finite_is_its_own_rows_error(product: Product, value: float) -> None:
    hidden = random(4, 5, WIDTH).bfloat16()
    wanted = layer(product)(hidden)
    hidden[2, 3, 100] = value
    found = layer(product)(hidden)
    assert not found[2, 3].isfinite().any()
    found[2, 3] = wanted[2, 3]
    assert torch.equal(found, wanted)


@products
def test_a_row_does_not_depend_on_the_others(product: Product) -> None:
    hidden = random(8, WIDTH).bfloat16()
    linear = layer(product)
    assert torch.equal(linear(hidden)[5:6], linear(torch.cat([hidden[5:6], 1e5 * random(3, WIDTH).bfloat16()]))[:1])


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=8))
def test_rounding_keeps_every_row_within_half_a_unit(values: list[float]) -> None:
    row = torch.tensor([values])
    small, scale = rounded(row)
    back = small.double() * scale.double()
    assert back.isfinite().all()
    assert ((back - row.double()).abs() <= row.double().abs() * 2**-4 * 1.001 + scale * 2**-10 * 1.001).all()
    assert torch.equal(rounded(-row)[0].float(), -small.float())


@pytest.mark.skipif(len(HERE) < len(PRODUCTS), reason="this torch has no kernel for CPUs")
def test_what_multiplies_is_found_out_by_trying(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card whose kernel is not there, one whose kernel gives other numbers, one that has neither."""
    assert product_on(CPU) is next(iter(PRODUCTS))
    given = torch.nn.functional.scaled_mm

    def without_rows(*arguments: object, **named: object) -> Tensor:
        if torch.nn.functional.ScalingType.RowWise in arguments:
            raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasLtMatmulAlgoGetHeuristic`")
        result: Tensor = given(*arguments, **named)  # type: ignore[arg-type]
        return result

    names = []
    for kernel in (without_rows, lambda *_, **__: given(*_, **__) * 1.1):
        monkeypatch.setattr(torch.nn.functional, "scaled_mm", kernel)
        product_on.cache_clear()
        names.append(product_on(CPU).__name__)
    product_on.cache_clear()
    assert names == ["scaled_afterwards", "in_bfloat16"]
    assert "no faster" in PRODUCTS[list(PRODUCTS)[2]]


OF_EACH_KIND = (
    *("embed-bert-heads", "rerank-deberta-v2", "embed-qwen3", "rerank-qwen3-two-labels", "embed-nvembed"),
    *("embed-nomic_bert-mixture", "embed-jina_embeddings_v3", "embed-static_embedding"),
)


@pytest.mark.parametrize(
    "tiny",
    [
        pytest.param(each.values[0], id=each.id, marks=() if each.id in OF_EACH_KIND else pytest.mark.nightly)
        for each in every_family()
    ],
)
def test_every_familys_linear_layers_are_rounded(tiny: TinyModel, tmp_path: Path) -> None:
    checkpoint, model = load_model(tiny.write(tmp_path / "tiny"), tiny.task, torch.bfloat16)
    exact, rounding = load_model(checkpoint.folder, tiny.task, torch.bfloat16)[1], linears(model.layers)
    assert rounding or not can_be_rounded(checkpoint)
    if not can_be_rounded(checkpoint):  # a table, or layers with adapters
        return
    before = sum(each.weight.numel() for each in rounding)
    rows = sample_rows(checkpoint, load_tokenizer(checkpoint))
    assert len(rows) == len(TEXTS) == 32
    comparison = to_float8(model, rows, CPU, Attention.SDPA)
    assert in_float8(model.layers)
    assert not linears(model.layers)
    if tiny.model_type != "gemma":  # whose keys have too few rows here to be rounded by themselves
        assert linear_parameters(checkpoint.weight_files, checkpoint.network.rename)[0] == before
    # Tiny models of random weights are far from trained ones: they are close enough to see that it is the same model.
    assert 0.4 < comparison.least_cosine < 0.9999
    assert (comparison.relevance is None) is (tiny.task is Task.EMBED)
    found, wanted = run(model, rows), run(exact, rows)
    if tiny.task is Task.EMBED:
        assert np.sum(unit(found) * unit(wanted), axis=1).min() == pytest.approx(comparison.least_cosine, abs=1e-4)
    assert str(round(comparison.least_cosine, 4)) in comparison.sentence


def test_one_row_that_is_not_finite_leaves_its_batch_alone(tmp_path: Path, minilm_folder: Path) -> None:
    """A token whose embedding is NaN: what a damaged model gives, not what it may do to others."""
    checkpoint, model = load_model(tiny_bert(tmp_path / "tiny", minilm_folder), dtype=torch.bfloat16)
    to_float8(model, sample_rows(checkpoint, load_tokenizer(checkpoint)), CPU, Attention.SDPA)
    rows = [Row(np.array(ids, dtype=np.int32)) for ids in ([101, 2003, 102], [101, 7, 102], [101, 7592, 2088, 102])]
    wanted = run(model, rows)
    with torch.no_grad():
        model.modules[0].get_parameter("embeddings.word_embeddings.weight")[7] = float("nan")
    found = run(model, rows)
    assert np.isfinite(found).all(axis=1).tolist() == [True, False, True]
    assert np.array_equal(found[[0, 2]], wanted[[0, 2]])


def loaded(tiny: TinyModel, folder: Path) -> tuple[Model, str, Target]:
    checkpoint, target = read(Source("tiny", tiny.write(folder / "tiny"), tiny.task)), Target(torch.bfloat16, CPU)
    model, reason = load_in_float8(
        checkpoint, load_tokenizer(checkpoint), target, lambda model: Attention.SDPA, None, 10**15
    )
    return model, reason, target


def test_a_model_that_is_close_enough_says_how_close(tmp_path: Path) -> None:
    model, reason, target = loaded(tiny_model(Task.EMBED, "qwen3"), tmp_path)
    cosine = float(reason.split(" is ")[1].split(" or ")[0])
    assert LEAST_COSINE <= cosine < 1
    assert reason.startswith("DTYPE=fp8: the cosine to bfloat16 is 0.9")
    assert "32 texts" in reason
    assert list(target.shared.values()) == [model.modules[0]]


@pytest.mark.parametrize(
    ("task", "model_type", "least", "why"),
    [
        (Task.EMBED, "gte", LEAST_COSINE, "must be at least 0.98"),
        # A low bound for the cosine, which differs with the release that drew the weights: relevance is the reason.
        (Task.RERANK, "electra", 0.9, "and may by 0.1"),
    ],
)
def test_a_model_whose_answers_move_too_far_is_refused(
    monkeypatch: pytest.MonkeyPatch, task: Task, model_type: str, least: float, why: str, tmp_path: Path
) -> None:
    monkeypatch.setattr("vecmill.engine.float8_models.LEAST_COSINE", least)
    with pytest.raises(StartupError, match=why) as refused:
        loaded(tiny_model(task, model_type), tmp_path)
    sentence = refused.value.message
    assert sentence.startswith(f"{task.value.upper()}_MODEL=tiny: in fp8 ")
    assert "cosine to bfloat16 is" in sentence
    assert sentence.endswith("set DTYPE to bfloat16.")


def test_weights_that_are_elsewhere_go_to_the_device_one_by_one(tmp_path: Path) -> None:
    """The CPU stands for both: torch calls it by two names. One block of albert's runs several times in a pass."""
    for model_type in ("qwen3", "albert"):
        folder = tiny_model(Task.EMBED, model_type).write(tmp_path / model_type)
        checkpoint, model = load_model(folder, dtype=torch.bfloat16)
        _, direct = load_model(folder, dtype=torch.bfloat16)
        rows = sample_rows(checkpoint, load_tokenizer(checkpoint))
        device = torch.device("cpu", 0)
        assert device != CPU
        assert to_float8(model, rows, device, Attention.SDPA) == to_float8(direct, rows, CPU, Attention.SDPA)
        assert np.array_equal(run(model, rows), run(direct, rows))


ROOM = GpuRoom(int(80 * GIGABYTE), 0, int(70 * GIGABYTE), 0, 0.9, unified=False)


@pytest.mark.parametrize(
    ("room", "size", "place"),
    [
        (None, 10**15, "cuda:0"),
        (ROOM, 10**9, "cuda:0"),
        (ROOM, 78 * 10**9, "cpu"),
        (ROOM, 10**15, "nor into the"),
        (GpuRoom(10**9, 0, 10**9, 0, 0.9, unified=True), 10**10, "that CPU and GPU share"),
    ],
    ids=["not-known", "fits", "fits-the-machine", "fits-nowhere", "shared"],
)
def test_where_weights_are_before_they_are_rounded(
    room: GpuRoom | None, size: int, place: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(float8_models, "host_memory", lambda: HostMemory(200_000, 150_000, 0, 0, None))
    monkeypatch.setattr(float8_models, "describe", str)
    checkpoint = read(Source("tiny", tiny_model(Task.EMBED, "qwen3").write(tmp_path / "tiny"), Task.EMBED))
    try:
        found = str(loads_on(checkpoint, torch.device("cuda", 0), room, size))
    except StartupError as error:
        found = error.message
        assert found.startswith("EMBED_MODEL=tiny: its weights are in bfloat16 until they are rounded to fp8")
    assert place in found
