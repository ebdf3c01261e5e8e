"""Memory of the machine, the process and the device, in MB (2^20 bytes), and what the process may take of it.

A control group's limit (systemd's `MemoryMax=`, a container's) holds for all groups below it, so those above this
process's own count too, of version 2 and of version 1.

Sources: https://docs.kernel.org/admin-guide/cgroup-v2.html (memory.max, memory.current) and
https://docs.kernel.org/admin-guide/cgroup-v1/memory.html (memory.limit_in_bytes, memory.usage_in_bytes)."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

import psutil

from vecmill.core.errors import MemoryLow

MEGABYTE = 1024 * 1024
GIGABYTE = 1024 * MEGABYTE
CGROUP, OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
FLOOR_SHARE, HIGHEST_FLOOR = 0.04, 8 * GIGABYTE
# A forward pass on a CPU takes tens of MB and frees them again at each layer. glibc would give them back, and the
# system map and clear them anew, a tenth of the time of a pass. So much may stay free in each thread's part of the
# heap; larger pieces have mappings of their own, which are given back at once.
KEPT_FREE, OWN_MAPPING = 128 * MEGABYTE, 32 * MEGABYTE
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # of glibc's malloc.h
MALLOC_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_ARENA_MAX", "GLIBC_TUNABLES")
# glibc gives each new thread an arena of its own, up to eight for each core, and each keeps what was freed in it.
# Threads that begin late or take over from others find free memory in these few.
ARENAS = 4
READ_EVERY = 0.05  # seconds: the kernel takes as long to say it as a small request takes to be read


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """What torch knows of a GPU's memory. `unified`: CPU and GPU share one memory.

    `reported_free_mb` is cudaMemGetInfo's; None where the memory is unified, for there it is wrong (`gpu_memory`).
    """

    total_mb: int
    allocated_mb: int
    reserved_mb: int
    reported_free_mb: int | None
    unified: bool


@dataclass(frozen=True, slots=True)
class GpuRoom:
    """What there is of a GPU's memory, in bytes. `unified`: it is the machine's.

    `reserved` is what torch holds already; `available` what anybody could still take, of which `floor` stays free.
    """

    total: int
    reserved: int
    available: int
    floor: int
    fraction: float
    unified: bool

    @property
    def limit(self) -> int:
        """Bytes that torch may hold: MEMORY_FRACTION of all; where the memory is the machine's, no more than is left.

        A card's own memory is not bounded by what is free: past its end allocations fail, and nothing else does.
        """
        share = int(self.fraction * self.total)
        return max(0, min(share, self._left)) if self.unified else share

    def shortage(self, needed: int) -> str | None:
        """Why so many bytes more do not fit, with the cure; None where they do."""
        free = min(self.limit - self.reserved, self._left - self.reserved)
        if needed <= free:
            return None
        owner = "CPU and GPU share" if self.unified else "the GPU has"
        kept = f", {self.floor / GIGABYTE:.1f} of which must stay free (MEMORY_FLOOR_GB)" if self.floor else ""
        return (
            f"they take {needed / GIGABYTE:.1f} GB, and of the {self.total / GIGABYTE:.1f} GB that {owner} "
            f"{self.available / GIGABYTE:.1f} are available{kept}; the process may take {self.fraction:.0%} of all "
            f"(MEMORY_FRACTION): stop what else holds memory, or set EMBED_MODEL and RERANK_MODEL to smaller models."
        )

    @property
    def _left(self) -> int:
        return self.reserved + self.available - self.floor


@dataclass(frozen=True, slots=True)
class HostMemory:
    """The machine's memory and this process's share.

    `pressure_percent`: of the last ten seconds, how long some process waited for memory; None where unknown.
    """

    total_mb: int
    available_mb: int
    process_mb: int
    swap_used_mb: int
    pressure_percent: float | None


def host_memory() -> HostMemory:
    """Read the memory now."""
    machine = psutil.virtual_memory()
    return HostMemory(
        total_mb=machine.total // MEGABYTE,
        available_mb=machine.available // MEGABYTE,
        process_mb=psutil.Process().memory_info().rss // MEGABYTE,
        swap_used_mb=psutil.swap_memory().used // MEGABYTE,
        pressure_percent=memory_pressure(),
    )


def memory_floor(total: int, floor_gb: float | None) -> float:
    """Bytes of `total` that stay free: MEMORY_FLOOR_GB, or 4 % of it, at most 8 GB, if that is not set."""
    return min(FLOOR_SHARE * total, HIGHEST_FLOOR) if floor_gb is None else floor_gb * GIGABYTE


class MemoryGuard:
    """Refuses requests before the machine has to swap: a GB10's GPU shares its memory, and it hangs when that is full.

    Source: MemAvailable in /proc/meminfo; where control groups limit the process, what they have left.
    """

    def __init__(self, floor_gb: float | None, fraction: float) -> None:
        """`floor_gb` stays free (None: 4 % of the machine, at most 8); the process takes `fraction` of all, at most."""
        self._groups = ControlGroups(CGROUP, OWN_CGROUP)
        machine = int(psutil.virtual_memory().total)
        self._total = min(machine, self._groups.limit() or machine)
        self._floor = memory_floor(self._total, floor_gb)
        self._most = fraction * self._total
        self._process = psutil.Process()
        self._read_at: float | None = None
        self._last = (0, 0)
        """Bytes available and bytes used at the last reading, corrected by what `check` has admitted since."""

    def check(self, needed: int) -> None:
        """Pass where `needed` bytes more leave the floor free.

        Raises:
            MemoryLow: they do not, or the process would have more than its share.
        """
        if (reason := self.shortage(needed)) is not None:
            raise self._low(reason)
        available, used = self._last
        self._last = (available - needed, used + needed)

    def shortage(self, needed: int) -> str | None:
        """Why `needed` bytes more are too many; None where they are not."""
        available, used = self._now()
        if available - needed < self._floor:
            return f"{available / GIGABYTE:.1f} GB are free and {self._floor / GIGABYTE:.1f} must stay so"
        if used + needed > self._most:
            return f"the process has {used / GIGABYTE:.1f} of the {self._most / GIGABYTE:.1f} GB it may take"
        return None

    def _now(self) -> tuple[int, int]:
        """Bytes that are available, and those that the process has."""
        if self._read_at is None or monotonic() - self._read_at > READ_EVERY:
            self._read_at = monotonic()
            self._last = (self._available(), self._process.memory_info().rss)
        return self._last

    def _available(self) -> int:
        available = int(psutil.virtual_memory().available)
        left = self._groups.left()
        return available if left is None else min(available, left)

    @staticmethod
    def _low(reason: str) -> MemoryLow:
        return MemoryLow(
            f"503: the machine is short of memory, the server is temporarily unavailable: {reason} "
            f"(MEMORY_FLOOR_GB, MEMORY_FRACTION); try again with fewer texts."
        )


PROC = Path("/proc")


def keep_freed_memory() -> None:
    """Have glibc keep what forward passes free for the passes to come; nothing where its own settings say otherwise."""
    if any(name in os.environ for name in MALLOC_SETTINGS):
        return
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(M_TRIM_THRESHOLD, KEPT_FREE)
        library.mallopt(M_MMAP_THRESHOLD, OWN_MAPPING)
        library.mallopt(M_ARENA_MAX, ARENAS)


def give_back_memory() -> None:
    """Let the system have what this process has freed: glibc keeps pieces below 32 MB for itself, in an arena for each
    thread. Others run meanwhile; a garbage collection, which holds everybody up, is not needed.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc's alone


