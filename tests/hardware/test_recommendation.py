"""The recommended batch, by what was found to fit; and the guard of the machine's memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from vecmill.core.errors import MemoryLow
from vecmill.hardware import memory as memory_module
from vecmill.hardware.memory import GIGABYTE, MEGABYTE, MemoryGuard, host_memory
from vecmill.http.capabilities import recommended_batch_size


def test_never_above_the_rows_of_a_forward() -> None:
    assert recommended_batch_size(16_384, max_batch_size=16) == 16


@pytest.mark.parametrize(("budget", "batch"), [(0, 8), (128, 8), (512, 16), (1024, 32), (1792, 56), (16_384, 64)])
def test_four_forward_passes_of_code_chunks(budget: int, batch: int) -> None:
    assert recommended_batch_size(budget, max_batch_size=64) == batch


def test_the_guard_says_no_before_memory_is_short() -> None:
    MemoryGuard(None, 0.95).check(needed=1000)
    total = host_memory().total_mb * MEGABYTE
    with pytest.raises(MemoryLow, match=r"MEMORY_FLOOR_GB.*try again"):
        MemoryGuard(None, 1.0).check(needed=total)
    with pytest.raises(MemoryLow, match="must stay so"):
        MemoryGuard(total / GIGABYTE, 1.0).check(needed=0)
    with pytest.raises(MemoryLow, match="it may take"):
        MemoryGuard(0.0, 0.001).check(needed=0)


def test_a_control_groups_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory.max").write_text("40000000000\n")
    (tmp_path / "memory.current").write_text("39900000000\n")
    (tmp_path / "memory.stat").write_text("anon 39400000000\ninactive_file 500000000\n")
    monkeypatch.setattr(memory_module, "CGROUP", tmp_path)
    guard = MemoryGuard(0.1, 1.0)
    guard.check(needed=0)
    with pytest.raises(MemoryLow, match=r"0\.6 GB are free"):
        guard.check(needed=550_000_000)
    (tmp_path / "memory.max").write_text("max\n")
    MemoryGuard(0.1, 1.0).check(needed=550_000_000)


def test_the_hosts_memory_is_read() -> None:
    memory = host_memory()
    assert 0 < memory.process_mb < memory.total_mb
    assert 0 < memory.available_mb < memory.total_mb
