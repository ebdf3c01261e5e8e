"""What the Linux kernel says of memory, and how much of it a GPU that shares it can have."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

PROC = Path("/proc")


def meminfo(proc: Path = PROC) -> Mapping[str, int]:
    """/proc/meminfo: bytes, or counts for the lines without a unit; empty where there is none."""
    try:
        lines = (proc / "meminfo").read_text().splitlines()
    except OSError:
        return {}
    found: dict[str, int] = {}
    for line in lines:
        name, _, rest = line.partition(":")
        number, _, unit = rest.strip().partition(" ")
        if number.isdecimal():
            found[name] = int(number) * (1024 if unit == "kB" else 1)
    return found


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
