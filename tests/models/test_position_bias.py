"""A bias for each distance, in packed rows, equals attention written out for each row alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.models.loaded import CPU, compiled_steps
from vecmill.core.types import Row
from vecmill.models import family
from vecmill.models.packed_attention import bias_table, packed_attention
from vecmill.models.packing import Attention, PackedBatch, pack

HEADS, WIDTH = 3, 8


def packed_rows(*lengths: int, attention: Attention) -> PackedBatch:
    return pack([Row(np.ones(length, dtype=np.int32)) for length in lengths], CPU, attention=attention)


def of_distances(distances: Tensor) -> Tensor:
    """Different for each head, and for a key before and after its query."""
    slopes = torch.tensor([[0.5], [-0.1], [0.02]])
    return torch.where(distances < 0, slopes * distances, torch.sin(slopes * distances))


LENGTHS = [(1,), (2, 2, 5, 9), (70, 3, 70), (47, 47, 15, 303), (600, 33), (1300,)]
Scores = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From queries and keys of one row, (heads, T, width), and the distance of each pair, (T, T), to what is added."""


def assert_each_row_equals_itself_alone(
    lengths: tuple[int, ...],
    attention: Attention,
    added: Scores,
    dtype: torch.dtype = torch.float32,
    tolerance: float = 1e-5,
    **position: Any,
) -> None:
    """`position`: what packed attention is told of the position of tokens; `added`: the same, written out."""
    packed = packed_rows(*lengths, attention=attention)
    generator = torch.Generator().manual_seed(0)
    shape = (1, HEADS, packed.input_ids.shape[1], WIDTH)
    query, key, value = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
    [out], _ = packed_attention(nn.Identity(), query, key, value, None, packed_batch=packed, **position)
    for start, length in zip(packed.cu_seqlens.tolist(), packed.lengths.tolist(), strict=False):
        row = slice(start, start + length)
        q, k, v = (each[0, :, row].float() for each in (query, key, value))
        index = torch.arange(length)
        scores = q @ k.mT / WIDTH**0.5 + added(q, k, index[None] - index[:, None])
        alone = torch.softmax(scores, dim=-1) @ v
        torch.testing.assert_close(out[row].transpose(0, 1).float(), alone, atol=tolerance, rtol=tolerance)


@pytest.fixture(params=[family.TABLE_BYTES, 1], ids=["large table", "small table"])
def any_table(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table as large as it may be, and as small."""
    monkeypatch.setattr(family, "TABLE_BYTES", request.param)


@pytest.mark.usefixtures("any_table")
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_packed_rows_equal_each_row_alone(lengths: tuple[int, ...], any_way: Attention) -> None:
    """Rows of one block and of several."""

    def added(query: Tensor, key: Tensor, distances: Tensor) -> Tensor:
        return of_distances(distances.flatten()).view(HEADS, *distances.shape)

    table = bias_table(of_distances, max(lengths), CPU)
    assert_each_row_equals_itself_alone(lengths, any_way, added, position_bias=table)


BUCKETS = 24


def bucket_of_distances(distances: Tensor) -> Tensor:
    """Near ones have buckets of their own, far ones share one on either side."""
    return (distances + BUCKETS // 2).clamp(0, BUCKETS - 1)[None]


@pytest.mark.usefixtures("any_table")
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_products_with_distances_equal_those_of_each_pair(lengths: tuple[int, ...], any_way: Attention) -> None:
    """Of queries with keys of distances, and of keys with queries of distances, as DeBERTa has them."""
    generator = torch.Generator().manual_seed(1)
    keys, queries = (0.3 * torch.randn(BUCKETS, HEADS, WIDTH, generator=generator) for _ in range(2))

    def added(query: Tensor, key: Tensor, distances: Tensor) -> Tensor:
        [buckets] = bucket_of_distances(distances)
        of_queries = torch.einsum("hid,ijhd->hij", query, keys[buckets])
        return of_queries + torch.einsum("hjd,ijhd->hij", key, queries[buckets])

    table = bias_table(bucket_of_distances, max(lengths), CPU)
    assert_each_row_equals_itself_alone(
        lengths, any_way, added, position_bias=table, position_projections=(keys, queries)
    )


@pytest.mark.parametrize("compiled", [False, True], ids=["torch", "compiled"])
@pytest.mark.parametrize("distances", [False, True], ids=["table", "distances"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_in_bfloat16_rows_equal_each_row_alone(lengths: tuple[int, ...], distances: bool, compiled: bool) -> None:
    """As products, whose scores are rounded."""
    generator = torch.Generator().manual_seed(1)
    slopes = torch.tensor([[0.5], [-0.1], [0.02]])
    keys, queries = (0.3 * torch.randn(BUCKETS, HEADS, WIDTH, generator=generator) for _ in range(2))

    def of_pairs(distances: Tensor) -> Tensor:
        return torch.sin(slopes * distances).bfloat16()

    def added(query: Tensor, key: Tensor, apart: Tensor) -> Tensor:
        if not distances:
            return of_pairs(apart.flatten()).float().view(HEADS, *apart.shape)
        [buckets] = bucket_of_distances(apart)
        of_queries = torch.einsum("hid,ijhd->hij", query, keys.bfloat16().float()[buckets])
        return of_queries + torch.einsum("hjd,ijhd->hij", key, queries.bfloat16().float()[buckets])

    position: dict[str, Any] = {"position_bias": bias_table(of_pairs, max(lengths), CPU)}
    if distances:
        position["position_bias"] = bias_table(bucket_of_distances, max(lengths), CPU)
        position["position_projections"] = (keys.bfloat16(), queries.bfloat16())
    with compiled_steps(compiled):
        assert_each_row_equals_itself_alone(lengths, Attention.PRODUCTS, added, torch.bfloat16, 0.05, **position)


def test_the_table_is_bounded() -> None:
    """It grows with the positions, and its rows become fewer before it takes more than TABLE_BYTES."""

    def of_twelve_heads(distances: Tensor) -> Tensor:
        return torch.zeros(12, 1, dtype=torch.bfloat16, device=distances.device) * distances.to(torch.bfloat16)

    shapes = {
        positions: tuple(bias_table(of_twelve_heads, positions, torch.device("meta")).shape)
        for positions in (20, 512, 8192, 32_768)
    }
    assert shapes == {20: (12, 64, 128), 512: (12, 512, 1024), 8192: (12, 512, 16_384), 32_768: (12, 128, 65_536)}
    assert all(2 * rows * columns * heads <= family.TABLE_BYTES for heads, rows, columns in shapes.values())
