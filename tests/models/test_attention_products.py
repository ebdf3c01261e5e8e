"""Attention as matrix products: rows beyond its range, what is computed together, and when it is used at all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.models.loaded import CPU, compiled_steps, load_model, run, unit
from vecmill.core.types import Prefix, Row
from vecmill.models import attention_products
from vecmill.models.packed_attention import attention_on, packed_attention
from vecmill.models.packing import Attention, PackedBatch, pack
from vecmill.models.source import find

HEADS, WIDTH = 2, 16
LENGTHS = (3, 20, 20, 21, 150, 600)


def batch(lengths: Sequence[int], attention: Attention = Attention.PRODUCTS) -> PackedBatch:
    return pack([Row(np.ones(length, dtype=np.int32)) for length in lengths], CPU, attention=attention)


def tensors(packed: PackedBatch, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (1, HEADS, packed.input_ids.shape[1], WIDTH)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(3)]


def attended(packed: PackedBatch, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    """(tokens, heads, width) of each row, in the batch's order."""
    [out], _ = packed_attention(nn.Identity(), query, key, value, None, packed_batch=packed)
    return [out[first : last + 1] for first, last in zip(packed.first, packed.last, strict=True)]


@pytest.fixture
def by_kernel(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of rows that torch's kernel computed."""
    lengths: list[int] = []
    kernel = nn.functional.scaled_dot_product_attention

    def counted(query: Tensor, *arguments: Any, **options: Any) -> Tensor:
        lengths.append(query.shape[2])
        return kernel(query, *arguments, **options)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", counted)
    return lengths


@pytest.fixture(params=[False, True], ids=["torch", "compiled"])
def compiled(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Both kinds of steps between products; in float32 they are torch's."""
    with compiled_steps(request.param):
        yield request.param


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [300.0, -300.0, torch.inf, torch.nan])
def test_a_row_beyond_the_range_is_computed_by_the_kernel(
    by_kernel: list[int], factor: float, dtype: torch.dtype
) -> None:
    """One row of two that are computed together; all others are as without it."""
    packed, exact = batch(LENGTHS), batch(LENGTHS, Attention.SDPA)
    query, key, value = tensors(packed, dtype)
    plain = attended(packed, query, key, value)
    assert by_kernel == []
    spoiled = int(packed.first[2])
    key[0, 0, spoiled + 4] = query[0, 0, spoiled + 7]
    query[0, 0, spoiled + 7] *= factor
    wanted = attended(exact, query, key, value)
    by_kernel.clear()

    given = attended(packed, query, key, value)

    assert by_kernel == [20]
    torch.testing.assert_close(given[2], wanted[2], atol=0, rtol=0, equal_nan=True)
    assert np.isfinite(factor) == bool(given[2].isfinite().all())
    for index in (0, 1, 3, 4, 5):
        torch.testing.assert_close(given[index], plain[index], atol=0, rtol=0)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("factor", [1.0, 4.0])
def test_the_bundled_model_is_as_near_to_float32_with_large_scores_too(by_kernel: list[int], factor: float) -> None:
    """Four times its own queries: scores of a few hundred, many of which are beyond the range."""
    exact, rounded = (load_model(find("auto").folder, dtype=dtype)[1] for dtype in (torch.float32, torch.bfloat16))
    for model in (exact, rounded):
        for name, parameter in model.modules[0].named_parameters():
            if ".query." in name:
                parameter.data *= factor
    random = np.random.default_rng(0)
    rows = [Row(random.integers(1000, 20_000, length).astype(np.int32)) for length in range(8, 256, 8)]
    wanted = unit(run(exact, rows))
    of_kernel = 1 - (wanted * unit(run(rounded, rows))).sum(axis=1)
    by_kernel.clear()

    of_products = 1 - (wanted * unit(run(rounded, rows, Attention.PRODUCTS))).sum(axis=1)

    assert by_kernel or factor == 1
    assert of_products.mean() < 1.5 * of_kernel.mean()
    if factor == 1:
        assert of_products.max() < max(0.0002, of_kernel.max())


lengths_of_rows = st.lists(st.integers(1, 700), min_size=1, max_size=80)


@settings(max_examples=100, deadline=None, database=None)
@given(lengths=lengths_of_rows, shared=st.lists(st.tuples(st.integers(1, 60), lengths_of_rows), max_size=2))
def test_each_row_is_computed_once_and_little_is_padded(
    lengths: list[int], shared: list[tuple[int, list[int]]]
) -> None:
    rows = [Row(np.ones(length, dtype=np.int32)) for length in lengths]
    for before, tails in shared:
        prefix = Prefix(np.ones(before, dtype=np.int32))
        rows += [Row(np.ones(length, dtype=np.int32), prefix=prefix) for length in tails]
    packed = pack(rows, CPU, attention=Attention.PRODUCTS)
    if packed.attention is Attention.SDPA:  # where it is faster
        assert not packed.at_once
        assert packed.input_ids.shape[1] < max(64, 8 * len(packed.cu_seqlens))
        return
    computed = [
        (group.start + row * group.length, group.length, group.prefix)
        for at_once in packed.at_once
        for group in at_once.groups
        for row in range(group.rows)
    ]
    segments = [
        (group.start + row * group.length, group.length, group.prefix)
        for group in packed.groups
        for row in range(group.rows)
    ]
    assert sorted(computed, key=str) == sorted(segments, key=str)
    for at_once in packed.at_once:
        assert at_once.count == sum(group.rows for group in at_once.groups)
        assert at_once.count.bit_count() == 1
        assert at_once.count * at_once.keys <= 2048 or at_once.count == 1
        longest = max(group.length for group in at_once.groups)
        assert longest <= at_once.queries < longest + max(16, longest / 8)
        assert {group.prefix[1] if group.prefix else 0 for group in at_once.groups} == {at_once.before}


def test_there_are_few_shapes() -> None:
    """oneDNN keeps what it prepares for each."""
    random = np.random.default_rng(0)
    shapes = set()
    for _ in range(1000):
        packed = batch(random.lognormal(4.5, 0.8, 16).clip(1, 512).astype(int).tolist())
        shapes |= {(at_once.count, at_once.queries, at_once.keys) for at_once in packed.at_once}
    assert len(shapes) < 100


@pytest.mark.parametrize("window", [None, 9, 200])
@pytest.mark.parametrize("lengths", [LENGTHS, (8200, 40), (130, 130, 100), (900, 880, 300)], ids=str)
def test_padding_is_never_beyond_the_range(lengths: tuple[int, ...], window: int | None, compiled: bool) -> None:
    """Then each layer would look at each row."""
    packed = batch(lengths)
    query, key, value = tensors(packed, torch.bfloat16 if compiled else torch.float32)
    for causal in (False, True):
        packed_attention(
            nn.Identity(), query, key, value, None, packed_batch=packed, is_causal=causal, sliding_window=window
        )
    assert len(packed.plans) == 2
    for plan in packed.plans.values():
        assert isinstance(plan, attention_products._Plan)
        assert list(plan.out_of_range()) == []
        assert compiled or float(plan.memory.used_sums.min()) > 1e-3


def test_the_memory_of_a_long_row_stays_small(compiled: bool) -> None:
    """Scores are computed in blocks, and all layers use the same memory."""
    packed = batch([8192])
    dtype = torch.bfloat16 if compiled else torch.float32
    query, key, value = tensors(packed, dtype)
    for _ in range(3):
        attended(packed, query, key, value)
    [plan] = packed.plans.values()
    assert isinstance(plan, attention_products._Plan)
    values = HEADS * 8192 * 3 * WIDTH + 2 * attention_products.SCORES
    assert plan.memory.nbytes < dtype.itemsize * values + 4 * HEADS * 8192


attention_of_rows = st.fixed_dictionaries(
    {
        "lengths": st.lists(st.integers(1, 300), min_size=1, max_size=6),
        "shared": st.none() | st.tuples(st.integers(1, 90), st.lists(st.integers(1, 200), min_size=1, max_size=3)),
        "heads": st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1)]),
        "width": st.sampled_from([8, 24, 32, 64, 80]),
        "causal": st.booleans(),
        "window": st.none() | st.integers(1, 150),
    }
)