def meminfo(proc: Path = PROC) -> Mapping[str, int]:
    """/proc/meminfo: bytes, or counts for the lines without a unit; empty where there is none."""
    try:
        lines = (proc / "meminfo").read_text().splitlines()
    except OSError:
        return {}
    values: dict[str, int] = {}
    for line in lines:
        name, _, rest = line.partition(":")
        number, _, unit = rest.strip().partition(" ")
        if number.isdecimal():
            values[name] = int(number) * (1024 if unit == "kB" else 1)
    return values


def unified_available(info: Mapping[str, int]) -> int | None:
    """Bytes that a GPU can still allocate where it shares the machine's memory; None where the kernel does not tell.

    cudaMemGetInfo counts the page cache as used, so that it says too little after any download. Swap is left out: the
    GPU's pages cannot be swapped. Source: NVIDIA's guidance for unified memory,
    https://docs.nvidia.com/dgx/dgx-spark/known-issues.html, as llama.cpp follows it.
    """
    if info.get("HugePages_Total"):
        return info.get("HugePages_Free", 0) * info.get("Hugepagesize", 0)
    return info.get("MemAvailable")


def memory_pressure(proc: Path = PROC) -> float | None:
    """Percent of the last ten seconds in which some process waited for memory; None where the kernel does not tell."""
    try:
        some = (proc / "pressure/memory").read_text().splitlines()[0]
        return float(dict(part.split("=") for part in some.split()[1:])["avg10"])
    except (OSError, LookupError, ValueError):
        return None


