"""The recommended batch by available memory, as the clients know it from the servers before."""

from __future__ import annotations

import pytest

from vecmill.hardware.memory import host_memory
from vecmill.hardware.recommendation import recommended_batch_size


@pytest.mark.parametrize(
    ("available_gb", "batch"), [(100, 64), (81, 64), (80, 48), (61, 48), (60, 32), (41, 32), (40, 8), (1, 8), (0, 8)]
)
def test_by_gpu_memory(available_gb: int, batch: int) -> None:
    assert recommended_batch_size(available_gb * 1024, max_batch_size=64) == batch


def test_never_above_the_rows_of_a_forward() -> None:
    assert recommended_batch_size(100 * 1024, max_batch_size=16) == 16
    assert recommended_batch_size(None, max_batch_size=16) == 16


def test_without_a_gpu() -> None:
    assert recommended_batch_size(None, max_batch_size=64) == 32


def test_the_hosts_memory_is_read() -> None:
    memory = host_memory()
    assert 0 < memory.process_mb < memory.total_mb
    assert 0 < memory.available_mb < memory.total_mb
