"""Memory as parts that add up: of a GB10, of a card with memory of its own, in a control group, and as it is here."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from vecmill.hardware.gpu import GpuMemory
from vecmill.hardware.memory import GIGABYTE, MEGABYTE
from vecmill.hardware.memory_parts import GpuMemoryParts, MemoryMeter, MemoryParts, gpu_parts

KB = 1024
MEMINFO = {
    "MemTotal": 127_600_000,
    "MemFree": 30_000_000,
    "MemAvailable": 75_000_000,
    "Buffers": 500_000,
    "Cached": 47_000_000,
    "SReclaimable": 1_500_000,
    "Shmem": 1_000_000,
}
PAGE_CACHE_KB = 48_000_000


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    (tmp_path / "meminfo").write_text("".join(f"{name}: {kb} kB\n" for name, kb in MEMINFO.items()))
    return tmp_path


def check_sum(parts: MemoryParts) -> None:
    assert parts.ours + parts.others + parts.page_cache + parts.free == parts.total
    assert min(parts.ours, parts.others, parts.page_cache, parts.free) >= 0


def meter(proc: Path, floor_gb: float | None = None) -> MemoryMeter:
    """In no control group."""
    return MemoryMeter(floor_gb, proc, proc / "no-cgroup", proc / "no-own-cgroup")


def test_on_a_gb10_what_the_gpu_holds_for_us_is_ours(proc: Path) -> None:
    without = meter(proc).machine(GpuMemory())
    parts = meter(proc).machine(GpuMemory(unified=True, this_process_mb=9216, reserved_mb=9000))
    check_sum(parts)
    assert parts.total == MEMINFO["MemTotal"] * KB
    assert parts.free == MEMINFO["MemFree"] * KB  # what files are cached in is no part of it
    assert parts.ours - without.ours == pytest.approx(9216 * MEGABYTE, abs=50 * MEGABYTE)
    assert parts.floor == int(0.04 * parts.total)
    # Before NVML knows the process, or in a container: what torch holds.
    by_torch = meter(proc, 2.5).machine(GpuMemory(unified=True, reserved_mb=9000))
    assert by_torch.ours - without.ours == pytest.approx(9000 * MEGABYTE, abs=50 * MEGABYTE)
    assert by_torch.floor == 2.5 * GIGABYTE


def test_a_cards_memory_is_its_own(proc: Path) -> None:
    used = GpuMemory(False, 81_559, 30_000, 9000, 9200, 9216, 40_000)
    machine = meter(proc).machine(used)
    check_sum(machine)
    assert machine.ours < 9216 * MEGABYTE  # it is not the machine's
    parts = gpu_parts(used, in_use=True)
    assert parts.total == (parts.ours or 0) + (parts.others or 0) + (parts.free or 0)
    assert parts == GpuMemoryParts(*(MEGABYTE * mb for mb in (81_559, 9216, 81_559 - 30_000 - 9216, 30_000)))


def test_what_the_driver_does_not_tell_is_unknown() -> None:
    assert gpu_parts(GpuMemory(), in_use=True) == GpuMemoryParts(None, None, None, None)
    by_torch = gpu_parts(GpuMemory(False, 1000, 400, 90, 100, None, None), in_use=True)
    assert (by_torch.ours, by_torch.others) == (100 * MEGABYTE, 500 * MEGABYTE)
    assert gpu_parts(GpuMemory(False, 1000, 400), in_use=False).ours == 0


def test_files_that_we_have_mapped_are_counted_once(proc: Path) -> None:
    parts = meter(proc).machine(GpuMemory())
    check_sum(parts)
    mapped = PAGE_CACHE_KB * KB - parts.page_cache
    assert 0 < mapped < psutil.Process().memory_info().rss


def test_a_control_group_that_leaves_less_is_what_counts(proc: Path, tmp_path: Path) -> None:
    group = tmp_path / "group"
    group.mkdir()
    (group / "memory.max").write_text(f"{4 * GIGABYTE}\n")
    (group / "memory.current").write_text(f"{3 * GIGABYTE}\n")
    (group / "memory.stat").write_text(f"anon 1\ninactive_file {GIGABYTE}\n")
    parts = MemoryMeter(None, proc, group, proc / "no-own-cgroup").machine(GpuMemory())
    check_sum(parts)
    assert (parts.total, parts.free) == (4 * GIGABYTE, GIGABYTE)
    # One that leaves more than the machine has does not make the machine larger.
    (group / "memory.max").write_text(f"{900 * GIGABYTE}\n")
    assert MemoryMeter(None, proc, group, proc / "none").machine(GpuMemory()).total == MEMINFO["MemTotal"] * KB


def test_as_it_is_here() -> None:
    parts = MemoryMeter(None).machine(GpuMemory())
    check_sum(parts)
    assert 50 * MEGABYTE < parts.ours < parts.total
