"""A bias for each distance, in packed rows, equals attention written out for each row alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.models.loaded import CPU
from vecmill.core.types import Row
from vecmill.models import family
from vecmill.models.packed_attention import bias_table, packed_attention
from vecmill.models.packing import PackedBatch, pack

HEADS, WIDTH = 3, 8


def packed_rows(*lengths: int) -> PackedBatch:
    return pack([Row(np.ones(length, dtype=np.int32)) for length in lengths], CPU)


def of_distances(distances: Tensor) -> Tensor:
    """Different for each head, and for a key before and after its query."""
    slopes = torch.tensor([[0.5], [-0.1], [0.02]])
    return torch.where(distances < 0, slopes * distances, torch.sin(slopes * distances))


def written_out(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """(heads, T, width) of one row."""
    index = torch.arange(query.shape[1])
    distances = (index[None] - index[:, None]).flatten()
    bias = of_distances(distances).view(HEADS, len(index), len(index))
    return torch.softmax(query @ key.transpose(1, 2) / WIDTH**0.5 + bias, dim=-1) @ value


LENGTHS = [(1,), (2, 2, 5, 9), (70, 3, 70), (47, 47, 15, 303), (600, 33), (1300,)]


@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
@pytest.mark.parametrize("most_bytes", [family.TABLE_BYTES, 1])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_packed_rows_equal_each_row_alone(
    lengths: tuple[int, ...],
    most_bytes: int,
    capability: str,
    on_cpu_with: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows of one block and of several; the table as large as it may be, and as small."""
    on_cpu_with(capability)
    monkeypatch.setattr(family, "TABLE_BYTES", most_bytes)
    table = bias_table(of_distances, max(lengths), CPU)
    packed = packed_rows(*lengths)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, HEADS, packed.input_ids.shape[1], WIDTH, generator=generator) for _ in range(3))
    [out], _ = packed_attention(nn.Identity(), query, key, value, None, packed_batch=packed, position_bias=table)
    for start, length in zip(packed.cu_seqlens.tolist(), packed.lengths.tolist(), strict=False):
        row = slice(start, start + length)
        alone = written_out(query[0, :, row], key[0, :, row], value[0, :, row])
        torch.testing.assert_close(out[row].transpose(0, 1), alone, atol=1e-5, rtol=1e-5)


BUCKETS = 24


def bucket_of_distances(distances: Tensor) -> Tensor:
    """Near ones have buckets of their own, far ones share one on either side."""
    return (distances + BUCKETS // 2).clamp(0, BUCKETS - 1)[None]


@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
@pytest.mark.parametrize("most_bytes", [family.TABLE_BYTES, 1])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_products_with_distances_equal_those_of_each_pair(
    lengths: tuple[int, ...],
    most_bytes: int,
    capability: str,
    on_cpu_with: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of queries with keys of distances, and of keys with queries of distances, as DeBERTa has them."""
    on_cpu_with(capability)
    monkeypatch.setattr(family, "TABLE_BYTES", most_bytes)
    table = bias_table(bucket_of_distances, max(lengths), CPU)
    packed = packed_rows(*lengths)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, HEADS, packed.input_ids.shape[1], WIDTH, generator=generator) for _ in range(3))
    keys, queries = (0.3 * torch.randn(BUCKETS, HEADS, WIDTH, generator=generator) for _ in range(2))
    [out], _ = packed_attention(
        nn.Identity(),
        query,
        key,
        value,
        None,
        packed_batch=packed,
        position_bias=table,
        position_projections=(keys, queries),
    )
    for start, length in zip(packed.cu_seqlens.tolist(), packed.lengths.tolist(), strict=False):
        row = slice(start, start + length)
        q, k, v = (each[0, :, row] for each in (query, key, value))
        index = torch.arange(length)
        buckets = bucket_of_distances(index[None] - index[:, None])[0]
        of_queries = torch.einsum("hid,ijhd->hij", q, keys[buckets])
        of_keys = torch.einsum("hjd,ijhd->hij", k, queries[buckets])
        alone = torch.softmax(q @ k.mT / WIDTH**0.5 + of_queries + of_keys, dim=-1) @ v
        torch.testing.assert_close(out[row].transpose(0, 1), alone, atol=1e-5, rtol=1e-5)


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