LOOK_SECONDS = 10.0  # between two looks at which groups have a limit; `systemctl set-property` changes one
# Version 1 writes "no limit" as the largest multiple of a page: more than any machine has.
UNLIMITED = 1 << 60


@dataclass(frozen=True, slots=True)
class _Version:
    """What a version of control groups calls its files."""

    limit: str
    usage: str
    inactive: str
    """File cache that nobody has used lately, in memory.stat, with what is below."""


V1 = _Version("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
V2 = _Version("memory.max", "memory.current", "inactive_file")


@dataclass(frozen=True, slots=True)
class GroupMemory:
    """The memory of a control group, in bytes."""

    limit: int
    used: int
    """What counts against the limit."""
    inactive: int
    """Part of `used`: file cache that nobody has used lately, which is given up before anything is refused."""

    @property
    def left(self) -> int:
        """What can still be had."""
        return self.limit - self.used + self.inactive


class ControlGroups:
    """The groups of this process from its own up to the highest one that it sees. For any thread."""

    def __init__(self, mounted: Path, own: Path) -> None:
        """`mounted`: where the kernel shows the groups; `own`: where it says which are this process's."""
        self._groups = _groups(mounted, own)
        self._limited: list[tuple[Path, _Version]] = []
        self._looked_at: float | None = None

    def limit(self) -> int | None:
        """Bytes that the strictest group allows; None where none limits."""
        self._look()
        return min((limit for group, version in self._limited if (limit := _limit(group, version))), default=None)

    def left(self) -> int | None:
        """Bytes that can still be had, whichever group is the fullest; None where none limits."""
        strictest = self.strictest()
        return None if strictest is None else strictest.left

    def strictest(self) -> GroupMemory | None:
        """The memory of the group with the least left; None where none limits."""
        if self._looked_at is None or monotonic() - self._looked_at > LOOK_SECONDS:
            self._look()
        groups = (
            GroupMemory(limit, _number(group / version.usage) or 0, _inactive(group, version))
            for group, version in self._limited
            if (limit := _limit(group, version)) is not None
        )
        return min(groups, key=lambda group: group.left, default=None)

    def _look(self) -> None:
        self._limited = [group for group in self._groups if _limit(*group) is not None]
        self._looked_at = monotonic()


def _groups(mounted: Path, own: Path) -> list[tuple[Path, _Version]]:
    """Of lines `hierarchy:controllers:path`; version 2's has no controllers."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        lines = []
    groups = [*_upwards(mounted, "/", V2), *_upwards(mounted / "memory", "/", V1)]
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if not controllers:
            groups += _upwards(mounted, path, V2)
        elif "memory" in controllers.split(","):
            groups += _upwards(mounted / "memory", path, V1)
    return list(dict.fromkeys(groups))


def _upwards(mounted: Path, path: str, version: _Version) -> list[tuple[Path, _Version]]:
    """A group and those above it. A container may see another part of the tree than the path is from."""
    parts = [part for part in path.split("/") if part]
    if ".." in parts:
        parts = []
    return [(mounted.joinpath(*parts[:count]), version) for count in range(len(parts), -1, -1)]


def _limit(group: Path, version: _Version) -> int | None:
    limit = _number(group / version.limit)
    return limit if limit is not None and limit < UNLIMITED else None


def _inactive(group: Path, version: _Version) -> int:
    try:
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return int(stat.get(version.inactive, 0))
    except (OSError, ValueError):
        return 0


def _number(file: Path) -> int | None:
    try:
        text = file.read_text().strip()
    except (OSError, ValueError):
        return None
    return int(text) if text.isdecimal() else None