@pytest.mark.usefixtures("compiled")
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(of=attention_of_rows)
def test_in_bfloat16_it_is_as_exact_as_scores_that_are_rounded(of: dict[str, Any]) -> None:
    """Beside torch's kernel in float32 with the same queries, keys and values: weights are off by up to 1 %."""
    rows = [Row(np.ones(length, dtype=np.int32)) for length in of["lengths"]]
    if of["shared"] is not None:
        before, tails = of["shared"]
        prefix = Prefix(np.ones(before, dtype=np.int32))
        rows += [Row(np.ones(length, dtype=np.int32), prefix=prefix) for length in tails]
    products, kernel = (pack(rows, CPU, attention=way) for way in (Attention.PRODUCTS, Attention.SDPA))
    generator = torch.Generator().manual_seed(len(rows))
    (heads, kv_heads), tokens = of["heads"], products.input_ids.shape[1]
    query, key, value = (
        torch.randn((1, count, tokens, of["width"]), generator=generator).bfloat16()
        for count in (heads, kv_heads, kv_heads)
    )
    layer = nn.Identity()
    vars(layer)["layer_idx"] = 0

    def attend(packed: PackedBatch, *parts: Tensor) -> Tensor:
        query, key, value = parts
        options: dict[str, Any] = {"is_causal": of["causal"], "sliding_window": of["window"]}
        return packed_attention(layer, query, key, value, None, packed_batch=packed, **options)[0].float()

    given = attend(products, query, key, value)
    wanted = attend(kernel, query.float(), key.float(), value.float())
    torch.testing.assert_close(given, wanted, atol=0.05, rtol=0.02)
    assert (given - wanted).abs().mean() < 0.004


@pytest.fixture
def untried() -> Iterator[None]:
    attention_products.are_faster.cache_clear()
    yield
    attention_products.are_faster.cache_clear()


@pytest.mark.usefixtures("untried")
def test_what_is_slower_or_cannot_be_had_or_gives_other_numbers_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def ways() -> set[Attention]:
        attention_products.are_faster.cache_clear()
        return {attention_on(CPU, torch.bfloat16)}

    multiply = torch.bmm
    monkeypatch.setattr(attention_products, "GAIN", 0.01)
    assert ways() == {Attention.PRODUCTS}
    assert attention_on(CPU, torch.bfloat16, timed=False) is Attention.SDPA
    assert attention_on(CPU, torch.float32) is Attention.SDPA
    assert attention_on(torch.device("cuda"), torch.bfloat16) is Attention.FLASH
    with monkeypatch.context() as other:
        other.setattr(torch, "bmm", lambda first, second, out: multiply(first, second, out=out).mul_(2))
        assert ways() == {Attention.SDPA}
    with monkeypatch.context() as missing:
        missing.delattr(torch, "baddbmm")
        assert ways() == {Attention.SDPA}
    monkeypatch.setattr(attention_products, "GAIN", 1000.0)
    assert ways() == {Attention.SDPA}


@pytest.mark.usefixtures("untried")
def test_memory_that_ended_while_it_was_tried_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **options: object) -> Tensor:
        raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as patched:
        patched.setattr(torch, "bmm", full)
        with pytest.raises(torch.OutOfMemoryError):
            attention_products.are_faster()
    monkeypatch.setattr(attention_products, "GAIN", 0.01)
    assert attention_products.are_faster()
